"""What is there to say of each hook point of a model?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..checking.baseline import ONE_COPY_EACH
from ..checking.shapes import HEAD_AXES, heads_axis, width_of
from ..checking.subject import Subject
from ..points import FLAG_SETTERS, POINTS, Point, layer_of, point_of, template
from .places import places_of

Sizes = tuple[str | int, ...]
#: The number of a layer, in a path.
_NUMBER = re.compile(r"(?<=\.)\d+(?=[. )]|$)")


@dataclass(frozen=True)
class Row:
    """One hook point: its shape in words, with the model's sizes, what it means and where it is.

    ``flag`` turns it on, by the method ``setter``; ``on`` is whether it is on now.
    """

    name: str
    kind: str
    layer: int | None
    shape: str
    sizes: Sizes
    meaning: str
    where: str
    flag: str | None
    setter: str | None
    on: bool

    def as_json(self) -> dict[str, Any]:
        """The row for a file."""
        return {**asdict(self), "sizes": list(self.sizes)}


@dataclass(frozen=True)
class Absent:
    """A kind of point that some layers, or all, do not have, and why; ``layers`` is empty around the layers."""

    kind: str
    layers: tuple[int, ...]
    reason: str


def names_of(model: Any) -> tuple[str, ...]:
    """The names of a model's points; those of a model of our own are its modules."""
    return model.interior.points() or tuple(model.hook_dict)


def rows_of(model: Any) -> list[Row]:
    """Every point of a model, in TransformerLens' order."""
    interior, missing = model.interior, {each.kind for each in absent_of(model) if each.reason == ONE_COPY_EACH}
    places = places_of(model) if hasattr(interior, "architecture") else {}
    subject = Subject(model) if places else None
    found = []
    for name in names_of(model):
        point = point_of(name)
        if point is None:
            found.append(_unlisted(name))
        elif point.name not in missing:
            sizes = tuple(point.shape.split()) if subject is None else sizes_of(subject, name, point)
            where = places.get(name, "a module of the same name")
            setter = FLAG_SETTERS.get(point.flag or "")
            on = point.flag is None or bool(getattr(model.cfg, point.flag))
            found.append(
                Row(
                    name, point.name, layer_of(name), point.shape, sizes, _meaning(name, point, model), where,
                    point.flag, setter, on,
                )
            )  # fmt: skip
    return found


def _unlisted(name: str) -> Row:
    """A point that only a model of our own has."""
    return Row(name, template(name), layer_of(name), "", (), "", "a module of the same name", None, None, True)


def _meaning(name: str, point: Point, model: Any) -> str:
    """What a point means on this model.

    Where the table has several rows of its name, that of the one which the model has; and the mean is taken out by
    LayerNorms only.
    """
    architecture = getattr(model.interior, "architecture", None)
    if architecture is None:
        return point.meaning
    layer = layer_of(name)
    features = architecture.features if layer is None else architecture.blocks[layer].features
    rows = [row for row in POINTS if row.name == point.name and row.exists_with(features)]
    meaning = rows[0].meaning if rows else point.meaning
    if not name.endswith((".hook_scale", ".hook_normalized")):
        return meaning
    norm = model.interior.engine.norms[model.mod_dict[name.rpartition(".")[0]].path]
    return meaning if norm.centred else meaning.replace("(x - mean x)^2", "x^2").replace("(x - mean x)", "x")


def sizes_of(subject: Subject, name: str, point: Point) -> Sizes:
    """The shape of a point with the model's sizes; what depends on the input, or is not known, stays a word."""
    return tuple(_size(subject, name, axis) for axis in point.shape.split())


def _size(subject: Subject, name: str, axis: str) -> str | int:
    cfg = subject.model.cfg
    if axis in HEAD_AXES:
        return heads_axis(subject, name, axis) or axis
    found = {
        "d_model": lambda: width_of(subject, name),
        "d_vocab": lambda: cfg.d_vocab_out,
        "expert": lambda: cfg.num_experts,
        "chosen": lambda: cfg.experts_per_token,
        "d_mlp": lambda: _width_of_mlp(subject, name),
        "1": lambda: 1,
    }.get(axis)
    return axis if found is None else found() or axis


def _width_of_mlp(subject: Subject, name: str) -> int | None:
    """How many neurons an MLP has, or an expert (whose weights lie [out, in])."""
    prefix, shape = name.rpartition(".")[0].removesuffix(".ln"), subject.model.interior.weights.shape
    found = [weight for weight in (f"{prefix}.W_out", f"{prefix}.W_in.weight") if weight in subject.weight_names]
    return shape(found[0])[0] if found else None


def absent_of(model: Any) -> list[Absent]:
    """The kinds of points that the model does not have, in TransformerLens' order."""
    interior, there, found = model.interior, set(names_of(model)), dict[tuple[str, str], list[int]]()
    grouped = model.cfg.n_key_value_heads is not None
    for kind in dict.fromkeys(point.name for point in POINTS):
        for layer in range(model.cfg.n_layers) if "{l}" in kind else (None,):
            name = kind.replace("{l}", str(layer)).replace("{e}", "0")
            reason = interior.why_absent(name) if name not in there else None
            if name in there and grouped and kind.endswith("hook_attn_in"):
                reason = ONE_COPY_EACH
            if reason is not None:
                found.setdefault((kind, reason), []).extend(() if layer is None else (layer,))
    return [Absent(kind, tuple(layers), reason) for (kind, reason), layers in found.items()]


def ranges(layers: Iterable[int]) -> str:
    """Numbers in words: ``0-3, 5``."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def grouped_by_kind(rows: Iterable[Row]) -> list[tuple[Row, list[Row]]]:
    """Points that differ in their layer (or expert) only: one that stands for them, with ``{l}``, and all of them."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.sizes, row.meaning, row.flag, _general(row)), []).append(row)
    # Layers of one model may be of several kinds, whose points come in the table's order all the same.
    inside = sorted((group for group in groups.values() if group[0].layer is not None), key=_rank)
    first = next((index for index, group in enumerate(groups.values()) if group[0].layer is not None), 0)
    around = [group for group in groups.values() if group[0].layer is None]
    return [(_standing_for(group), group) for group in (*around[:first], *inside, *around[first:])]


def _rank(group: list[Row]) -> int:
    return next((index for index, point in enumerate(POINTS) if point.name == group[0].kind), len(POINTS))


def _general(row: Row) -> str:
    """Where a point is, by its place in any layer; HuggingFace's number of a layer may be another than ours."""
    return row.where if row.layer is None else _NUMBER.sub("{l}", row.where, count=1)


def _standing_for(group: list[Row]) -> Row:
    first = group[0]
    if len(group) == 1:
        return first
    return Row(**{**asdict(first), "name": first.kind, "layer": None, "sizes": first.sizes, "where": _general(first)})
