"""What does ``lensbridge hooks`` print?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.text import Text

from lensbridge import __version__
from lensbridge.errors import UnknownPointError, near_misses
from lensbridge.listing.rows import Absent, Row, absent_of, grouped_by_kind, ranges, rows_of
from lensbridge.listing.structure import structure_of

#: What the format of ``--json`` is called; it changes with the format.
SCHEMA = "lensbridge-hooks/1"
DESCRIPTION = """\
Lists the hook points of a model: shape, meaning, where each is in the HuggingFace model, and the flag that turns it on.
Of a checkpoint only the config is read where its family has a record; of a family (gemma2) or a HuggingFace class a
tiny random copy is made."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("model", help="model name, hub id, directory, family or HuggingFace class")
    parser.add_argument("--filter", metavar="GLOB", help="only names that fit, as '*hook_q' or 'blocks.0.attn.*'")
    parser.add_argument("--layer", type=int, metavar="N", help="only points of this layer, with their own names")
    parser.add_argument("--absent", action="store_true", help="list the points that the model does not have, and why")
    parser.add_argument("--json", action="store_true", help="print JSON, a point an entry")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 on success."""
    model = structure_of(args.model)
    rows, absent = chosen(model, args.filter, args.layer, args.absent)
    console = Console()
    if args.json:
        print(json.dumps(as_json(model, args.model, rows, absent), indent=1))
    elif args.absent:
        print_absent(absent, model.cfg.n_layers, console)
    else:
        print_rows(model, args.model, rows, args.layer is not None, console)
    return 0


def chosen(
    model: Any, pattern: str | None = None, layer: int | None = None, only_absent: bool = False
) -> tuple[list[Row], list[Absent]]:
    """The points of a model that fit a pattern and are in a layer, and the kinds that it does not have.

    Raises:
        UnknownPointError: if there is no such layer, or no such point.
    """
    if layer is not None and not 0 <= layer < model.cfg.n_layers:
        raise UnknownPointError(f"there is no layer {layer}: the model has {model.cfg.n_layers}, counted from 0")
    every = rows_of(model)
    rows = [
        row
        for row in every
        if (layer is None or row.layer == layer) and (pattern is None or fits(pattern, row.name, row.kind))
    ]
    absent = [
        each
        for each in absent_of(model)
        if (layer is None or layer in each.layers) and (pattern is None or fits(pattern, each.kind))
    ]
    if not rows and not (absent and only_absent):
        known = dict.fromkeys(name for row in every for name in (row.name.rpartition(".")[2], row.kind, row.name))
        why = f" It is absent: {absent[0].reason}." if absent else near_misses(str(pattern), known)
        raise UnknownPointError(f"no hook point of this model fits {pattern!r}.{why}")
    return rows, absent


def fits(pattern: str, *names: str) -> bool:
    """Whether one of the names fits a glob; a pattern without wildcards fits what ends with it."""
    plain = not any(sign in pattern for sign in "*?[")
    return any(fnmatchcase(name, f"*{pattern}" if plain else pattern) for name in names)


def as_json(model: Any, name: str, rows: Sequence[Row], absent: Sequence[Absent]) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "schema": SCHEMA,
        "lensbridge": __version__,
        "model": name,
        "hf_class": type(model.hf_model).__name__,
        "n_layers": model.cfg.n_layers,
        "points": [row.as_json() for row in rows],
        "absent": [{"kind": each.kind, "layers": list(each.layers), "reason": each.reason} for each in absent],
    }


def print_rows(model: Any, name: str, rows: Sequence[Row], single: bool, console: Console) -> None:
    """Three lines for each kind of point, or for each point if ``single``."""
    groups = [(row, [row]) for row in rows] if single else grouped_by_kind(rows)
    kinds = len({row.kind for row in rows})
    title = f"{name}: {type(model.hf_model).__name__}, {model.cfg.n_layers} layers, {len(rows)} points of {kinds} kinds"
    console.print(Text(title, style="bold"), soft_wrap=True)
    for row, group in groups:
        head = Text(row.name, style="cyan")
        layers = [each.layer for each in group if each.layer is not None]
        if len(group) > 1 and set(layers) != set(range(model.cfg.n_layers)):
            head.append(f"  layers {ranges(set(layers))}", style="dim")
        head.append(f"  {row.shape}  [{', '.join(map(str, row.sizes))}]")
        if row.setter is not None:
            head.append(f"  {'on' if row.on else 'off'}: model.{row.setter}(True)", style="yellow")
        console.print(head, soft_wrap=True)
        for line in (row.meaning, row.where):
            console.print(Text(f"    {line}", style="" if line is row.meaning else "dim"), soft_wrap=True)


def print_absent(absent: Sequence[Absent], n_layers: int, console: Console) -> None:
    """A line for each kind of point that is absent somewhere."""
    if not absent:
        console.print("The model has every point of the table.")
    for each in absent:
        line = Text(each.kind, style="cyan")
        if each.layers and len(each.layers) < n_layers:
            line.append(f"  layers {ranges(each.layers)}", style="dim")
        line.append(f"  {each.reason}")
        console.print(line, soft_wrap=True)
