"""How is a comparison shown in a terminal?

For each reference and basis one row per kind of point, with the layer in which it is worst; the tools side by side;
and last, where a terminal stops, the promises.
"""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .costs import TASKS
from .result import Comparison, Cost, Difference, Promise, Status

MARKS = {True: ("holds", "green"), False: ("BROKEN", "red"), None: ("not tried", "yellow")}
STYLES: dict[Status, str] = {"holds": "", "fails": "red", "known": "yellow", "shown": "dim"}


def number(value: float) -> str:
    """A difference in a table: 0 where there is none, and what cannot be a number as words."""
    if not math.isfinite(value):
        return "no match"
    return f"{value:.1e}" if value else "0"


def milliseconds(value: float | None) -> str:
    """A time in a table."""
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def mebibytes(value: float | None) -> str:
    """An amount of memory in a table."""
    return "-" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def print_report(comparison: Comparison, console: Console, brief: bool = False) -> None:
    """Print everything; the promises only if ``brief``."""
    if not brief:
        _print_setting(comparison, console)
        for against, basis in comparison.groups:
            console.print(_table(comparison, against, basis))
            for line in _reasons(comparison.worst(against, basis)):
                console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
        if comparison.costs:
            console.print(_costs(comparison))
            for cost in comparison.costs:
                if cost.problem:
                    console.print(f"{cost.tool}: {cost.problem}", markup=False, highlight=False, soft_wrap=True)
        for note in comparison.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    for promise in comparison.promises:
        _print_promise(promise, console)
    console.print("Every promise holds." if comparison.holds else "A promise is broken.", highlight=False)


def _print_setting(comparison: Comparison, console: Console) -> None:
    about = comparison.setting
    console.print(
        f"[bold]{escape(about.model)}[/]: {about.hf_class}, {about.n_layers} layers, {about.n_parameters:,} "
        f"parameters, {about.dtype} on {about.device}, {about.attention} attention; "
        f"{len(about.prompts)} prompts of {', '.join(map(str, about.lengths))} tokens",
        highlight=False,
        soft_wrap=True,
    )


def _print_promise(promise: Promise, console: Console) -> None:
    word, style = MARKS[promise.holds]
    console.print(f"[{style}]{word:<9}[/] ", end="", highlight=False)
    console.print(f"{promise.name}: {promise.detail}", markup=False, highlight=False, soft_wrap=True)


def _table(comparison: Comparison, against: str, basis: str) -> Table:
    title = f"Difference from {against}, {basis}"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("point", no_wrap=True)
    for column in ("layer", "max", "mean", "max rel", "mean rel", "same"):
        table.add_column(column, justify="right", no_wrap=True)
    marked = 0
    for each in comparison.worst(against, basis):  # type: ignore[arg-type]
        mark = ""
        if each.reason:
            marked += 1
            mark = f" [{marked}]"
        table.add_row(
            # The prefix would take the numbers' place in a narrow terminal.
            escape(each.kind.removeprefix("blocks.{l}.") + mark),
            "" if each.layer is None else str(each.layer),
            *(number(value) for value in (each.largest, each.mean, each.relative, each.relative_mean)),
            "bits" if each.same_bits else "",
            style=STYLES[each.status],
        )
    return table


def _reasons(rows: list[Difference]) -> list[str]:
    """What is to be said of rows, with their marks."""
    with_reason = [each for each in rows if each.reason]
    return [f"[{index}] {each.status}: {each.reason}" for index, each in enumerate(with_reason, start=1)]


def _costs(comparison: Comparison) -> Table:
    about = comparison.setting
    table = Table(
        title=f"Time and memory of one process each, {max(about.lengths)} tokens, {about.threads} thread(s), "
        f"median of up to {about.rounds} rounds",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    fine = [cost for cost in comparison.costs if not cost.problem]
    for cost in fine:
        table.add_column(cost.tool, justify="right")
    for name, cells in cost_rows(fine):
        table.add_row(name, *cells)
    return table


def cost_rows(costs: list[Cost]) -> list[tuple[str, list[str]]]:
    """The rows of the table of times and memory: a title, and a cell for each tool."""
    rows = [(f"{task}, ms", [milliseconds(cost.milliseconds.get(task)) for cost in costs]) for task in TASKS]
    rows.append(("load, s", ["-" if cost.load_seconds is None else f"{cost.load_seconds:.2f}" for cost in costs]))
    for kind in dict.fromkeys(kind for cost in costs for kind in cost.mebibytes):
        rows.append((f"{kind}, MiB", [mebibytes(cost.mebibytes.get(kind)) for cost in costs]))
    return rows
