"""What happens to an encoder's values when the forward pass reaches them?

The sites of rows: most show a module's value as it is; a norm's two steps are computed from its input; projections are
shown by head; and scores have -inf where TransformerLens has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.encoders import EncoderRun
from ..engine.norm_sites import Norm, fire_norm, names_of
from ..engine.places import Place, SoftmaxPlace
from ..engine.sites import Run, Site
from .record import AttentionAt, joined

LETTERS = ("q", "k", "v")

#: A module of the HF model by its path.
Modules = Callable[[str], Any]


class RowsSite(Site):
    """A value of which HF may have one row for the whole batch; every input gets its own."""

    def __init__(self, name: str, place: Place) -> None:
        self.names = (name,)
        self.place = place

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        value, changed = run.fire(self.names[0], x.expand(run.batch_size, *x.shape[1:]), live=True)
        if changed:
            run.write(self.place, value)


def norm_output(normalized: Tensor, module: Any) -> Tensor:
    """What a norm returns for its normalised input: with gain and bias, in the gain's dtype."""
    output = normalized.to(module.weight.dtype) * module.weight
    bias = getattr(module, "bias", None)
    return output if bias is None else output + bias


class NormSite(Site):
    """``hook_scale`` and ``hook_normalized``, computed from the norm's input; an edit goes in as its output."""

    def __init__(self, prefix: str, norm: Norm, modules: Modules) -> None:
        self.names = names_of(prefix)
        self.prefix = prefix
        self.norm = norm
        self.modules = modules
        self.place = Place(norm.path, "input")

    def visit(self, run: Run) -> None:
        quick = not any(run.edits(name) for name in self.names)
        normalized, changed = fire_norm(run, self.prefix, run.read(self.place), self.norm, quick)
        if changed:
            run.write(Place(self.norm.path, "output"), norm_output(normalized, self.modules(self.norm.path)))


