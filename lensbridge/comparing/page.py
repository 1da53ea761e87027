"""How does a comparison become one page that needs no network?

As the demo's page: a plain string with one inline style sheet, and a content security policy in its head that forbids
loading anything. The one script sorts tables; the policy names it by its hash, so that no other runs.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from html import escape

import torch

from ..demo.heatmap import heat_map
from ..demo.page_style import STYLE
from .costs import TASKS
from .page_style import SORTING, STYLE_OF_COMPARISON
from .report import cost_rows, number
from .result import HUGGINGFACE, Basis, Comparison, Cost, Difference, Promise

#: Relative differences below this are drawn as none.
FLOOR = -9.0
#: What stands for a difference that is no number.
NO_NUMBER = 1000.0

WORDS = {True: ("clear", "holds"), False: ("none", "broken"), None: ("partial", "not tried")}
NUMBERS = ("layer", "max", "mean", "max relative", "mean relative")
COLUMNS = ("point", *NUMBERS, "same bits", "status", "compared with")
HOW = (
    "A difference is taken over all entries of a point and all prompts: the largest and the mean of |a - b|, and these "
    "over the largest and the mean |b|, where b is the reference's. Relative differences up to {tolerance:.0e} are "
    "rounding. HuggingFace's values come from a run of the plain model with PyTorch's own hooks; where no module shows "
    "a value, it is compared with the equation that the last column gives, of weights and of other points. "
    "TransformerLens ran in a process of its own on the same weights and tokens."
)
HOW_COSTS = (
    "Each tool in a process of its own, one after the other, on {tokens} tokens with {threads} thread(s): the median "
    "of up to {rounds} rounds, and in brackets its multiple of what plain HuggingFace takes. The hook multiplies the "
    "stream behind a layer in the middle by one. Parameters are counted by their storages; the peak is the largest "
    "resident set of the process until its end, all imports and caches included."
)


def render_page(comparison: Comparison, version: str) -> str:
    """The whole page as HTML text. ``version`` is that of lensbridge, for the foot of the page."""
    about = comparison.setting
    name = escape(about.model)
    digest = base64.b64encode(hashlib.sha256(SORTING.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [_costs(comparison)] if comparison.costs else []
    sections += [_section(comparison, against, basis) for against, basis in comparison.groups]
    if comparison.absent:
        sections.append(_absent(comparison))
    verdict = "Every promise holds." if comparison.holds else "A promise is broken."
    notes = "".join(f'<p class="left-out">{escape(note)}</p>' for note in comparison.notes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>lensbridge compare: {name}</title><style>{STYLE}{STYLE_OF_COMPARISON}</style></head><body><main>"
        f"<header><h1>How far is <code>{name}</code> from its references?</h1>{_facts(comparison)}"
        f'<p class="verdict {WORDS[comparison.holds][0]}">{verdict}</p></header>'
        f'<div class="cards">{"".join(map(_card, comparison.promises))}</div>{notes}'
        f"{''.join(sections)}{_foot(comparison, version)}</main><script>{SORTING}</script></body></html>\n"
    )


def _facts(comparison: Comparison) -> str:
    about = comparison.setting
    prompts = "".join(
        f"<li><code>{escape(prompt)}</code> ({length} tokens)</li>"
        for prompt, length in zip(about.prompts, about.lengths, strict=True)
    )
    return (
        f'<p class="facts">{escape(about.hf_class)}, {about.n_layers} layers, {about.n_parameters:,} parameters. Run '
        f"in {escape(about.dtype)} on {escape(about.device)} with {escape(about.attention)} attention.</p>"
        f'<details class="facts"><summary>{len(about.prompts)} prompts</summary><ul>{prompts}</ul></details>'
    )


def _card(promise: Promise) -> str:
    style, word = WORDS[promise.holds]
    return (
        f'<div class="card {style}"><b>{escape(promise.name)}</b> <i>{word}</i>'
        f"<span>{escape(promise.detail)}</span></div>"
    )


def _section(comparison: Comparison, against: str, basis: Basis) -> str:
    rows = comparison.of(against, basis)
    anchor = f"{against.split()[0]}-{basis.split()[0]}".lower()
    caption = f"All {len(rows)} rows (a click on a heading sorts)"
    return (
        f'<section id="{anchor}"><h2>{escape(against)}, {basis}</h2>{_map(comparison, rows)}'
        f"{_reasons(rows)}{_around(rows)}<details><summary>{caption}</summary>{_table(rows)}</details></section>"
    )


def _map(comparison: Comparison, rows: Sequence[Difference]) -> str:
    """Relative differences by kind of point and layer, on a logarithmic scale."""
    kinds = list(dict.fromkeys(each.kind for each in rows if each.layer is not None))
    if not kinds:
        return ""
    table = torch.full((len(kinds), comparison.setting.n_layers), float("nan"))
    for each in rows:
        if each.layer is not None:
            cell = kinds.index(each.kind), each.layer
            # Several experts share a cell.
            table[cell] = max(_strength(each.relative), float(table[cell].nan_to_num(nan=0.0)))
    return heat_map(
        table,
        [kind.removeprefix("blocks.{l}.") for kind in kinds],
        [f"L{layer}" for layer in range(comparison.setting.n_layers)],
        caption="Largest difference relative to the largest value, by layer; the scale is logarithmic, and full at the "
        "tolerance",
        kind="score",
        limit=math.log10(comparison.setting.tolerance) - FLOOR,
        show=_shown,
        widest=14,
    )


def _strength(relative: float) -> float:
    if not math.isfinite(relative):
        return NO_NUMBER
    return max(0.01, math.log10(relative) - FLOOR) if relative else 0.0


def _shown(strength: float) -> str:
    return "no match" if strength >= NO_NUMBER else f"{10 ** (strength + FLOOR):.0e}" if strength else "0"


def _reasons(rows: Sequence[Difference]) -> str:
    """Why rows do not hold, each reason once, with the kinds that it is about."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in rows:
        if each.reason:
            kinds = found.setdefault((each.status, each.reason), [])
            if each.kind not in kinds:
                kinds.append(each.kind)
    items = "".join(
        f'<li class="{status}"><b>{status}</b> {", ".join(f"<code>{escape(kind)}</code>" for kind in kinds[:8])}'
        f"{' and more' if len(kinds) > 8 else ''}: {escape(reason)}</li>"
        for (status, reason), kinds in found.items()
    )
    return f'<ul class="reasons">{items}</ul>' if items else ""


