"""How are the measurements shown: a table on screen, markdown, JSON, and a plot as SVG?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[list[str]]


def ratio_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Median (and minimum) of the ratios to what is measured against, per task and contender."""
    names = result["contenders"]
    rows = []
    for task, by_name in result["ratios"].items():
        cells = [
            f"{by_name[name]['median']:.2f} ({by_name[name]['min']:.2f})" if name in by_name else "-" for name in names
        ]
        rows.append([task, *cells])
    return ["median (min)", *names], rows


def loading_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    header = ["loading", "import, s", "load, s", "first run, s", "load + first / HF", "peak, MiB", "peak / HF"]
    measured = result["loading"]
    base = measured.get("HuggingFace", {})
    rows = []
    for name, values in measured.items():
        if "error" in values:
            rows.append([name, values["error"], "", "", "", "", ""])
            continue
        ready, base_ready = (entry["load_s"] + entry["first_run_s"] for entry in (values, base))
        rows.append(
            [
                name,
                f"{values['import_s']:.2f}",
                f"{values['load_s']:.2f}",
                f"{values['first_run_s']:.2f}",
                f"{ready / base_ready:.2f}",
                f"{values['peak_mib']:.0f}",
                f"{values['peak_mib'] / base['peak_mib']:.2f}",
            ]
        )
    return header, rows


def show(result: dict[str, Any]) -> None:
    """Print both tables."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for heading, (header, rows) in (
        (result["title"], ratio_rows(result)),
        ("each in a process of its own", loading_rows(result)),
    ):
        if not rows:
            continue
        table = Table(title=heading)
        for index, column in enumerate(header):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for name, reason in result["missing"].items():
        console.print(f"not measured: {name}: {reason}")


def markdown(result: dict[str, Any]) -> str:
    """Both tables as markdown."""
    parts = [f"### {result['title']}", "", *([result["note"], ""] if "note" in result else [])]
    for header, rows in (ratio_rows(result), loading_rows(result)):
        if rows:
            parts += [table(header, rows), ""]
    parts += [f"Not measured: {name}: {reason}" for name, reason in result["missing"].items()]
    parts.append(f"Versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}.")
    return "\n".join(parts) + "\n"


def table(header: list[str], rows: Rows) -> str:
    """A table in markdown, its columns but the first to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page(result: dict[str, Any], header: list[str], rows: Rows, more: str = "") -> str:
    """A page of results: title, table, what else there is, versions."""
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"### {result['title']}", table(header, rows), *([more] if more else []), f"Versions: {found}."]
    return "\n\n".join(parts) + "\n"


def finish(result: dict[str, Any], text: str, plot: str | None, directory: Path | None) -> None:
    """Print a page and, given a directory, write it there with the numbers and the plot."""
    print(text)
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(result, indent=2) + "\n", "md": text} | ({} if plot is None else {"svg": plot})
    for suffix, content in texts.items():
        path = directory / f"{result['size']}.{suffix}"
        path.write_text(content)
        print(f"wrote {path}")


COLOURS = ["#888888", "#0b6e4f", "#6fb98f", "#b5523b", "#e0a458"]


def bars(result: dict[str, Any]) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Groups of (contender, median ratio, colour), one group per task."""
    names = result["contenders"]
    return [
        (task, [(name, by_name[name]["median"], COLOURS[names.index(name) % 5]) for name in names if name in by_name])
        for task, by_name in result["ratios"].items()
    ]


def svg(result: dict[str, Any]) -> str:
    """Horizontal bars, one group per task; the line marks 1, what is measured against."""
    groups = bars(result)
    left, right, bar, gap = 230, 620, 13, 16
    longest = max(value for _, group in groups for _, value, _ in group)
    scale: Callable[[float], float] = lambda value: value / longest * (right - 60)  # noqa: E731
    parts: list[str] = []
    y = 58
    for task, group in groups:
        parts.append(f'<text x="{left - 8}" y="{y + len(group) * bar / 2 + 4}" text-anchor="end">{escape(task)}</text>')
        for _, value, colour in group:
            parts.append(f'<rect x="{left}" y="{y}" width="{scale(value):.1f}" height="{bar - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{left + scale(value) + 4:.1f}" y="{y + bar - 4}" font-size="10">{value:.2f}</text>')
            y += bar
        y += gap
    one = left + scale(1.0)
    parts.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="50" y2="{y - gap + 4}" stroke="#000" stroke-dasharray="3"/>')
    legend = ""
    x = 10
    for index, name in enumerate(result["contenders"]):
        legend += f'<rect x="{x}" y="30" width="10" height="10" fill="{COLOURS[index % 5]}"/>'
        legend += f'<text x="{x + 14}" y="39" font-size="11">{escape(name)}</text>'
        x += 30 + 7 * len(name)
    width = max(left + right, x)
    head = f'<text x="10" y="18" font-weight="bold">{escape(result["title"])}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{head}{legend}{"".join(parts)}</svg>\n'
    )


def write(result: dict[str, Any], directory: Path) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.svg, and say which."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(result, indent=2) + "\n", "md": markdown(result), "svg": svg(result)}
    written = []
    for suffix, text in texts.items():
        path = directory / f"{result['size']}.{suffix}"
        path.write_text(text)
        written.append(path)
    return written
