"""How are curves, bars and attention patterns drawn in a page that loads nothing?

As inline SVG of a fixed view box that scales with the page. Colours are classes of the style sheet, so that light and
dark mode need no second drawing; each mark has a ``<title>``, which browsers show as its tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch
from jaxtyping import Float

from lensbridge.demo.formats import signed

WIDTH, HEIGHT = 1020, 270
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 14, 50
#: Room that turned labels need below the axis, in addition.
TURNED = 34
#: Part of the span within which a chart's end is drawn as zero.
NEXT_TO_ZERO = 0.03
#: Width of a letter of the labels.
LETTER = 7
#: Attention below this is not drawn: a thousand invisible squares would only make the page heavy.
FAINTEST = 0.02
#: About as many labels as fit side by side below a chart.
MOST_LABELS = 34


def line_chart(
    values: Sequence[float],
    labels: Sequence[str],
    *,
    caption: str,
    y_title: str,
    x_title: str,
    marked_from: int | None = None,
    marked_name: str = "",
) -> str:
    """One curve over labelled steps. From step ``marked_from`` on the ground is tinted and named ``marked_name``."""
    scale = _Scale(values, labels)
    ground = ""
    if marked_from is not None:
        x = scale.x(marked_from - 0.5)
        ground = (
            f'<rect class="ground" x="{x:.1f}" y="{TOP}" width="{WIDTH - RIGHT - x:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/><text class="note" x="{(x + WIDTH - RIGHT) / 2:.1f}" y="{TOP + 16}" '
            f'text-anchor="middle">{escape(marked_name)}</text>'
        )
    points = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in enumerate(values))
    dots = "".join(
        f'<circle class="dot" cx="{scale.x(step):.1f}" cy="{scale.y(value):.1f}" r="3">'
        f"<title>{escape(label)}: {value:.2f}</title></circle>"
        for step, (value, label) in enumerate(zip(values, labels, strict=True))
    )
    body = f'{ground}{scale.axes(x_title, y_title)}<polyline class="curve" points="{points}"/>{dots}'
    return _figure(body, caption, WIDTH, scale.height)


def bar_chart(values: Sequence[float], labels: Sequence[str], *, caption: str, y_title: str, x_title: str) -> str:
    """One bar for each labelled value, blue above zero and red below."""
    scale = _Scale(values, labels)
    width = 0.7 * scale.step
    bars = []
    for step, (value, label) in enumerate(zip(values, labels, strict=True)):
        top, foot = sorted((scale.y(value), scale.y(0.0)))
        colour = "pos" if value >= 0 else "neg"
        bars.append(
            f'<rect class="bar {colour}" x="{scale.x(step) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(foot - top, 0.5):.1f}"><title>{escape(label)}: {signed(value)}</title></rect>'
        )
    return _figure(scale.axes(x_title, y_title) + "".join(bars), caption, WIDTH, scale.height)


def attention_pattern(pattern: Float[torch.Tensor, "query key"], tokens: Sequence[str], *, caption: str) -> str:
    """A causal attention pattern, one square for each query (row) and key (column) that gets attention."""
    size, margin = len(tokens), 18
    side = 400 / size
    squares = []
    for query, key in (pattern > FAINTEST).nonzero().tolist():
        value = float(pattern[query, key])
        squares.append(
            f'<rect class="att" x="{margin + key * side:.1f}" y="{margin + query * side:.1f}" width="{side:.2f}" '
            f'height="{side:.2f}" fill-opacity="{value:.2f}"><title>{query} {escape(tokens[query])} to {key} '
            f"{escape(tokens[key])}: {value:.2f}</title></rect>"
        )
    frame = f'<rect class="frame" x="{margin}" y="{margin}" width="400" height="400"/>'
    names = (
        f'<text class="note" x="{margin + 200}" y="{margin - 5}" text-anchor="middle">looked at (key)</text>'
        f'<text class="note" transform="translate({margin - 5} {margin + 200}) rotate(-90)" text-anchor="middle">'
        "looking (query)</text>"
    )
    full = 400 + margin + 2
    return _figure(frame + names + "".join(squares), caption, full, full, small=True)


class _Scale:
    """From steps and values to pixels, with round numbers at the ticks."""

    def __init__(self, values: Sequence[float], labels: Sequence[str]) -> None:
        low, high = min(0.0, *values), max(0.0, *values)
        # A value that hardly leaves zero would open an empty row of the chart.
        low, high = (end if abs(end) > NEXT_TO_ZERO * (high - low) else 0.0 for end in (low, high))
        self.tick = _round_step((high - low) or 1.0)
        self.low = math.floor(low / self.tick) * self.tick
        self.high = max(math.ceil(high / self.tick) * self.tick, self.low + self.tick)
        self.step = (WIDTH - LEFT - RIGHT) / len(labels)
        self.labels = labels
        self.every = math.ceil(len(labels) / MOST_LABELS)
        # Labels wider than their step are turned, so that neighbours do not run into each other.
        self.turned = max(map(len, labels)) * LETTER > self.step * self.every
        self.height = HEIGHT + (TURNED if self.turned else 0)

    def x(self, step: float) -> float:
        return LEFT + (step + 0.5) * self.step

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_title: str, y_title: str) -> str:
        middle = (TOP + HEIGHT - BOTTOM) / 2
        titles = (
            f'<text class="note" x="{WIDTH - RIGHT}" y="{self.height - 6}" text-anchor="end">{escape(x_title)}</text>'
            f'<text class="note" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_title)}</text>"
        )
        return self._values() + self._steps() + titles

    def _values(self) -> str:
        parts = []
        for number in range(round((self.high - self.low) / self.tick) + 1):
            value = round(self.low + number * self.tick, 10) + 0.0
            y, zero = self.y(value), " zero" if value == 0 else ""
            parts.append(f'<line class="grid{zero}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        return "".join(parts)

    def _steps(self) -> str:
        parts = []
        for step in range(0, len(self.labels), self.every):
            x, y = self.x(step), HEIGHT - BOTTOM + 18
            place = f'text-anchor="end" transform="rotate(-35 {x:.1f} {y})"' if self.turned else 'text-anchor="middle"'
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" {place}>{escape(self.labels[step])}</text>')
        return "".join(parts)


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that ``span`` has three to six ticks."""
    power = 10.0 ** math.floor(math.log10(span))
    return next(step * power for step in (0.2, 0.5, 1.0, 2.0) if span / (step * power) <= 5.5)


def _figure(body: str, caption: str, width: int, height: int, small: bool = False) -> str:
    # A narrow screen scrolls a wide chart instead of shrinking its labels.
    kind = "small" if small else "wide"
    return (
        f'<figure class="{kind}"><figcaption>{escape(caption)}</figcaption><div class="scroll">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption)}">{body}</svg></div></figure>'
    )
