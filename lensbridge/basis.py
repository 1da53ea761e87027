"""How does a value inside the HuggingFace model read in TransformerLens' basis, and how is it written back?

TransformerLens rewrites weights so that intermediate values come out in a handier basis. Here the weights stay, and
each value is converted as it passes a hook point. Every conversion is a pair: what a hook sees is a function of HF's
value, and what goes back makes the rest of HF's forward compute what the rest of TransformerLens' processed model
would.

    residual stream    x - mean(x); the mean that edits bring in is kept apart (`Stream`), as in TransformerLens' stream
    v, z               minus the value bias c of each head, which processing moves into b_O
    pattern            as is; where its rows no longer sum to 1, z gets back (1 - row sum) c
    q, k, v, z         times a matrix per head under refactor_factored_attn_matrices
    norm output        n instead of n * w + b under fold_ln, and the rest of the model ignores mean(n)
    logits             minus the mean over the vocabulary under center_unembed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .affine import bias_of
from .computed import Computed, outlined
from .processing import ATTENTION_READERS, Processing, center, fold_norm_into
from .value_views import ValueViews
from .weights import WeightViews, fingerprint
from .whole import counted_once, device_of


class AnyNorm(Protocol):
    """What has to be known of a norm to convert its output."""

    @property
    def path(self) -> str:
        """Where it is in the HF model."""

    @property
    def centred(self) -> bool:
        """Whether it takes the mean out of its input."""

    @property
    def folds(self) -> bool:
        """Whether processing folds its gain and bias into what reads it."""


@dataclass
class HeadMaps:
    """The matrices that refactoring applies per head: ``[head, d_head, d_head]``, acting from the right."""

    q: Tensor
    k: Tensor
    v: Tensor

    def inverse(self) -> HeadMaps:
        """The maps back; a direction in which a head writes nothing (its circuit has less rank) stays zero."""
        return HeadMaps(_pseudo_inverse(self.q), _pseudo_inverse(self.k), _pseudo_inverse(self.v))

    def to(self, dtype: torch.dtype) -> HeadMaps:
        return HeadMaps(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype))


def _pseudo_inverse(matrices: Tensor) -> Tensor:
    """The inverse, without the directions that are zero up to rounding."""
    return torch.linalg.pinv(matrices, rtol=_relative_rounding(matrices))


def _relative_rounding(matrices: Tensor) -> float:
    """What is zero in relation to the largest entry: the float32 weights that all was made from are no more exact."""
    return matrices.shape[-1] * torch.finfo(torch.float32).eps


def _normed_bias(weight: Tensor, bias: Tensor | None, norm_bias: Tensor) -> Tensor:
    """What a norm's bias adds to the values of each head, and their own."""
    flat, shape, norm_bias = weight.flatten(-2).T, weight.shape[1:], norm_bias.to(weight.dtype)
    added = flat @ norm_bias if bias is None else torch.addmv(bias.flatten().to(flat.dtype), flat, norm_bias)
    return added.view(shape)


