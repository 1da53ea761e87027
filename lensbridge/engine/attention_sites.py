"""What happens to attention's values when the forward pass reaches them?

Queries, keys and values are slices of one fused output here, the norm before them serves three readers, and the value
bias that processing moves away has to come back where a pattern was edited: hence the sites of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..basis import Basis
from .places import Place, SoftmaxPlace
from .sites import Run, Site, fire_norm, normalise

LETTERS = ("q", "k", "v")


class AttentionInputSite(Site):
    """hook_attn_in, hook_{q,k,v}_input and ln1, whose output the three projections read.

    As in TransformerLens, the norm's points fire once for each projection, and an edit at one of these firings reaches
    that projection only. Caches are filled once: they would keep the last firing, and it equals the others.
    """

    def __init__(self, layer: int, place: Place, path: str, eps: float) -> None:
        self.layer = layer
        block = f"blocks.{layer}"
        self.prefix = f"{block}.ln1"
        self.attn_in = f"{block}.hook_attn_in"
        self.split = {letter: f"{block}.hook_{letter}_input" for letter in LETTERS}
        self.norm_names = (f"{self.prefix}.hook_scale", f"{self.prefix}.hook_normalized")
        self.names = (self.attn_in, *self.split.values(), *self.norm_names)
        self.path = path
        self.eps = eps
        self.place = place
        self.writes_at = (path,)

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        inputs, changed = self._inputs(run, x)
        if not any(run.listens(name) for name in self.norm_names) and not changed:
            return
        if not changed and not any(run.edits(name) for name in self.norm_names):
            self._show_norm(run, inputs["q"])
            return
        outputs: dict[str, Tensor] = {}
        for letter in LETTERS:
            normalized, norm_changed = fire_norm(run, self.prefix, inputs[letter], self.eps)
            if norm_changed or letter in changed:
                outputs[letter] = run.basis.norm_output_to_hf(normalized, self.path)
        self._hand_over(run, outputs)

    def _inputs(self, run: Run, x: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """What the norm reads for q, k and v, and which of these a hook has changed."""
        if not (run.cfg.use_attn_in or run.cfg.use_split_qkv_input):
            return dict.fromkeys(LETTERS, x), set()
        per_head = run.stream.read(x).unsqueeze(-2).expand(*x.shape[:-1], run.cfg.n_heads, x.shape[-1])
        inputs, changed = dict.fromkeys(LETTERS, per_head), set()
        if run.cfg.use_attn_in:
            shared, was_changed = run.fire(self.attn_in, per_head, live=True)
            if was_changed and not run.cfg.use_split_qkv_input:
                inputs, changed = dict.fromkeys(LETTERS, shared), set(LETTERS)
        if run.cfg.use_split_qkv_input:
            for letter, name in self.split.items():
                inputs[letter], was_changed = run.fire(name, inputs[letter], live=True)
                changed |= {letter} if was_changed else set()
        return inputs, changed

    def _show_norm(self, run: Run, x: Tensor) -> None:
        """Fill caches: the norm of one head's copy of the input is the norm of all."""
        if x.dim() == 3:
            fire_norm(run, self.prefix, x, self.eps, quick=True)
            return
        centred, scale = normalise(x[..., 0, :], self.eps)
        for name, value in zip(self.norm_names, (scale, centred / scale), strict=True):
            run.fire(name, value.unsqueeze(-2).expand(*x.shape[:-1], value.shape[-1]), live=True)

    def _hand_over(self, run: Run, outputs: dict[str, Tensor]) -> None:
        """Give changed norm outputs to their projections: through HF's norm if all three agree, else one by one."""
        same = len(outputs) == 3 and all(value.dim() == 3 for value in outputs.values())
        if same and not outputs["q"].requires_grad and all(torch.equal(outputs["q"], o) for o in outputs.values()):
            run.write(Place(self.path, "output"), outputs["q"])
            return
        run.inputs |= {(self.layer, letter): value for letter, value in outputs.items()}


class QKVSite(Site):
    """hook_q, hook_k and hook_v: the slices of the fused projection."""

    def __init__(self, layer: int, path: str, inputs: AttentionInputSite) -> None:
        self.layer = layer
        self.names = tuple(f"blocks.{layer}.attn.hook_{letter}" for letter in LETTERS)
        self.place = Place(path, "output")
        self.after_edits_of = inputs.names

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        heads = x.unflatten(-1, (3, run.cfg.n_heads, run.cfg.d_head))
        parts, any_changed = [], False
        for index, (letter, name) in enumerate(zip(LETTERS, self.names, strict=True)):
            part = heads[..., index, :, :]
            changed = (self.layer, letter) in run.inputs
            if changed:
                part = self._project(run, letter, run.inputs.pop((self.layer, letter)))
            if run.listens(name):
                shown = self._read(run, letter, part)
                # What an edit changed is the difference to what was shown, where the heads are mapped.
                mapped = run.basis.head_maps(self.layer) is not None
                value, edited = run.fire(name, shown, live=shown is part or mapped)
                if edited:
                    part, changed = self._write(run, letter, part, shown, value), True
            parts.append(part)
            any_changed |= changed
        if any_changed:
            run.write(self.place, torch.stack(parts, dim=-3).flatten(-3))

    def _project(self, run: Run, letter: str, norm_output: Tensor) -> Tensor:
        weight, bias = run.basis.weights.projection(self.layer, letter.upper())
        equation = "bpm,hmd->bphd" if norm_output.dim() == 3 else "bphm,hmd->bphd"
        return torch.einsum(equation, norm_output, weight) + bias

    def _read(self, run: Run, letter: str, part: Tensor) -> Tensor:
        bias = run.value_bias(self.layer) if letter == "v" else None
        if bias is not None:
            part = part - bias
        maps = run.basis.head_maps(self.layer)
        return part if maps is None else _per_head(part, getattr(maps[0], letter))

    def _write(self, run: Run, letter: str, part: Tensor, shown: Tensor, value: Tensor) -> Tensor:
        maps = run.basis.head_maps(self.layer)
        if maps is not None:
            return _moved(part, shown, value, getattr(maps[1], letter))
        bias = run.value_bias(self.layer) if letter == "v" else None
        return value if bias is None else value + bias


