"""What happens to attention's values when the forward pass reaches them?

Queries, keys and values are slices of one fused output here, the norm before them serves three readers, and the value
bias that processing moves away has to come back where a pattern was edited: hence the sites of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import Basis, HeadMaps
from .norm_sites import Norm, fire_norm, keep_norm
from .passage import Event
from .places import AnyPlace, ArgumentPlace, Place, ResultPlace, SoftmaxPlace
from .sites import Run, Site
from .squares import SquareForm

LETTERS = ("q", "k", "v")
#: What makes a pattern of scores, and the same each time.
SOFTMAXES = (torch.softmax, nn.functional.softmax)

#: (HF -> TransformerLens, TransformerLens -> HF) per head, where the heads are mapped.
Maps = tuple[HeadMaps, HeadMaps] | None


class AttentionInputSite(Site):
    """hook_attn_in, hook_{q,k,v}_input and ln1, whose output the three projections read.

    As in TransformerLens, the norm's points fire once for each projection, and an edit at one of these firings reaches
    that projection only; where a letter has no projection that is known, its firing is the norm's output itself. Caches
    are filled once: they would keep the last firing, and it equals the others.

    Args:
        letters: those that have a projection.
        shared: whether the MLP reads the same norm's output, so that it must stay as it is.
    """

    def __init__(self, layer: int, place: Place, norm: Norm | None, letters: str = "qkv", shared: bool = False) -> None:
        self.layer = layer
        self.letters = letters
        block = f"blocks.{layer}"
        self.prefix = f"{block}.ln1"
        self.attn_in = f"{block}.hook_attn_in"
        self.split = {letter: f"{block}.hook_{letter}_input" for letter in letters}
        self.norm_names = (f"{self.prefix}.hook_scale", f"{self.prefix}.hook_normalized")
        self.names = (self.attn_in, *self.split.values(), *(() if norm is None else self.norm_names))
        self.norm = norm
        self.shared = shared
        self.place = place
        self.normed = None if norm is None else Place(norm.path, "output")
        self.writes_at = () if norm is None else (norm.path,)

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        inputs, changed = self._inputs(run, x)
        if self.norm is None:
            run.inputs |= {(self.layer, letter): inputs[letter] for letter in changed}
            return
        if not any(run.listens(name) for name in self.norm_names) and not changed:
            return
        if not changed and not any(run.edits(name) for name in self.norm_names):
            # As in TransformerLens, what is kept is what the last one, the value's, fires.
            self._show_norm(run, inputs["v"])
            return
        outputs: dict[str, Tensor] = {}
        for letter in LETTERS:
            normalized, norm_changed = fire_norm(run, self.prefix, inputs[letter], self.norm)
            if norm_changed or letter in changed:
                outputs[letter] = run.basis.norm_output_to_hf(normalized, self.norm)
        self._hand_over(run, outputs)

    def record(self, run: Run) -> None:
        if run.cfg.use_attn_in or run.cfg.use_split_qkv_input:
            self.visit(run)
        elif self.norm is not None:
            keep_norm(run, self.prefix, run.read(self.place), self.norm)

    def _inputs(self, run: Run, x: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """What the norm reads for q, k and v, and which of these a hook has changed."""
        if not (run.cfg.use_attn_in or run.cfg.use_split_qkv_input):
            return dict.fromkeys(LETTERS, x), set()
        there = run.basis.weights.parameters.heads(self.layer)
        heads = {"q": there.queries, **dict.fromkeys("kv", there.key_values)}
        copy = run.stream.read(x).unsqueeze(-2)
        own = {letter: copy.expand(*x.shape[:-1], heads[letter], x.shape[-1]) for letter in self.letters}
        # What has no projection reads the stream itself, of which there is no copy for each head.
        inputs = dict.fromkeys(LETTERS, x) | own
        changed = set()
        if run.cfg.use_attn_in:
            shared, was_changed = run.fire(self.attn_in, inputs["q"], live=True)
            if was_changed and not run.cfg.use_split_qkv_input:
                inputs, changed = dict.fromkeys(LETTERS, shared), set(LETTERS)
        if run.cfg.use_split_qkv_input:
            for letter, name in self.split.items():
                inputs[letter], was_changed = run.fire(name, inputs[letter], live=True)
                changed |= {letter} if was_changed else set()
        return inputs, changed

    def _show_norm(self, run: Run, x: Tensor) -> None:
        """Fill caches: the norm of one head's copy of the input is the norm of all."""
        assert self.norm is not None
        if x.dim() == 3:
            fire_norm(run, self.prefix, x, self.norm, quick=True)
            return
        normalized, scale = self.norm.fused(x[..., 0, :])
        for name, value in zip(self.norm_names, (scale, normalized), strict=True):
            run.fire(name, value.unsqueeze(-2).expand(*x.shape[:-1], value.shape[-1]), live=True)

    def _hand_over(self, run: Run, outputs: dict[str, Tensor]) -> None:
        """Give changed norm outputs to their projections: through HF's norm if all three agree, else one by one."""
        same = len(outputs) == 3 and not self.shared and all(value.dim() == 3 for value in outputs.values())
        if same and not outputs["q"].requires_grad and all(torch.equal(outputs["q"], o) for o in outputs.values()):
            assert self.normed is not None
            run.write(self.normed, outputs["q"])
            return
        rest = [value for letter, value in outputs.items() if letter not in self.letters]
        if rest and self.normed is not None:
            run.write(self.normed, rest[-1])
        run.inputs |= {(self.layer, letter): value for letter, value in outputs.items() if letter in self.letters}


