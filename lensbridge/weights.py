"""What do a HuggingFace model's parameters look like as TransformerLens weights?

Every weight is a view: in TransformerLens' shape it shares memory with the HF parameter (so an edit of it is an edit of
the model); with processing on it is computed from the parameters, kept until they change, and read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Architecture
from .errors import ReadOnlyWeightError, UnknownPointError, near_misses
from .processing import Processing, Weights, process_attention, process_embedding, process_mlp, process_unembed
from .readonly import read_only
from .shared import SharedWeight

#: branch -> (names of its norm's parameters under TransformerLens, prefix of its weights, how processing treats it)
Processor = Callable[[Weights, Processing], Weights]

ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
MLP = ("W_in", "b_in", "W_out", "b_out")
_PROCESSORS: dict[str, Processor] = {
    "embed": process_embedding,
    "attn": process_attention,
    "mlp": process_mlp,
    "unembed": process_unembed,
}
#: Elements of a parameter that are looked at to notice edits through ``.data``, which leave its version counter alone.
_SAMPLE = 16384


def matrix(module: nn.Module) -> Tensor:
    """The weight of an affine module as [in, out], sharing memory."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    # transformers' Conv1D stores [in, out], nn.Linear [out, in].
    return weight if type(module).__name__ == "Conv1D" else weight.T


