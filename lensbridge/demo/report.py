"""How are the results shown in a terminal?

One panel of words for each analysis, then its numbers as tables. A coloured cell sets both its ground and its ink, so
it can be read on dark and light terminals; tables too wide for the terminal are cut to their strongest rows, never
wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lensbridge.demo.analyses import DemoResult
from lensbridge.demo.formats import percent, plain, signed
from lensbridge.demo.heads import Head, ranked_heads, score_of
from lensbridge.demo.heatmap import FAINT_NATS, largest
from lensbridge.demo.induction import InductionResult
from lensbridge.demo.ioi import IoiResult
from lensbridge.demo.patching_sweep import SweepResult
from lensbridge.demo.words import Words, all_words

#: Title of a column, and how its entry is found for a head.
Column = tuple[str, Callable[[Head], str]]

BLUE, RED, NEUTRAL = (33, 102, 172), (178, 24, 43), (235, 235, 235)
BORDERS = {"clear": "green", "partial": "yellow", "none": "red"}
#: A map of more layers would fill the screen, so the strongest heads are listed instead.
TALLEST = 16
#: Rows of a list of heads.
LISTED = 6


def print_report(result: DemoResult, console: Console) -> None:
    """Print everything that was found, in the order in which it was measured."""
    about = result.about
    console.print(
        f"[bold]{escape(about.model)}[/]: {about.n_layers} layers of {about.n_heads} heads, d_model {about.d_model}, "
        f"{about.n_parameters:,} parameters, {about.dtype} on {about.device}; measured in {about.seconds:.1f} s"
    )
    words = all_words(result)
    console.print(_section("1. Induction", words["induction"]))
    for table in induction_tables(result.induction, console.width):
        console.print(table)
    if result.ioi is not None:
        console.print(_section("2. Indirect objects", words["ioi"]))
        for table in ioi_tables(result.ioi, console.width):
            console.print(table)
    if result.sweep is not None:
        console.print(_section("3. Activation patching", words["sweep"]))
        for table in sweep_tables(result.sweep, console.width):
            console.print(table)
    if result.left_out:
        console.print(Panel(escape(result.left_out), title="Left out", border_style="yellow", title_align="left"))


def induction_tables(result: InductionResult, width: int) -> list[RenderableType]:
    """Induction score by head, and what silencing heads does."""
    scores, unablated = result.scores, result.second_loss
    by_head = head_map("Induction score by head", scores.induction, width, plain, full=1.0)
    if by_head is None:
        by_head = _head_list(
            "Strongest heads",
            ranked_heads(scores.induction, LISTED),
            [
                ("induction", lambda head: f"{score_of(scores.induction, head):.2f}"),
                ("previous token", lambda head: f"{score_of(scores.previous_token, head):.2f}"),
                ("duplicate token", lambda head: f"{score_of(scores.duplicate_token, head):.2f}"),
            ],
        )
    ablations = Table("silenced", "loss of second copy", "change")
    ablations.add_row("nothing", f"{unablated:.3f}", "")
    for part in result.ablations:
        ablations.add_row(", ".join(map(str, part.heads)), f"{part.loss:.3f}", f"{part.loss - unablated:+.3f}")
        if part.controls:
            what = f"{len(part.controls[0])} at random, {len(part.controls)} draws"
            ablations.add_row(what, f"{part.control_loss:.3f}", f"{part.control_loss - unablated:+.3f}")
    return [by_head, _titled("Silencing heads (nats per token)", ablations)]


def ioi_tables(result: IoiResult, width: int) -> list[RenderableType]:
    """Direct logit attribution by head, and whom the heads that matter look at."""
    limit = max(FAINT_NATS, largest(result.head_attribution))
    by_head = head_map("Direct logit attribution by head (nats)", result.head_attribution, width, signed, limit)

    def looks_at(role: int) -> Callable[[Head], str]:
        return lambda head: plain(float(result.attention[head][role]))

    columns: list[Column] = [
        ("writes", lambda head: signed(score_of(result.head_attribution, head))),
        *((f"looks at {role}", looks_at(number)) for number, role in enumerate(("IO", "S1", "S2"))),
    ]
    heads = [*result.writers, *[head for head in result.opponents[::-1] if head not in result.writers]]
    listed = _head_list("Heads that write for (+) and against (-) the indirect object", heads, columns)
    return [listed] if by_head is None else [by_head, listed]


def sweep_tables(result: SweepResult, width: int) -> list[RenderableType]:
    """The part of the answer brought back, by layer and position and by head."""
    if not result.meaningful:
        return []
    first = result.giver_position
    title = "Part of the answer brought back by patching the residual stream"
    by_position = heat_table(
        title,
        result.resid[:, first:],
        result.resid_labels,
        result.position_labels[first:],
        percent,
        width,
    ) or Text(f"{title}: too wide for this terminal, see the page", style="dim")
    by_head = head_map("Part of the answer brought back by patching one head", result.heads, width, percent)
    if by_head is None:
        part: Column = ("part", lambda head: percent(score_of(result.heads, head)))
        by_head = _head_list("Heads that bring back most", result.carriers, [part])
    return [by_position, by_head]


def head_map(
    title: str, table: torch.Tensor, width: int, show: Callable[[float], str], full: float | None = None
) -> RenderableType | None:
    """A ``[layer, head]`` table in colour, or None where it would not fit."""
    if table.shape[0] > TALLEST:
        return None
    layers = [f"layer {number}" for number in range(table.shape[0])]
    heads = [f"H{number}" for number in range(table.shape[1])]
    return heat_table(title, table, layers, heads, show, width, full)


def heat_table(
    title: str,
    table: torch.Tensor,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    show: Callable[[float], str],
    width: int,
    full: float | None = None,
) -> RenderableType | None:
    """A table in colour, blue above zero and red below, or None where it would not fit into ``width`` characters."""
    cells = [[show(value) for value in row] for row in table.tolist()]
    widths = [max(map(len, column)) for column in zip(column_labels, *cells, strict=True)]
    if max(map(len, row_labels)) + sum(size + 2 for size in widths) + 4 > width:
        return None
    drawn = Table(box=None, padding=0, pad_edge=False)
    drawn.add_column("", style="dim")
    for label in column_labels:
        drawn.add_column(Text(f" {label} "), justify="right")
    full = full or largest(table)
    for label, texts, values in zip(row_labels, cells, table.tolist(), strict=True):
        drawn.add_row(
            f"{label} ",
            *[Text(f" {text} ", style=_ink(value / full)) for text, value in zip(texts, values, strict=True)],
        )
    return _titled(title, drawn)


def _ink(strength: float) -> str:
    pole = BLUE if strength >= 0 else RED
    part = min(1.0, abs(strength))
    ground = ",".join(str(round(n + part * (p - n))) for n, p in zip(NEUTRAL, pole, strict=True))
    return f"{'white' if part > 0.5 else 'black'} on rgb({ground})"


def _head_list(title: str, heads: Sequence[Head], columns: Sequence[Column]) -> RenderableType:
    table = Table("head")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for head in heads:
        table.add_row(str(head), *[value(head) for _, value in columns])
    return _titled(title, table)


def _titled(title: str, table: Table) -> RenderableType:
    # A title of rich's own is wrapped to the width of its table.
    return Group(Text(title, style="bold"), table)


def _section(title: str, words: Words) -> Panel:
    lines = [Text(words.headline, style="bold"), *[Text(f"- {sentence}") for sentence in words.sentences]]
    return Panel(Group(*lines), title=title, title_align="left", border_style=BORDERS[words.verdict])