def _around(rows: Sequence[Difference]) -> str:
    """What is not in a layer."""
    around = [each for each in rows if each.layer is None]
    return f"<figure><figcaption>Around the layers</figcaption>{_table(around)}</figure>" if around else ""


def _table(rows: Sequence[Difference]) -> str:
    head = "".join(
        f'<th scope="col"{" class=number" if name in NUMBERS else ""}><button type="button">{name}</button></th>'
        for name in COLUMNS
    )
    return (
        f'<div class="scroll"><table class="plain sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(map(_row, rows))}</tbody></table></div>"
    )


def _row(each: Difference) -> str:
    layer = each.layer
    numbers = "".join(
        f'<td class="number" data-key="{value if math.isfinite(value) else 1e300!r}">{number(value)}</td>'
        for value in (each.largest, each.mean, each.relative, each.relative_mean)
    )
    title = f' title="{escape(each.reason)}"' if each.reason else ""
    return (
        f'<tr class="{each.status}"{title}><th scope="row"><code>{escape(each.point)}</code></th>'
        f'<td class="number" data-key="{-1 if layer is None else layer}">{"" if layer is None else layer}</td>{numbers}'
        f"<td>{'yes' if each.same_bits else ''}</td><td>{each.status}</td><td>{escape(each.source)}</td></tr>"
    )


def _costs(comparison: Comparison) -> str:
    about = comparison.setting
    fine = [cost for cost in comparison.costs if not cost.problem]
    plain = next((cost for cost in fine if cost.tool == HUGGINGFACE), None)
    head = "".join(f'<th scope="col" class="number">{escape(cost.tool)}</th>' for cost in fine)
    body = ""
    for name, cells in cost_rows(fine):
        task = name.removesuffix(", ms")
        shown = [
            f'<td class="number">{cell}{_multiple(plain, cost, task)}</td>'
            for cell, cost in zip(cells, fine, strict=True)
        ]
        body += f'<tr><th scope="row">{escape(name)}</th>{"".join(shown)}</tr>'
    problems = "".join(
        f"<li>{escape(cost.tool)}: {escape(cost.problem)}</li>" for cost in comparison.costs if cost.problem
    )
    how = HOW_COSTS.format(tokens=max(about.lengths), threads=about.threads, rounds=about.rounds)
    return (
        f'<section id="costs"><h2>Time and memory</h2><div class="scroll"><table class="plain costs"><thead><tr>'
        f"<td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{f'<ul>{problems}</ul>' if problems else ''}<p class='facts'>{how}</p></section>"
    )


def _multiple(plain: Cost | None, cost: Cost, task: str) -> str:
    """A time as a multiple of that of plain HuggingFace's forward pass."""
    if plain is None or cost is plain or task not in TASKS or task not in cost.milliseconds:
        return ""
    own = plain.milliseconds.get(task, plain.milliseconds[TASKS[0]])
    return f" <small>({cost.milliseconds[task] / own:.2f})</small>"


def _absent(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(kind)}</code></th><td>{escape("; ".join(reasons))}</td></tr>'
        for kind, reasons in comparison.absent.items()
    )
    return (
        '<section id="absent"><h2>Points that the model does not have</h2><details><summary>'
        f"{len(comparison.absent)} kinds, in some layer or in all, and why</summary>"
        f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div></details></section>'
    )


def _foot(comparison: Comparison, version: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in comparison.setting.versions.items())
    how = HOW.format(tolerance=comparison.setting.tolerance)
    return (
        f"<section><h2>How it was compared</h2><p>{escape(how)}</p></section>"
        f"<footer>Made by lensbridge {escape(version)}. Versions: {escape(versions)}.</footer>"
    )