class InputsSite(Site):
    """What an attention's projections read: the stream, a copy for each head of each of them, and the norm of that.

    As in TransformerLens, the norm fires once for each projection, and an edit at one of these firings reaches that
    projection only.

    Args:
        block: TransformerLens' name of the layer.
        layer: the path of the layer.
        row: the attention.
        norm: the norm between, if there is one.
    """

    def __init__(self, block: str, layer: str, row: AttentionAt, norm: Norm | None, modules: Modules) -> None:
        assert row.reads is not None
        self.attn_in = f"{block}.hook_attn_in"
        self.split = {letter: f"{block}.hook_{letter}_input" for letter in LETTERS}
        self.projections = {letter: joined(layer, getattr(row, letter)) for letter in LETTERS}
        self.together = row.together
        self.norm = norm
        self.prefix = "" if row.norm is None else f"{block}.{row.norm.name}"
        self.norm_names = names_of(self.prefix) if norm is not None else ()
        together = (self.attn_in,) if row.together else ()
        self.names = (*together, *self.split.values(), *self.norm_names)
        self.modules = modules
        self.place = Place(joined(layer, row.reads), "input")

    def visit(self, run: Run) -> None:
        assert isinstance(run, EncoderRun)
        inputs, changed = self._inputs(run, run.read(self.place))
        for letter in LETTERS:
            value, edited = inputs[letter], letter in changed
            if self.norm is not None and (edited or any(run.listens(name) for name in self.norm_names)):
                quick = not any(run.edits(name) for name in self.names)
                normalized, norm_changed = fire_norm(run, self.prefix, value, self.norm, quick)
                edited = edited or norm_changed
                if edited:
                    value = norm_output(normalized, self.modules(self.norm.path))
            if edited:
                run.pending[self.projections[letter]] = value

    def _inputs(self, run: Run, x: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """What q, k and v are made from, and which of these a hook has changed."""
        together, split = self.together and run.cfg.use_attn_in, run.cfg.use_split_qkv_input
        if not (together or split):
            return dict.fromkeys(LETTERS, x), set()
        copies = x.unsqueeze(-2).expand(*x.shape[:-1], run.cfg.n_heads, x.shape[-1])
        inputs, changed = dict.fromkeys(LETTERS, copies), set()
        if together:
            shared, was_changed = run.fire(self.attn_in, copies, live=True)
            if was_changed and not split:
                inputs, changed = dict.fromkeys(LETTERS, shared), set(LETTERS)
        if split:
            for letter, name in self.split.items():
                inputs[letter], was_changed = run.fire(name, copies, live=True)
                changed |= {letter} if was_changed else set()
        return inputs, changed


class HeadsSite(Site):
    """hook_q, hook_k or hook_v: the output of a projection, by head."""

    def __init__(self, name: str, path: str, inputs: InputsSite | None, modules: Modules) -> None:
        self.names = (name,)
        self.place = Place(path, "output")
        self.after_edits_of = () if inputs is None else inputs.names
        self.modules = modules

    def visit(self, run: Run) -> None:
        assert isinstance(run, EncoderRun)
        given = run.pending.pop(self.place.path, None)
        heads = (run.read(self.place) if given is None else self._project(run, given)).unflatten(-1, self._shape(run))
        value, changed = run.fire(self.names[0], heads, live=given is None)
        if changed or given is not None:
            run.write(self.place, value.flatten(-2))

    def _shape(self, run: Run) -> tuple[int, int]:
        return run.cfg.n_heads, run.cfg.d_head

    def _project(self, run: Run, given: Tensor) -> Tensor:
        projection = self.modules(self.place.path)
        if given.dim() == 3:
            return torch.nn.functional.linear(given, projection.weight, projection.bias)
        weight = projection.weight.unflatten(0, self._shape(run))
        projected = torch.einsum("bphm,hdm->bphd", given, weight).flatten(-2)
        return projected if projection.bias is None else projected + projection.bias


class ScoresSite(Site):
    """hook_attn_scores: the softmax's input."""

    def __init__(self, name: str, path: str, infinite: bool) -> None:
        self.names = (name,)
        self.place = SoftmaxPlace(path, "input")
        self.infinite = infinite

    def visit(self, run: Run) -> None:
        assert isinstance(run, EncoderRun)
        value = run.read(self.place)
        if self.infinite:
            value = value.masked_fill(value < torch.finfo(value.dtype).min / 2, -torch.inf)
        value, changed = run.fire(self.names[0], value, live=not self.infinite)
        if changed:
            run.write(self.place, value)
            run.scores.add(self.names[0])


class PatternSite(Site):
    """hook_pattern: the softmax's output; a row that edited scores made undefined attends to nothing."""

    def __init__(self, name: str, path: str, scores: ScoresSite) -> None:
        self.names = (name,)
        self.place = SoftmaxPlace(path, "output")
        self.after_edits_of = scores.names

    def visit(self, run: Run) -> None:
        assert isinstance(run, EncoderRun)
        value, filled = run.read(self.place), not run.scores.isdisjoint(self.after_edits_of)
        if filled:
            value = torch.where(value.isnan(), torch.zeros_like(value), value)
        value, changed = run.fire(self.names[0], value, live=not filled)
        if filled or changed:
            run.write(self.place, value)


class ZSite(Site):
    """hook_z and hook_result: the output projection's input by head, and what each head writes with it."""

    def __init__(self, prefix: str, path: str, modules: Modules) -> None:
        self.z, self.result = f"{prefix}.hook_z", f"{prefix}.hook_result"
        self.names = (self.z, self.result)
        self.place = Place(path, "input")
        self.path = path
        self.modules = modules

    def visit(self, run: Run) -> None:
        heads = (run.cfg.n_heads, run.cfg.d_head)
        z, changed = run.fire(self.z, run.read(self.place).unflatten(-1, heads), live=True)
        if changed:
            run.write(self.place, z.flatten(-2))
        if run.listens(self.result):
            projection = self.modules(self.path)
            weight = projection.weight.unflatten(-1, heads)
            result, changed = run.fire(self.result, torch.einsum("bphd,mhd->bphm", z, weight), live=False)
            if changed:
                output = result.sum(-2)
                run.write(Place(self.path, "output"), output if projection.bias is None else output + projection.bias)