class Basis:
    """The conversions that the active processing asks for, on one model."""

    def __init__(self, weights: WeightViews) -> None:
        self.weights = weights
        self._maps: dict[int, tuple[dict[str, Tensor], HeadMaps, HeadMaps]] = {}
        self._value_biases: dict[int, tuple[Any, Tensor]] = {}
        self._value_views: dict[int, ValueViews | None] = {}
        self._paths: dict[int, tuple[str, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy carries along: no views of another model's parameters."""
        return self.__dict__ | {"_value_views": {}}

    @property
    def processing(self) -> Processing:
        return self.weights.processing

    @property
    def hf_model(self) -> Any:
        """The HF model whose values are converted."""
        return self.weights.hf_model

    def device_of(self, layer: int) -> torch.device:
        """Where a layer computes."""
        architecture = self.weights.architecture
        return device_of(self.hf_model.get_submodule(architecture.layer(layer)))

    def number(self, layer: int) -> int:
        """The number that HuggingFace gives a layer."""
        return self.weights.architecture.number(layer)

    # --- residual stream ----------------------------------------------------------------------------------------------

    @property
    def centres_stream(self) -> bool:
        """Whether TransformerLens' residual stream is HF's without its mean."""
        return self.processing.center_writing_weights and self.weights.architecture.norm == "LN"

    # --- values -------------------------------------------------------------------------------------------------------

    def value_bias(self, layer: int) -> Tensor | None:
        """What every value of a head contains and TransformerLens' does not, ``[head, d_head]``; None if nothing.

        It is computed on each run, so that it follows the parameters through training, and on the graph: where an edit
        changes how much of it reaches the output, the parameters' gradients change with it.
        """
        if not self.processing.moves_value_bias:
            return None
        known = self._found_before(layer)
        if known is not None:
            return known
        folds = self.processing.fold_ln and self.weights.architecture.blocks[layer].folds_ln1
        norm_bias = bias_of(self.weights.module(self._around_values(layer)[1])) if folds else None
        if norm_bias is None:
            return self.weights.parameters.projection_bias(layer, "V")
        with outlined():
            weight, bias = self.weights.parameters.projection(layer, "V")
        found = self.weights.parameters.computed_projection(layer, "V")
        if found is not None:
            return self._of_computed(layer, found, norm_bias)
        if not torch.is_grad_enabled():
            projection, norm = (self.weights.module(path) for path in self._around_values(layer))
            self._value_views[layer] = ValueViews.of(projection, norm, weight, bias)
        return _normed_bias(weight, bias, norm_bias)

    def _found_before(self, layer: int) -> Tensor | None:
        """`value_bias` by views that an earlier run has found, off the graph."""
        views = self._value_views.get(layer)
        if views is None or torch.is_grad_enabled() or not self.processing.fold_ln:
            return None
        projection, norm = (self.weights.module(path) for path in self._around_values(layer))
        return views.added(projection, norm)

    def _around_values(self, layer: int) -> tuple[str, str]:
        """The paths of the projection with the values and of the norm before it."""
        paths = self._paths.get(layer)
        if paths is None:
            arch = self.weights.architecture
            role = "v" if arch.blocks[layer].qkv is None else "qkv"
            paths = self._paths[layer] = arch.in_layer(layer, role), arch.in_layer(layer, "ln1")
        return paths

    def _of_computed(self, layer: int, found: Computed, norm_bias: Tensor) -> Tensor:
        """`value_bias` where the matrix of the values is computed, which is done anew when something has changed."""
        stored = [each for each in (*found.sources, found.bias, norm_bias) if each is not None]
        state = (found.state, tuple(fingerprint(each) for each in stored))
        if torch.is_grad_enabled() and any(each.requires_grad for each in stored):
            return _normed_bias(*self.weights.parameters.projection(layer, "V"), norm_bias)
        kept = self._value_biases.get(layer)
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = (state, _normed_bias(*self.weights.parameters.projection(layer, "V"), norm_bias))
            self._value_biases[layer] = kept
        return kept[1]

    def head_maps(self, layer: int) -> tuple[HeadMaps, HeadMaps] | None:
        """(HF -> TransformerLens, TransformerLens -> HF) per head under refactoring, else None."""
        if not self.processing.refactor_factored_attn_matrices:
            return None
        new = self.weights.branch("attn", layer)
        kept = self._maps.get(layer)
        if kept is None or kept[0] is not new:
            with torch.inference_mode(False), torch.no_grad():
                maps, dtype = self._refactoring_maps(layer, new), new["W_K"].dtype
                kept = (new, maps.to(dtype), maps.inverse().to(dtype))
            self._maps[layer] = kept
        return kept[1], kept[2]

    def _refactoring_maps(self, layer: int, new: dict[str, Tensor]) -> HeadMaps:
        old = {name: w.detach() for name, w in self.weights.raw_branch("attn", layer).items()}
        if self.processing.fold_ln:
            old = fold_norm_into(old, ATTENTION_READERS)
        if self.processing.center_writing_weights:
            old = center(old, ("W_O",))
        # W_Q' = M V / sqrt(S) with M = W_Q W_K^T, so q' = q (W_K^T W_K' / S), as the columns of W_K' have norm sqrt(S).
        key_old = torch.cat([old["W_K"], old["b_K"][:, None]], dim=1).double()
        key_new = torch.cat([new["W_K"], new["b_K"][:, None]], dim=1).double()
        singular = (key_new * key_new).sum(1, keepdim=True)
        # A direction in which the scores do not vary (no such key, say) is no direction of the new basis.
        counts = singular > singular.amax(-1, keepdim=True) * _relative_rounding(singular)
        query = torch.where(counts, key_old.transpose(-1, -2) @ key_new / singular, 0.0)
        # k' . q' = k . q for every q; W_V' = W_V W_O W_O'^T since the rows of W_O' are orthonormal.
        key = _pseudo_inverse(query).transpose(-1, -2)
        value = old["W_O"].double() @ new["W_O"].double().transpose(-1, -2)
        return HeadMaps(query, key, value)

    # --- norms --------------------------------------------------------------------------------------------------------

    def _folds(self, norm: AnyNorm) -> bool:
        return self.processing.fold_ln and norm.folds

    def norm_output_to_hf(self, normalized: Tensor, norm: AnyNorm) -> Tensor:
        """What a norm has to return so that its readers see TransformerLens' ``hook_normalized``."""
        if norm.centred and self._folds(norm):
            # Folded readers are centred: a mean that a hook brings in does not reach them.
            normalized = normalized - normalized.mean(-1, keepdim=True)
        return self._scaled(normalized, norm)

    def norm_output(self, normalized: Tensor, norm: AnyNorm) -> Tensor:
        """What TransformerLens' norm module returns: the normalised input, with gain and bias unless folded."""
        if self._folds(norm):
            return normalized.to(self.weights.parameters.gain(norm.path).dtype)
        return self._scaled(normalized, norm)

    def _scaled(self, normalized: Tensor, norm: AnyNorm) -> Tensor:
        module = self.weights.module(norm.path)
        gain, bias = counted_once(self.hf_model, norm.path, self.weights.parameters.gain(norm.path)), bias_of(module)
        # The stream before a layer may be on the device of the one before.
        output = normalized.to(gain.device, gain.dtype) * gain
        return output if bias is None else output + bias

    def norm_output_as_hf(self, output: Tensor, norm: AnyNorm) -> Tensor:
        """HF's norm output for one in TransformerLens' basis, the inverse of what `norm_output` leaves out."""
        return self.norm_output_to_hf(output, norm) if self._folds(norm) else output

    # --- logits -------------------------------------------------------------------------------------------------------

    def logits(self, logits: Tensor, ours: bool = False) -> Tensor:
        """Logits in TransformerLens' basis; ``ours`` if nobody else holds the tensor, so that it may be overwritten."""
        if not self.processing.center_unembed:
            return logits
        mean = logits.mean(-1, keepdim=True)
        return logits.sub_(mean) if ours and not logits.requires_grad else logits - mean


class Stream:
    """The mean of TransformerLens' residual stream in one run.

    TransformerLens' centred weights write nothing along the all-ones direction, so its stream has mean zero until an
    edit brings a mean in; then it stays. HF's stream has a mean of its own. So reading takes HF's mean out and puts the
    edits' mean in. Nothing is computed while there were no edits, nor when the stream is not centred.
    """

    def __init__(self, centred: bool) -> None:
        self.centred = centred
        self.mean: Tensor | None = None
        #: The mean that an edit inside the current branch has given to the branch's output.
        self.branch_mean: Tensor | None = None
        #: The same of a branch that is not added before the one beside it.
        self._beside: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        """HF's stream as TransformerLens' stream."""
        if not self.centred:
            return x
        x = x - x.mean(-1, keepdim=True)
        return x if self.mean is None else x + self.mean.to(x.device)

    def written(self, x: Tensor) -> None:
        """The stream itself was replaced by ``x``."""
        if self.centred:
            self.mean = x.mean(-1, keepdim=True)

    def read_branch(self, x: Tensor) -> Tensor:
        """What a branch adds to HF's stream, as what TransformerLens' branch adds."""
        if not self.centred:
            return x
        x = x - x.mean(-1, keepdim=True)
        return x if self.branch_mean is None else x + self.branch_mean

    def branch_written(self, x: Tensor) -> None:
        """A branch's output was replaced by ``x`` before it is added."""
        if self.centred:
            self.branch_mean = x.mean(-1, keepdim=True)

    def add_branch(self, with_next: bool = False) -> None:
        """The current branch has been added to the stream, or will be together with the next one."""
        found, self.branch_mean = self.branch_mean, None
        if with_next:
            self._beside = found
            return
        for mean in (self._beside, found):
            if mean is not None:
                # Layers may be on several devices.
                self.mean = mean if self.mean is None else self.mean.to(mean.device) + mean
        self._beside = None
