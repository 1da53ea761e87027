"""How is a record written down as the Python source of a family's file?"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from ..architectures.record import PARTS as FUSED_IN_PARTS
from ..architectures.record import Architecture, Block, Layout, Refusal
from ..points import POINTS
from .store import said

WIDTH = 120
TO_SAY = "measured; say here in a line each what is special about the family"
#: Parts that the records have a name for.
NAMED = {repr(Layout("key-value heads")): "GROUPS", repr(FUSED_IN_PARTS): "PARTS"}


def write_record(record: Architecture) -> str:
    """The source of a file that defines the record, as those in ``lensbridge/architectures`` are.

    What is refused is left out where the record itself says that there is no such point.
    """
    record = _lean(record)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"For[A-Z]\w*$|LMHeadModel$", "", record.hf_class)).upper()
    body = f"{name} = {_source(record, 0, len(name) + 3)}\n"
    parts = ("Block", "Softmax", "Layout", "GROUPS", "Refusal")
    imports = _imports(["Architecture", *(each for each in parts if re.search(rf"\b{each}\b", body))])
    return f'"""{record.hf_class} (name its paper).\n\n- {TO_SAY}\n"""\n\n{imports}\n{body}'


def _imports(names: list[str]) -> str:
    forms = sorted({"Softmax", "Layout", "GROUPS", "Refusal"} & set(names))
    records = sorted({"Architecture", "Block"} & set(names))
    lines = [f"from .forms import {', '.join(forms)}"] if forms else []
    return "\n".join([*lines, f"from .record import {', '.join(records)}"]) + "\n"


def _lean(record: Architecture) -> Architecture:
    """The record without one model's blocks, where its kinds of layers give them, and without needless refusals."""
    plain = replace(record, block=_without(record.block), blocks=tuple(map(_without, record.blocks)))
    kinds = {path: _lean_change(record.block, change) for path, change in record.kinds.items()}
    plain = replace(plain, kinds=kinds)
    told = kinds or plain.by_layer or len(set(map(repr, record.blocks))) == 1
    return replace(plain, blocks=()) if told else plain


def _without(block: Block) -> Block:
    return replace(block, refusals=_needed(block, block.refusals))


def _needed(block: Block, refusals: tuple[Refusal, ...]) -> tuple[Refusal, ...]:
    """The refusals of points that would be there otherwise."""
    features = block.features
    there = {row.name.removeprefix("blocks.{l}.") for row in POINTS if row.in_layer and row.exists_with(features)}
    kept = [(tuple(point for point in each.points if point in there), each.reason) for each in refusals]
    return tuple(Refusal(points, reason) for points, reason in kept if points)


def _lean_change(base: Block, change: Mapping[str, Any]) -> dict[str, Any]:
    if "refusals" not in change:
        return dict(change)
    needed = _needed(replace(base, **change), change["refusals"])
    rest = {role: value for role, value in change.items() if role != "refusals"}
    return rest | ({"refusals": needed} if needed or _needed(base, base.refusals) else {})


def _source(value: Any, indent: int, start: int) -> str:
    """The source of a value that begins in column ``start`` of a line that is indented by ``indent``."""
    if repr(value) in NAMED:
        return NAMED[repr(value)]
    if is_dataclass(value):
        items = [(f"{name}=", each) for name, each in said(value).items()]
        return _wrapped(f"{type(value).__name__}(", items, ")", indent, start)
    if isinstance(value, Mapping):
        return _wrapped("{", [(f"{_source(key, 0, 0)}: ", each) for key, each in value.items()], "}", indent, start)
    if isinstance(value, tuple | list):
        return _wrapped("(", [("", each) for each in value], ",)" if len(value) == 1 else ")", indent, start)
    return _text(value, indent, start) if isinstance(value, str) else repr(value)


def _text(text: str, indent: int, start: int) -> str:
    """A string; one too long for its line in parentheses, in pieces."""
    if start + len(_quoted(text)) < WIDTH:
        return _quoted(text)
    inner = " " * (indent + 4)
    # With the space that follows each piece but the last.
    pieces = textwrap.wrap(text, WIDTH - len(inner) - 8, break_long_words=False, break_on_hyphens=False)
    lines = [_quoted(f"{piece} ") for piece in pieces[:-1]] + [_quoted(pieces[-1])]
    return "(\n" + "".join(f"{inner}{line}\n" for line in lines) + " " * indent + ")"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _wrapped(opening: str, items: list[tuple[str, Any]], closing: str, indent: int, start: int) -> str:
    """On one line if that is short enough, else with one item a line."""
    inline = opening + ", ".join(lead + _source(each, 0, -10_000) for lead, each in items) + closing
    if start + len(inline) < WIDTH:
        return inline
    inner = indent + 4
    lines = [f"{' ' * inner}{lead}{_source(each, inner, inner + len(lead))},\n" for lead, each in items]
    return f"{opening}\n{''.join(lines)}{' ' * indent}{closing.lstrip(',')}"