class QKVSite(Site):
    """hook_q, hook_k and hook_v: slices of one projection's output, or one of them each.

    Args:
        clips: whether what the projection returns is clipped in place, so that nobody may hold it.
    """

    def __init__(
        self, layer: int, place: Place, inputs: AttentionInputSite, letters: str = "qkv", clips: bool = False
    ) -> None:
        self.layer = layer
        self.clips = clips
        self.letters = letters
        self.names = tuple(f"blocks.{layer}.attn.hook_{letter}" for letter in letters)
        self.place = place
        self.after_edits_of = inputs.names
        #: The functions that `_part` has found, and for which parameters.
        self._slicers: tuple[Any, dict[str, Callable[[Tensor], Tensor]]] | None = None

    def visit(self, run: Run) -> None:
        maps = run.basis.head_maps(self.layer)
        parts, changed = self._parts(run), False
        # A slice keeps the whole alive, which is all right where the others are kept, too.
        alone = not all(run.listens(name) for name in self.names)
        for index, (letter, name) in enumerate(zip(self.letters, self.names, strict=True)):
            if (self.layer, letter) in run.inputs:
                parts[index], changed = self._project(run, letter, run.inputs.pop((self.layer, letter))), True
            if run.listens(name):
                part = parts[index]
                shown = self._read(run, letter, part, maps)
                if shown is part and alone:
                    shown = part.clone()
                # What an edit changed is the difference to what was shown, where the heads are mapped.
                value, edited = run.fire(name, shown, live=shown is part or maps is not None)
                if edited:
                    parts[index], changed = self._write(run, letter, part, shown, value, maps), True
        if changed:
            joined = self._joined(run, parts)
            run.write(self.place, joined.clone() if self.clips else joined)

    def _parts(self, run: Run) -> list[Tensor]:
        x, parameters = run.read(self.place), run.basis.weights.parameters
        x = x.clone() if self.clips else x
        return [parameters.slice(x, letter, self.layer) for letter in self.letters.upper()]

    def _joined(self, run: Run, parts: list[Tensor]) -> Tensor:
        parameters = run.basis.weights.parameters
        if len(parts) == 3:
            return parameters.join(parts, self.layer)
        if self.letters == "q" and parameters.architecture.blocks[self.layer].q_gate:
            heads = parameters.heads(self.layer)
            gates = run.read(self.place).unflatten(-1, (heads.queries, -1))[..., heads.size :]
            return torch.cat([parts[0], gates], dim=-1).flatten(-2)
        return parts[0].flatten(-2)

    def record(self, run: Run) -> None:
        if run.basis.head_maps(self.layer) is not None:
            self.visit(run)
            return
        alone = not all(run.keeps(name) for name in self.names)
        x, parameters = run.read(self.place), run.basis.weights.parameters
        x = x.clone() if self.clips else x
        for letter, name in zip(self.letters, self.names, strict=True):
            if not run.keeps(name):
                continue
            part = self._part(parameters, letter)
            bias = run.value_bias(self.layer) if letter == "v" else None
            if alone:
                # A slice would keep the whole alive.
                run.keep(name, _part_of(x, part, bias))
            else:
                # The bias may be the parameter itself, which training moves on.
                run.keep_later(name, x, partial(_part_of, part=part, bias=None if bias is None else bias.clone()))

    def _part(self, parameters: Any, letter: str) -> Callable[[Tensor], Tensor]:
        """Where a letter is in what the projection returns."""
        if self._slicers is None or self._slicers[0] is not parameters:
            each = {letter: parameters.slicer(letter.upper(), self.layer) for letter in self.letters}
            self._slicers = parameters, each
        return self._slicers[1][letter]

    def _project(self, run: Run, letter: str, norm_output: Tensor) -> Tensor:
        weight, bias = run.basis.weights.parameters.projection(self.layer, letter.upper())
        equation = "bpm,mhd->bphd" if norm_output.dim() == 3 else "bphm,mhd->bphd"
        projected = torch.einsum(equation, norm_output, weight)
        return projected if bias is None else projected + bias

    def _read(self, run: Run, letter: str, part: Tensor, maps: Maps) -> Tensor:
        bias = run.value_bias(self.layer) if letter == "v" else None
        if bias is not None:
            part = part - bias
        return part if maps is None else _per_head(part, getattr(maps[0], letter))

    def _write(self, run: Run, letter: str, part: Tensor, shown: Tensor, value: Tensor, maps: Maps) -> Tensor:
        if maps is not None:
            return _moved(part, shown, value, getattr(maps[1], letter))
        bias = run.value_bias(self.layer) if letter == "v" else None
        return value if bias is None else value + bias


