"""What happens to a norm's values when the forward pass reaches it?

HuggingFace computes a norm in one go; TransformerLens shows the two steps inside it. They are computed from the norm's
input, and an edit goes in as the norm's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures import Architecture
from ..parameters import is_centred
from .places import AnyPlace, Place
from .sites import Run, Site

#: What norms call their epsilon.
EPSILONS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Norm:
    """A norm of the HF model: where it is, and its formula (LayerNorm's takes the mean out, RMSNorm's does not)."""

    path: str
    eps: float
    centred: bool
    #: Whether processing folds its gain and bias into what reads it.
    folds: bool = True

    @classmethod
    def of(cls, module: Any, path: str, architecture: Architecture, folds: bool = True) -> Norm:
        """The norm ``module`` at ``path`` of a model of this architecture."""
        eps = architecture.norm_eps
        if eps is None:
            # One norm for each head, perhaps.
            holder = module.norms[0] if hasattr(module, "norms") else module
            eps = next(getattr(holder, name) for name in EPSILONS if hasattr(holder, name))
        return cls(path, float(eps), is_centred(module, architecture), folds)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, without its mean if that is taken out; scale), in float32 at least, as TransformerLens has them."""
        x = _wide(x)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x, ((x * x).mean(-1, keepdim=True) + self.eps).sqrt()

    def fused(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised x, scale) in few operations, for where no gradient has to go through the scale."""
        if not self.centred:
            x, scale = self.split(x)
            return x / scale, scale
        normalized, _, inverse = torch.native_layer_norm(_wide(x), [x.shape[-1]], None, None, self.eps)
        return normalized, inverse.reciprocal()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def names_of(prefix: str) -> tuple[str, str]:
    """The points of the norm that TransformerLens calls ``prefix``."""
    return f"{prefix}.hook_scale", f"{prefix}.hook_normalized"


def fire_norm(run: Run, prefix: str, x: Tensor, norm: Norm, quick: bool = False) -> tuple[Tensor, bool]:
    """Fire ``hook_scale`` and ``hook_normalized`` of a norm with input ``x``; (normalised x, whether it changed).

    Args:
        quick: nobody can edit here, so that it can be done off the graph.
    """
    scale_name, normalized_name = names_of(prefix)
    if quick:
        with torch.no_grad():
            normalized, scale = norm.fused(x)
            run.fire(scale_name, scale, live=False)
            return run.fire(normalized_name, normalized, live=False)
    x, scale = norm.split(x)
    scale, scale_changed = run.fire(scale_name, scale, live=False)
    normalized, changed = run.fire(normalized_name, x / scale, live=False)
    return normalized, changed or scale_changed


def keep_norm(run: Run, prefix: str, x: Tensor, norm: Norm) -> None:
    """Keep ``hook_scale`` and ``hook_normalized`` of a norm with input ``x``, where nobody listens."""
    scale_name, normalized_name = names_of(prefix)
    # The scale is small: what it is made of is kept for it only where that is kept anyway.
    if run.keeps(normalized_name):
        run.keep_later(scale_name, x, lambda x: norm.fused(x)[1])
        run.keep_later(normalized_name, x, lambda x: norm.fused(x)[0])
    elif run.keeps(scale_name):
        run.keep(scale_name, norm.fused(x)[1])


#: What shows the final norm's output again.
FINAL_READERS = ("unembed.hook_in",)


class NormSite(Site):
    """A norm whose output has one reader; ``reader`` is a point that shows what it reads.

    Args:
        shared: whether others read the norm's output, too, so that an edit goes in at the reader (`ReaderSite`).
        flat: whether batch and position are one axis there.
        call: the number of the norm's call, if it is called more than once.
    """

    def __init__(
        self,
        prefix: str,
        norm: Norm,
        final: bool = False,
        reader: str | None = None,
        shared: bool = False,
        flat: bool = False,
        call: int = 0,
    ) -> None:
        self.names = (*names_of(prefix), *(() if reader is None else (reader,)))
        self.reader = reader
        self.prefix = prefix
        self.norm = norm
        self.final = final
        self.place = Place(norm.path, "input", flat, call)
        self.output = Place(norm.path, "output", flat, call)
        self.shared = shared
        #: Whether another norm takes over what hooks make of the normalised input.
        self.passes_on = False

    def visit(self, run: Run) -> None:
        quick = not any(run.edits(name) for name in (*self.names, *(FINAL_READERS if self.final else ())))
        given = run.norm_inputs.pop(self.prefix, None)
        x = run.read(self.place) if given is None else given
        normalized, changed = fire_norm(run, self.prefix, x, self.norm, quick and given is None)
        changed |= given is not None
        if self.reader is not None and run.listens(self.reader):
            output, edited = run.fire(self.reader, run.basis.norm_output(normalized, self.norm), live=False)
            if edited:
                self._write(run, run.basis.norm_output_as_hf(output, self.norm))
                return
        if changed:
            self._write(run, run.basis.norm_output_to_hf(normalized, self.norm))
            if self.passes_on:
                run.normalized[self.prefix] = normalized
        if self.final:
            run.final_norm = run.basis.norm_output(normalized, self.norm)

    def _write(self, run: Run, output: Tensor) -> None:
        if self.shared:
            run.reader_inputs[self.prefix] = output
        else:
            run.write(self.output, output)

    def record(self, run: Run) -> None:
        if self.reader is not None and run.listens(self.reader):
            self.visit(run)
            return
        x = run.read(self.place)
        keep_norm(run, self.prefix, x, self.norm)
        if self.final:
            run.final_input = x


class ReaderSite(Site):
    """Where an edit of a shared norm's output goes in for one of its readers."""

    names = ()

    def __init__(self, norm: NormSite, place: Place, copy: CopySite | None = None) -> None:
        self.prefix = norm.prefix
        self.place = place
        self.after_edits_of = (*(() if copy is None else copy.names), *norm.names)

    def visit(self, run: Run) -> None:
        output = run.reader_inputs.pop(self.prefix, None)
        if output is not None:
            run.write(self.place, output)