class ScoresSite(Site):
    """hook_attn_scores: the softmax's input, with masked entries at -inf instead of HF's smallest finite number."""

    def __init__(self, layer: int, place: SoftmaxPlace) -> None:
        self.layer = layer
        self.names = (f"blocks.{layer}.attn.hook_attn_scores",)
        self.place = place

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        value = x.masked_fill(x < torch.finfo(x.dtype).min / 2, -torch.inf)
        value, changed = run.fire(self.names[0], value, live=False)
        if changed:
            run.write(self.place, value)
            run.edited_scores.add(self.layer)


class PatternSite(Site):
    """hook_pattern: the softmax's output; a row that edited scores made undefined attends to nothing."""

    def __init__(self, layer: int, place: SoftmaxPlace, scores: ScoresSite) -> None:
        self.layer = layer
        self.names = (f"blocks.{layer}.attn.hook_pattern",)
        self.place = place
        self.after_edits_of = scores.names

    def visit(self, run: Run) -> None:
        value, changed = run.read(self.place), False
        if self.layer in run.edited_scores:
            value, changed = torch.where(value.isnan(), torch.zeros_like(value), value), True
        value, edited = run.fire(self.names[0], value, live=not changed)
        if changed or edited:
            run.write(self.place, value)
            run.missing_rows[self.layer] = 1 - value.sum(-1)


class ZSite(Site):
    """hook_z and hook_result: the output projection's input, and what each head writes with it."""

    def __init__(self, layer: int, path: str, upstream: tuple[str, ...]) -> None:
        self.layer = layer
        self.z, self.result = (f"blocks.{layer}.attn.hook_{name}" for name in ("z", "result"))
        self.names = (self.z, self.result)
        self.path = path
        self.place = Place(path, "input")
        self.after_edits_of = upstream

    def needed_for_edit(self, basis: Basis) -> bool:
        return basis.processing.moves_value_bias

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        heads = x.unflatten(-1, (run.cfg.n_heads, run.cfg.d_head))
        value, changed = self._read(run, heads)
        # A map of the heads is a new tensor, and the one shown has to be kept to see what an edit changed.
        shown, mapped = value, run.basis.head_maps(self.layer) is not None
        value, edited = run.fire(self.z, shown, live=shown is heads or mapped)
        if changed or edited:
            run.write(self.place, self._write(run, heads, shown, value).flatten(-2))
        if run.listens(self.result):
            self._visit_result(run, value)

    def _read(self, run: Run, heads: Tensor) -> tuple[Tensor, bool]:
        bias, maps = run.value_bias(self.layer), run.basis.head_maps(self.layer)
        missing = run.missing_rows.get(self.layer)
        if bias is not None:
            # HF's z has (row sum) c where TransformerLens' has none, and its model adds c back in b_O whatever the sum.
            present = 1 if missing is None else (1 - missing).transpose(1, 2).unsqueeze(-1)
            heads = heads - present * bias
        if maps is not None:
            heads = _per_head(heads, maps[0].v)
        return heads, bias is not None and missing is not None

    def _write(self, run: Run, heads: Tensor, shown: Tensor, value: Tensor) -> Tensor:
        bias, maps = run.value_bias(self.layer), run.basis.head_maps(self.layer)
        if maps is not None:
            missing = run.missing_rows.get(self.layer)
            if bias is not None and missing is not None:
                heads = heads + missing.transpose(1, 2).unsqueeze(-1) * bias
            return _moved(heads, shown, value, maps[1].v)
        return value if bias is None else value + bias

    def _visit_result(self, run: Run, z: Tensor) -> None:
        weights = run.basis.weights.attention_output(self.layer)
        result = torch.einsum("bphd,hdm->bphm", z, weights["W_O"])
        result, changed = run.fire(self.result, result, live=False)
        if changed:
            output = result.sum(-2) + weights["b_O"]
            run.write(Place(self.path, "output"), output)
            run.stream.branch_written(output)


def _moved(heads: Tensor, shown: Tensor, value: Tensor, back: Tensor) -> Tensor:
    """``heads`` changed by what has changed in the mapped value, so that what the map cannot see stays as it is."""
    return heads + _per_head(value - shown, back)


def _per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """``x`` [batch, pos, head, d_head] times a matrix per head."""
    return torch.einsum("bphd,hde->bphe", x, matrices)