def _part_of(x: Tensor, part: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
    """Queries, keys or values in what a projection returns, as a tensor of their own."""
    return part(x).clone() if bias is None else part(x) - bias


class ArgumentSite(Site):
    """What attention is called with: hook_rot_q and hook_rot_k, and hook_v where no projection gives it.

    Args:
        query: where the queries are, for a point that shows those positions only which are new.
    """

    def __init__(self, name: str, place: AnyPlace, query: ArgumentPlace | None = None) -> None:
        self.names = (name,)
        self.place = place
        self.query = query

    def visit(self, run: Run) -> None:
        whole, new = self._read(run)
        value, changed = run.fire(self.names[0], new.transpose(1, 2), live=True)
        if changed:
            old = whole[:, :, : whole.shape[2] - new.shape[2]]
            run.write(self.place, torch.cat([old, value.transpose(1, 2)], dim=2))

    def record(self, run: Run) -> None:
        run.keep(self.names[0], self._read(run)[1].transpose(1, 2))

    def _read(self, run: Run) -> tuple[Tensor, Tensor]:
        whole = run.read(self.place)
        if self.query is None:
            return whole, whole
        return whole, whole[:, :, -self.query.read(run.view).shape[2] :]


class ScoresSite(Site):
    """hook_attn_scores: the softmax's input, with masked entries at -inf instead of HF's smallest finite number.

    Args:
        form: how the scores lie in what the softmax is given.
        shifted: the attention that has taken a constant from each row, if there is one that has.
    """

    def __init__(self, layer: int, place: AnyPlace, form: SquareForm, shifted: str | None = None) -> None:
        self.layer = layer
        self.names = (f"blocks.{layer}.attn.hook_attn_scores",)
        self.place = place
        self.form = form
        self.shifted = shifted
        if shifted is not None:
            self.also_reads = (ArgumentPlace(shifted, 1, place.call),)

    def visit(self, run: Run) -> None:
        raw, value = self._read(run)
        value, changed = run.fire(self.names[0], value, live=False)
        if changed:
            if self.form.behind:
                run.shares[self.layer] = self.form.share(raw, run)
            run.write(self.place, self.form.scores_to_hf(value, raw, run))
            run.edited_scores.add(self.layer)

    def record(self, run: Run) -> None:
        if self.form.plain and self.shifted is None:
            run.keep_later(self.names[0], run.read(self.place), self.form.masked)
        else:
            run.keep(self.names[0], self._read(run)[1])

    def _read(self, run: Run) -> tuple[Tensor, Tensor]:
        # What attention is called with comes first.
        own = None if self.shifted is None else self.form.own_scores(run.view, self.shifted)
        raw = run.read(self.place)
        value = self.form.scores(raw, run)
        return raw, self.form.masked(value if own is None else self.form.unshifted(value, own))


class PatternSite(Site):
    """hook_pattern: the softmax's output; a row that edited scores made undefined attends to nothing."""

    def __init__(self, layer: int, place: AnyPlace, scores: ScoresSite) -> None:
        self.layer = layer
        self.names = (f"blocks.{layer}.attn.hook_pattern",)
        self.place = place
        self.form = scores.form
        self.scores = scores
        self.after_edits_of = self.follows = scores.names

    def visit(self, run: Run) -> None:
        raw = run.read(self.place)
        value, changed = self.form.pattern(raw, run), False
        if self.layer in run.edited_scores:
            value, changed = torch.where(value.isnan(), torch.zeros_like(value), value), True
        value, edited = run.fire(self.names[0], value, live=not changed)
        if changed or edited:
            run.write(self.place, self.form.pattern_to_hf(value, raw))
            run.missing_rows[self.layer] = 1 - value.sum(-1)

    def derives_from(self, wanted: Collection[str], flow: Mapping[Event, int]) -> tuple[AnyPlace, ...]:
        is_known = isinstance(self.place, SoftmaxPlace) and self.form.plain and self.scores.shifted is None
        both = all(name in wanted for name in (*self.scores.names, *self.names))
        return (self.scores.place,) if is_known and both else ()

    def record(self, run: Run) -> None:
        if self in run.deriving:
            operation = run.view.operations[self.place.path]
            with run.view.at_call(self.place.call):
                (scores, *rest), options = operation.softmax.inputs
            source = run.sources.pop(self.scores.names[0], None)
            if source is not None and operation.called in SOFTMAXES and source.is_of(scores):
                run.keep_made(self.names[0], partial(_softmax, operation.called, tuple(rest), dict(options)), source)
                return
        run.keep_later(self.names[0], self.form.pattern(run.read(self.place), run))


def _softmax(function: Callable[..., Tensor], rest: tuple, options: dict[str, Any], scores: Tensor) -> Tensor:
    return function(scores, *rest, **options)


class SharedPatternSite(PatternSite):
    """hook_pattern where sinks have their share behind the softmax: its output, times what they leave of each row."""

    def __init__(self, layer: int, place: AnyPlace, scores: ScoresSite) -> None:
        super().__init__(layer, place, scores)
        self.also_reads = (scores.place,)

    def derives_from(self, wanted: Collection[str], flow: Mapping[Event, int]) -> tuple[AnyPlace, ...]:
        return ()

    def visit(self, run: Run) -> None:
        share, raw = self.form.share(run.read(self.scores.place), run), run.read(self.place)
        edited = self.layer in run.edited_scores
        if edited:
            raw = torch.where(raw.isnan(), torch.zeros_like(raw), raw)
        value, changed = run.fire(self.names[0], raw * share, live=False)
        if not (edited or changed):
            return
        # HuggingFace scales by what it had before an edit of the scores.
        before = run.shares.pop(self.layer, share)
        small = before.clamp(min=torch.finfo(before.dtype).tiny)
        whole = value / small
        if not edited:
            # What was not edited stays as it is to the last bit.
            shown = raw * share
            whole = torch.where(value == shown, raw + (value - shown) / small, whole)
        run.write(self.place, whole)

    def record(self, run: Run) -> None:
        share = self.form.share(run.read(self.scores.place), run)
        run.keep(self.names[0], run.read(self.place) * share)


class ZSite(Site):
    """hook_z and hook_result: the output projection's input, and what each head writes with it."""

    def __init__(self, layer: int, path: str, written: Place, upstream: tuple[str, ...]) -> None:
        self.layer = layer
        self.z, self.result = (f"blocks.{layer}.attn.hook_{name}" for name in ("z", "result"))
        self.names: tuple[str, ...] = (self.z, self.result)
        #: What the projection gives, with its bias.
        self.written = written
        self.place = Place(path, "input")
        self.after_edits_of = upstream

    def needed_for_edit(self, basis: Basis) -> bool:
        return basis.processing.moves_value_bias

    def visit(self, run: Run) -> None:
        heads = self._heads(run)
        value, changed = self._read(run, heads)
        # A map of the heads is a new tensor, and the one shown has to be kept to see what an edit changed.
        shown, mapped = value, run.basis.head_maps(self.layer) is not None
        value, edited = run.fire(self.z, shown, live=shown is heads or mapped)
        if changed or edited:
            run.write(self.place, self._write(run, heads, shown, value).flatten(-2))
        if run.listens(self.result):
            show_result(run, self.layer, self.result, self.written, value)

    def record(self, run: Run) -> None:
        if run.listens(self.result) or run.basis.head_maps(self.layer) is not None:
            self.visit(run)
            return
        heads, bias = self._heads(run), self._of_queries(run)
        # The bias may be the parameter itself, which training moves on.
        run.keep_later(self.z, heads, None if bias is None else partial(torch.sub, other=bias.clone()))

    def _heads(self, run: Run) -> Tensor:
        return run.read(self.place).unflatten(-1, (run.basis.weights.parameters.heads(self.layer).queries, -1))

    def _read(self, run: Run, heads: Tensor) -> tuple[Tensor, bool]:
        bias, maps = self._of_queries(run), run.basis.head_maps(self.layer)
        missing = run.missing_rows.get(self.layer)
        if bias is not None:
            # HF's z has (row sum) c where TransformerLens' has none, and its model adds c back in b_O whatever the sum.
            heads = heads - (bias if missing is None else (1 - missing).transpose(1, 2).unsqueeze(-1) * bias)
        if maps is not None:
            heads = _per_head(heads, maps[0].v)
        return heads, bias is not None and missing is not None

    def _write(self, run: Run, heads: Tensor, shown: Tensor, value: Tensor) -> Tensor:
        bias, maps = self._of_queries(run), run.basis.head_maps(self.layer)
        if maps is not None:
            missing = run.missing_rows.get(self.layer)
            if bias is not None and missing is not None:
                heads = heads + missing.transpose(1, 2).unsqueeze(-1) * bias
            return _moved(heads, shown, value, maps[1].v)
        return value if bias is None else value + bias

    def _of_queries(self, run: Run) -> Tensor | None:
        """The value bias of each query head."""
        bias, heads = run.value_bias(self.layer), run.basis.weights.parameters.heads(self.layer)
        times = heads.queries // heads.key_values
        return bias if bias is None or times == 1 else bias.repeat_interleave(times, dim=0)


class HeadsSite(Site):
    """hook_z or hook_v where something stands between these and their projections: what the attention call returns, or
    what a module makes of the values.
    """

    def __init__(self, layer: int, letter: str, place: Place | ResultPlace) -> None:
        self.layer = layer
        self.letter = letter
        self.names = (f"blocks.{layer}.attn.hook_{letter}",)
        self.place = place

    def visit(self, run: Run) -> None:
        raw, there = run.read(self.place), run.basis.weights.parameters.heads(self.layer)
        count = there.key_values if self.letter == "v" else there.queries
        heads = raw if raw.dim() == 4 else raw.unflatten(-1, (count, -1))
        value, changed = run.fire(self.names[0], heads, live=True)
        if changed:
            run.write(self.place, value if raw.dim() == 4 else value.flatten(-2))

    def record(self, run: Run) -> None:
        self.visit(run)


class ResultSite(Site):
    """hook_result where hook_z is elsewhere: what each head writes with what the output projection is given."""

    def __init__(self, layer: int, path: str, written: Place) -> None:
        self.layer = layer
        self.written = written
        self.names = (f"blocks.{layer}.attn.hook_result",)
        self.place = Place(path, "input")

    def visit(self, run: Run) -> None:
        queries = run.basis.weights.parameters.heads(self.layer).queries
        heads = run.read(self.place).unflatten(-1, (queries, -1))
        show_result(run, self.layer, self.names[0], self.written, heads)


def show_result(run: Run, layer: int, name: str, written: Place, heads: Tensor) -> None:
    """Show what each head writes, and put an edit of it in as ``written``, the output of the projection."""
    weights = run.basis.weights.attention_output(layer)
    result = torch.einsum("bphd,hdm->bphm", heads, weights["W_O"])
    result, changed = run.fire(name, result, live=False)
    if changed:
        output = result.sum(-2) + weights["b_O"]
        run.write(written, output)
        run.stream.branch_written(output)


def _moved(heads: Tensor, shown: Tensor, value: Tensor, back: Tensor) -> Tensor:
    """``heads`` changed by what has changed in the mapped value, so that what the map cannot see stays as it is."""
    return heads + _per_head(value - shown, back)


def _per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """``x`` [batch, pos, head, d_head] times a matrix per head."""
    return torch.einsum("bphd,hde->bphe", x, matrices)