class WeightViews:
    """TransformerLens' view of the parameters of one HF model.

    Names are those of TransformerLens' state dict: ``embed.W_E``, ``blocks.3.attn.W_Q``, ``blocks.3.ln1.w``, ...
    """

    def __init__(self, hf_model: nn.Module, architecture: Architecture, cfg: Any) -> None:
        self.hf_model = hf_model
        self.architecture = architecture
        self.cfg = cfg
        self._processing = Processing()
        self._kept: dict[tuple[str, int], tuple[Any, Weights]] = {}

    @property
    def processing(self) -> Processing:
        """The options that say in which basis the weights are shown."""
        return self._processing

    @processing.setter
    def processing(self, chosen: Processing) -> None:
        self._processing = chosen
        # Weights may have been edited while they were the model's own.
        self._kept.clear()

    # --- names --------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every weight of the model in the active basis, in TransformerLens' order."""
        norms = not self.processing.fold_ln
        out = ["embed.W_E", "pos_embed.W_pos"]
        for layer in range(self.cfg.n_layers):
            block = f"blocks.{layer}."
            if norms:
                out += [block + name for name in ("ln1.w", "ln1.b", "ln2.w", "ln2.b")]
            out += [block + "attn." + name for name in ATTENTION]
            out += [block + "mlp." + name for name in MLP]
        if norms:
            out += ["ln_final.w", "ln_final.b"]
        return [*out, "unembed.W_U", "unembed.b_U"]

    def _locate(self, name: str) -> tuple[str, int, str]:
        """(branch, layer, name within the branch) of a state-dict name."""
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) == 4 and parts[1].isdigit() and int(parts[1]) < self.cfg.n_layers:
            branch = {"ln1": "attn", "attn": "attn", "ln2": "mlp", "mlp": "mlp"}.get(parts[2])
            short = f"ln.{parts[3]}" if parts[2] in ("ln1", "ln2") else parts[3]
            if branch and (short in ("ln.w", "ln.b") or short in (ATTENTION if branch == "attn" else MLP)):
                return branch, int(parts[1]), short
        elif name in ("embed.W_E", "pos_embed.W_pos"):
            return "embed", 0, parts[1]
        elif name in ("ln_final.w", "ln_final.b"):
            return "unembed", 0, f"ln.{parts[1]}"
        elif name in ("unembed.W_U", "unembed.b_U"):
            return "unembed", 0, parts[1]
        raise UnknownPointError(f"this model has no weight {name!r}.{near_misses(name, self.names())}")

    # --- the model's own parameters -----------------------------------------------------------------------------------

    def module(self, path: str) -> Any:
        """A module of the HF model by its path."""
        return self.hf_model.get_submodule(path)

    def _norm(self, path: str) -> dict[str, Tensor]:
        norm = self.module(path)
        return {"ln.w": norm.weight, "ln.b": norm.bias}

    def projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor]:
        """(``W``, ``b``) of one layer's "Q", "K" or "V" projection, as views of the HF parameters."""
        index, heads = "QKV".index(letter), (self.cfg.n_heads, self.cfg.d_head)
        qkv = self.module(self.architecture.in_layer(layer, "qkv"))
        # [in, out] and [out] with out = (projection, head, d_head)
        weight = matrix(qkv).unflatten(-1, (3, *heads)).select(-3, index).movedim(0, 1)
        bias: Tensor = qkv.bias
        return weight, bias.unflatten(-1, (3, *heads))[index]

    def _raw_attention(self, layer: int) -> dict[str, Tensor]:
        o = self.module(self.architecture.in_layer(layer, "o"))
        out = self._norm(self.architecture.in_layer(layer, "ln1"))
        for letter in "QKV":
            out[f"W_{letter}"], out[f"b_{letter}"] = self.projection(layer, letter)
        out["W_O"] = matrix(o).unflatten(0, (self.cfg.n_heads, self.cfg.d_head))
        out["b_O"] = o.bias
        return out

    def _raw_mlp(self, layer: int) -> dict[str, Tensor]:
        arch = self.architecture
        into, out_of = self.module(arch.in_layer(layer, "mlp_in")), self.module(arch.in_layer(layer, "mlp_out"))
        out = self._norm(arch.in_layer(layer, "ln2"))
        out |= {"W_in": matrix(into), "b_in": into.bias}
        return out | {"W_out": matrix(out_of), "b_out": out_of.bias}

    def _raw_unembed(self) -> dict[str, Tensor]:
        head = self.module(self.architecture.unembed)
        bias = head.bias
        if bias is None:
            bias = torch.zeros(self.cfg.d_vocab_out, dtype=self.cfg.dtype, device=head.weight.device)
        return self._norm(self.architecture.ln_final) | {"W_U": matrix(head), "b_U": bias}

    def raw_branch(self, branch: str, layer: int = 0) -> dict[str, Tensor]:
        """The weights of a branch with its norm (``ln.w``, ``ln.b``), as views of the HF parameters."""
        if branch == "attn":
            return self._raw_attention(layer)
        if branch == "mlp":
            return self._raw_mlp(layer)
        if branch == "unembed":
            return self._raw_unembed()
        embed, pos = self.module(self.architecture.embed), self.module(self.architecture.pos_embed)
        return {"W_E": embed.weight, "W_pos": pos.weight[: self.cfg.n_ctx]}

    # --- in the active basis ------------------------------------------------------------------------------------------

    def get(self, name: str) -> Tensor:
        """One weight in TransformerLens' shape and the active basis.

        Without processing it shares memory with the HF parameter, and its ``.grad`` with the parameter's; with
        processing it is a read-only tensor through which gradients reach the parameters.

        Raises:
            UnknownPointError: if the model has no such weight in this basis.
        """
        branch, layer, short = self._locate(name)
        if short.startswith("ln.") and self.processing.fold_ln:
            raise UnknownPointError(
                f"{name!r} is folded into the weights that read it (fold_ln); "
                "load with fold_ln=False, or with from_pretrained_no_processing, to have it by itself"
            )
        raw = self.raw_branch(branch, layer)
        if not self.processing.any:
            return self._own(name, branch, short, raw[short])
        why = f"{name!r} is computed from the model's parameters by weight processing"
        kept = self.branch(branch, layer)[short]
        if torch.is_grad_enabled() and any(t.requires_grad for t in raw.values()):
            kept = _Derived.apply(kept, short, _PROCESSORS[branch], self.processing, tuple(raw), *raw.values())
        return read_only(kept.view_as(kept), why)

    def branch(self, branch: str, layer: int = 0) -> Weights:
        """The processed weights of a branch without graph, kept until a parameter changes; not to be edited."""
        raw = self.raw_branch(branch, layer)
        stored = [weight for short, weight in raw.items() if self._stored(branch, short)]
        owners = {id(owner): owner for owner in (w if w._base is None else w._base for w in stored)}
        state = (self.processing, tuple(_fingerprint(owner) for owner in owners.values()))
        kept = self._kept.get((branch, layer))
        if kept is None or kept[0] != (state, _versions(kept[1])):
            # Whatever mode the caller is in, what is kept has to serve a later call that needs gradients.
            with torch.inference_mode(False), torch.no_grad():
                detached = {short: weight.detach() for short, weight in raw.items()}
                processed = _process(_PROCESSORS[branch], detached, self.processing)
            kept = self._kept[(branch, layer)] = ((state, _versions(processed)), processed)
        return kept[1]

    def attention_output(self, layer: int) -> Weights:
        """``W_O`` and ``b_O`` of one layer as plain tensors, on the graph."""
        return {name: self.get(f"blocks.{layer}.attn.{name}").as_subclass(Tensor) for name in ("W_O", "b_O")}

    def stack(self, name: str) -> Tensor:
        """One weight of every layer, stacked along a new first axis (read-only: it is a copy)."""
        stacked = torch.stack([self.get(f"blocks.{layer}.{name}") for layer in range(self.cfg.n_layers)])
        return read_only(stacked, f"the stacked {name.split('.')[-1]} is a copy of every layer's own")

    def set(self, name: str, value: Tensor) -> None:
        """Overwrite one weight of the model by TransformerLens' name.

        Raises:
            ReadOnlyWeightError, TypeError, ValueError: see `check`.
        """
        self.check(name, value)
        branch, layer, short = self._locate(name)
        if self._stored(branch, short):
            with torch.no_grad():
                self.raw_branch(branch, layer)[short].copy_(value)

    def check(self, name: str, value: Tensor) -> None:
        """Refuse a value that the model cannot take for one weight.

        Raises:
            ReadOnlyWeightError: if the weight is derived (processing is on, or HF has no such parameter).
            TypeError: if the value is no tensor.
            ValueError: if the shape differs.
        """
        branch, _, short = self._locate(name)
        if self.processing.any:
            raise ReadOnlyWeightError(
                f"{name!r} is computed from the model's parameters by weight processing and cannot be set. Load with "
                "from_pretrained_no_processing, or call process_weights_ with all options off, to edit weights."
            )
        shape = tuple(self.shape(name))
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} is set to a tensor of its shape {shape}, not to a {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(f"{name!r} has shape {shape}, got {tuple(value.shape)}")
        if not self._stored(branch, short) and bool(value.any()):
            raise ReadOnlyWeightError(f"{name!r}: {type(self.hf_model).__name__} has no such parameter (it is zero)")

    def shape(self, name: str) -> torch.Size:
        """The shape of one weight."""
        branch, layer, short = self._locate(name)
        return self.raw_branch(branch, layer)[short].shape

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding's own parameter."""
        embed, head = self.module(self.architecture.embed), self.module(self.architecture.unembed)
        return embed.weight is head.weight

    def _stored(self, branch: str, short: str) -> bool:
        return not (short == "b_U" and self.module(self.architecture.unembed).bias is None)

    def _own(self, name: str, branch: str, short: str, weight: Tensor) -> Tensor:
        if not self._stored(branch, short):
            return read_only(weight, f"{name!r} is zero because {type(self.hf_model).__name__} has no such parameter")
        return weight if isinstance(weight, nn.Parameter) else weight.as_subclass(SharedWeight)


def _fingerprint(parameter: Tensor) -> tuple:
    """Something that changes when the parameter does: place, version, and a weighted sum over a sample of it."""
    size = parameter.numel()
    step = max(1, size // _SAMPLE)
    # A step that shared a factor with the row length would leave out whole columns.
    while math.gcd(step, parameter.shape[-1]) > 1:
        step -= 1
    count = -(-size // step)
    sample = parameter.detach().as_strided((count,), (step,)).double()
    total = float((sample * _ranks(count, sample.device)).sum())
    return parameter.data_ptr(), _version(parameter), total, parameter.device, parameter.dtype


def _versions(weights: Weights) -> tuple[int | None, ...]:
    """The version counters of kept weights, which tell of an edit that the read-only guard did not see coming."""
    return tuple(_version(weight) for weight in weights.values())


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@lru_cache(maxsize=32)
def _ranks(count: int, device: torch.device) -> Tensor:
    """Different factors for the places of a sample, so that exchanged entries are noticed."""
    with torch.inference_mode(False):
        return torch.linspace(1, 2, count, dtype=torch.float64, device=device)


def _process(processor: Processor, raw: Mapping[str, Tensor], processing: Processing) -> Weights:
    """Process in float32 at least, as TransformerLens does, and return to the weights' dtype."""
    dtype = next(iter(raw.values())).dtype
    wide = {short: w.float() if dtype in (torch.float16, torch.bfloat16) else w for short, w in raw.items()}
    return {short: w.to(dtype) for short, w in processor(wide, processing).items()}


class _Derived(torch.autograd.Function):
    """A kept processed weight, with the gradient it would have had, had it been computed now."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, short: str, processor: Processor, processing: Processing, names: tuple, *raw: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*raw)
        ctx.recipe = (short, processor, processing, names)
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        short, processor, processing, names = ctx.recipe
        with torch.enable_grad():
            raw = [weight.detach().requires_grad_() for weight in ctx.saved_tensors]
            value = _process(processor, dict(zip(names, raw, strict=True)), processing)[short]
            # A bias that processing has moved elsewhere is a constant zero.
            constant = not value.requires_grad
            found = [None] * len(raw) if constant else torch.autograd.grad(value, raw, gradients[0], allow_unused=True)
        return (None, None, None, None, None, *found)
