"""How is a table of numbers drawn as a heat map in a page that loads nothing?

As a real HTML table whose cells carry one custom property, the strength of their colour; the style sheet mixes that
much of the pole's colour into the neutral one. So the same markup is right in light and dark mode, the labels stay
selectable text, and a screen reader finds rows, columns and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

import torch
from jaxtyping import Float

from lensbridge.demo.formats import percent, plain

#: ``signed``: blue above zero, red below, neutral at zero. ``score``: from neutral at zero to one colour.
Kind = Literal["signed", "score"]

#: By default, wider tables show their numbers in the tooltip only.
WIDEST_WITH_NUMBERS = 20
#: From this strength on the colour is so dark (in light mode) that the number is written in white.
STRONG = 0.55
#: Where no head writes more than this to the logits, colours stay pale: full ones would make noise look like a
#: finding.
FAINT_NATS = 0.25


def heat_map(
    table: Float[torch.Tensor, "row column"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    caption: str,
    kind: Kind,
    limit: float | None = None,
    show: Callable[[float], str] = plain,
    upright: bool = False,
    widest: int = WIDEST_WITH_NUMBERS,
) -> str:
    """One ``<figure>`` with caption, table and legend.

    Colour is proportional to the value and full at ``limit``, by default the largest absolute value. ``show`` writes a
    value in cells, tooltips and legend. ``upright`` turns long column labels. A table of more than ``widest`` columns
    shows its numbers in tooltips only.

    Raises:
        ValueError: if the labels do not fit the table.
    """
    if table.shape != (len(row_labels), len(column_labels)):
        raise ValueError(
            f"heat_map got a table of shape {tuple(table.shape)} with {len(row_labels)} row labels and "
            f"{len(column_labels)} column labels; there must be one label for each row and each column."
        )
    full = limit if limit is not None else largest(table)
    dense = len(column_labels) > widest
    classes = " ".join(["heat", *(["dense"] if dense else []), *(["upright"] if upright else [])])
    header = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in column_labels)
    rows = [
        f'<tr><th scope="row">{escape(row_label)}</th>'
        + "".join(
            _cell(value, full, kind, show, f"{row_label}, {column_label}")
            for value, column_label in zip(values, column_labels, strict=True)
        )
        + "</tr>"
        for values, row_label in zip(table.tolist(), row_labels, strict=True)
    ]
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll"><table class="{classes}">'
        f"<thead><tr><td></td>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{_legend(full, kind, show)}</figure>"
    )


def largest(table: torch.Tensor) -> float:
    """The largest absolute value that is a number; 1 where there is none, so that it can be divided by."""
    finite = table[table.isfinite()]
    return float(finite.abs().max()) if finite.numel() and bool(finite.any()) else 1.0


def _cell(value: float, full: float, kind: Kind, show: Callable[[float], str], where: str) -> str:
    if math.isnan(value):
        return f'<td class="nan" data-tip="{escape(where)}: not measured">-</td>'
    strength = min(1.0, abs(value) / full)
    colour = "score" if kind == "score" else "pos" if value >= 0 else "neg"
    strong = " strong" if strength >= STRONG else ""
    tip = escape(f"{where}: {show(value)}")
    return f'<td class="{colour}{strong}" style="--t:{percent(strength)}" data-tip="{tip}">{escape(show(value))}</td>'


def _legend(full: float, kind: Kind, show: Callable[[float], str]) -> str:
    marks = [-full, 0.0, full] if kind == "signed" else [0.0, full]
    labels = "".join(f"<span>{escape(show(mark))}</span>" for mark in marks)
    return f'<div class="legend" aria-hidden="true"><i class="ramp {kind}"></i><div>{labels}</div></div>'