class AgainNormedSite(Site):
    """Another norm of the same stream, which takes over what was made of its normalised form."""

    names = ()

    def __init__(self, first: NormSite, norm: Norm, place: Place) -> None:
        first.passes_on = True
        self.prefix = first.prefix
        self.norm = norm
        self.place = place
        self.after_edits_of = first.names

    def visit(self, run: Run) -> None:
        normalized = run.normalized.pop(self.prefix, None)
        if normalized is not None:
            run.write(self.place, run.basis.norm_output_to_hf(normalized, self.norm))


class HeadNormSite(NormSite):
    """A norm over each head, whose points TransformerLens shows with batch, position and head in one axis."""

    def __init__(self, prefix: str, norm: Norm, heads_first: bool, call: int = 0) -> None:
        super().__init__(prefix, norm, call=call)
        self.heads_first = heads_first

    def visit(self, run: Run) -> None:
        x = self._read(run)
        quick = not any(run.edits(name) for name in self.names)
        normalized, changed = fire_norm(run, self.prefix, x.flatten(0, -2), self.norm, quick)
        if changed:
            output = run.basis.norm_output_to_hf(normalized.view(x.shape), self.norm)
            run.write(self.output, output.transpose(1, 2) if self.heads_first else output)

    def record(self, run: Run) -> None:
        keep_norm(run, self.prefix, self._read(run).flatten(0, -2), self.norm)

    def _read(self, run: Run) -> Tensor:
        x = run.read(self.place)
        return x.transpose(1, 2) if self.heads_first else x


class CopySite(Site):
    """``hook_mlp_in``: a copy of the stream that only what is at this place reads.

    Args:
        norm: the norm there, if its output is attention's as well.
    """

    def __init__(self, name: str, place: AnyPlace, norm: NormSite | None = None) -> None:
        self.names = (name,)
        self.place = place
        self.norm = norm
        if norm is not None:
            norm.after_edits_of = (name,)

    def visit(self, run: Run) -> None:
        value = run.stream.read(run.read(self.place))
        value, changed = run.fire(self.names[0], value, live=True)
        if not changed:
            return
        if self.norm is None:
            run.write(self.place, value)
        else:
            run.norm_inputs[self.norm.prefix] = value


class UnembedInSite(Site):
    """``unembed.hook_in``: the final norm's output, without gain and bias where these are folded away."""

    def __init__(self, name: str, place: Place, norm: Norm | None) -> None:
        self.names = (name,)
        self.place = place
        #: None where the residual stream itself is unembedded.
        self.norm = norm

    def visit(self, run: Run) -> None:
        folded = run.basis.processing.fold_ln
        value = run.final_norm if folded and run.final_norm is not None else run.read(self.place)
        value, changed = run.fire(self.names[0], value, live=True)
        if changed:
            run.write(self.place, value if self.norm is None else run.basis.norm_output_as_hf(value, self.norm))

    def record(self, run: Run) -> None:
        if self.norm is not None and run.basis.processing.fold_ln and run.final_input is not None:
            # Nothing of the model is asked for later, when it may have changed.
            norm, dtype = self.norm, run.basis.weights.parameters.gain(self.norm.path).dtype
            run.keep_later(self.names[0], run.final_input, lambda x: norm.fused(x)[0].to(dtype))
        else:
            run.keep_later(self.names[0], run.read(self.place))
