"""How do the results become one page that needs no network?

The page is a plain string: markup from here, figures from ``heatmap`` and ``charts``, one inline style sheet, no
script. A content security policy in its head forbids loading anything at all, so it stays what it is wherever it is
opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import torch

from lensbridge.demo.analyses import DemoResult
from lensbridge.demo.charts import attention_pattern, bar_chart, line_chart
from lensbridge.demo.formats import percent, plain, signed
from lensbridge.demo.heads import score_of
from lensbridge.demo.heatmap import FAINT_NATS, WIDEST_WITH_NUMBERS, Kind, heat_map, largest
from lensbridge.demo.induction import InductionResult
from lensbridge.demo.ioi import IoiResult
from lensbridge.demo.page_style import STYLE
from lensbridge.demo.patching_sweep import SweepResult
from lensbridge.demo.words import Words, all_words

VERDICTS = {"clear": "found", "partial": "in part", "none": "not found"}

CODE = """from lensbridge import HookedTransformer

model = HookedTransformer.from_pretrained({name!r})
logits, cache = model.run_with_cache("When Mary and John went to the store, John gave a drink to")
cache["pattern", 0]                                  # attention of layer 0: [batch, head, query, key]
cache.logit_attrs(cache.stack_head_results(layer=-1, pos_slice=-1), " Mary", " John", pos_slice=-1)

def silence(z, hook):                                # z: [batch, position, head, d_head]
    z[:, :, 0] = 0

model.run_with_hooks("Mary and", fwd_hooks=[("blocks.0.attn.hook_z", silence)])"""


def render_page(result: DemoResult, version: str) -> str:
    """The whole page as HTML text. ``version`` is that of lensbridge, for the foot of the page."""
    sections = _sections(result)
    cards = "".join(
        f'<a class="card {words.verdict}" href="#{anchor}"><b>{title}</b><i>{VERDICTS[words.verdict]}</i>'
        f"<span>{escape(words.headline)}</span></a>"
        for anchor, title, words, *_ in sections
    )
    left_out = f'<p class="left-out">{escape(result.left_out)}</p>' if result.left_out else ""
    body = "".join(
        f'<section id="{anchor}"><h2>{number}. {title}</h2><p>{intro}</p>{_findings(words)}{figures}</section>'
        for number, (anchor, title, words, intro, figures) in enumerate(sections, start=1)
    )
    name = escape(result.about.model)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>lensbridge demo: {name}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>What is inside <code>{name}</code>?</h1>{_facts(result)}</header><nav class="cards">{cards}</nav>'
        f"{left_out}{body}{_foot(result, version)}</main></body></html>\n"
    )


def _sections(result: DemoResult) -> list[tuple[str, str, Words, str, str]]:
    """Anchor, title, words, introduction and figures of every analysis that was run."""
    induction, ioi, sweep, words = result.induction, result.ioi, result.sweep, all_words(result)
    intro = (
        "Random tokens written twice: whatever is predicted in the second copy must come from the first. An induction "
        "head finds where the present token stood before and looks at what came next."
    )
    sections = [("induction", "Induction", words["induction"], intro, _induction(induction))]
    if ioi is not None:
        left = f" {ioi.n_unusable} more did not fit this model's tokenizer." if ioi.n_unusable else ""
        intro = (
            f"{ioi.n_prompts} prompts with two people, one of whom is named again as the one who gives: the next word "
            f"is the other one, the indirect object (IO), not the subject (S1 and S2 where it is named).{left}"
        )
        sections.append(("ioi", "Indirect objects", words["ioi"], intro, _ioi(ioi)))
    if sweep is not None:
        intro = (
            f"The model runs on {sweep.n_prompts} corrupted prompts, in which the other person gives, while one "
            "activation is taken from the clean ones. 0% is the answer as corrupted, 100% as clean. Positions before "
            "the giver are the same in both, so nothing can come from there."
        )
        sections.append(("patching", "Activation patching", words["sweep"], intro, _sweep(sweep)))
    return sections


def _facts(result: DemoResult) -> str:
    about = result.about
    amount = "quick, few samples" if about.quick else "full"
    return (
        f'<p class="facts">{about.n_layers} layers of {about.n_heads} heads, d_model {about.d_model}, '
        f"{about.n_parameters:,} parameters. Run in {escape(about.dtype)} on {escape(about.device)}, "
        f"seed {about.seed}, "
        f"{amount}, {about.seconds:.1f} s.</p>"
    )


def _findings(words: Words) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in words.sentences)
    return f'<p class="headline {words.verdict}">{escape(words.headline)}</p><ul class="findings">{items}</ul>'


def _induction(result: InductionResult) -> str:
    scores = result.scores
    half = result.start + result.period
    loss = result.loss_by_position.tolist()
    curve = line_chart(
        loss,
        [str(position + 1) for position in range(len(loss))],
        caption=f"Loss at each position, mean of {result.n_sequences} sequences of random tokens written twice",
        y_title="nats per token",
        x_title="position of the predicted token",
        marked_from=half - 1,
        marked_name="second copy",
    )
    maps = "".join(
        _by_head(table, caption, "score", plain, 1.0, widest=8)
        for caption, table in (
            ("Induction score: attention to the token after the previous occurrence", scores.induction),
            ("Previous-token score: attention to the token before", scores.previous_token),
            ("Duplicate-token score: attention to the previous occurrence", scores.duplicate_token),
        )
    )
    pattern = attention_pattern(
        result.example_pattern,
        result.example_tokens,
        caption=f"What {result.strongest} looks at in one sequence: an induction head draws a line {result.period - 1} "
        "tokens below the diagonal",
    )
    return f'{curve}<div class="grid">{maps}</div><div class="grid">{pattern}{_ablations(result)}</div>'


def _ablations(result: InductionResult) -> str:
    rows = [("nothing", result.second_loss, 0.0)]
    for part in result.ablations:
        rows.append((", ".join(map(str, part.heads)), part.loss, part.loss - result.second_loss))
        for heads, loss in zip(part.controls, part.control_losses, strict=True):
            rows.append((f"at random: {', '.join(map(str, heads))}", loss, loss - result.second_loss))
    cells = [[name, f"{loss:.3f}", f"{change:+.3f}"] for name, loss, change in rows]
    return _table("Loss of the second copy with heads silenced (nats per token)", ["silenced", "loss", "change"], cells)


def _ioi(result: IoiResult) -> str:
    heads = [*result.writers, *[head for head in result.opponents[::-1] if head not in result.writers]]
    looks = _table(
        "Heads that write most for and against it, and whom they look at from the last position",
        ["head", "writes", "at IO", "at S1", "at S2"],
        [
            [str(head), signed(score_of(result.head_attribution, head)), *map(plain, result.attention[head].tolist())]
            for head in heads
        ],
    )
    examples = _table(
        "Some of the prompts",
        ["prompt", "first choice", "IO minus S"],
        [[example.prompt, repr(example.top_token), signed(example.logit_difference)] for example in result.examples],
    )
    parts = bar_chart(
        result.component_attribution.tolist(),
        [label.replace("_out", "").replace("_", " ") for label in result.component_labels],
        caption="What each layer's output adds to the logit difference directly",
        y_title="nats",
        x_title="part of the model",
    )
    running = line_chart(
        result.accumulated.tolist(),
        [label.replace("_", " ") for label in result.accumulated_labels],
        caption="The logit difference as it stands in the residual stream, scaled by the last norm and unembedded",
        y_title="nats",
        x_title="place in the residual stream",
    )
    limit = max(FAINT_NATS, largest(result.head_attribution))
    by_head = _by_head(result.head_attribution, "Direct logit attribution of each head", "signed", signed, limit)
    return f'<div class="grid">{by_head}{looks}</div>{parts}{running}{examples}'


def _sweep(result: SweepResult) -> str:
    prompts = (
        f'<dl class="prompts"><dt>clean</dt><dd>{escape(result.clean_prompt)}</dd>'
        f"<dt>corrupted</dt><dd>{escape(result.corrupted_prompt)}</dd></dl>"
    )
    if not result.meaningful:
        return prompts
    by_position = heat_map(
        result.resid,
        result.resid_labels,
        result.position_labels,
        caption="Part of the answer brought back by patching the residual stream, by place and position",
        kind="signed",
        limit=max(1.0, float(result.resid.abs().max())),
        show=percent,
        upright=True,
    )
    caption = "Part of the answer brought back by patching the output of one head"
    return prompts + by_position + _by_head(result.heads, caption, "signed", percent)


def _by_head(
    table: torch.Tensor,
    caption: str,
    kind: Kind,
    show: Callable[[float], str],
    limit: float | None = None,
    widest: int = WIDEST_WITH_NUMBERS,
) -> str:
    layers = [f"L{number}" for number in range(table.shape[0])]
    heads = [f"H{number}" for number in range(table.shape[1])]
    return heat_map(table, layers, heads, caption=caption, kind=kind, limit=limit, show=show, widest=widest)


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _foot(result: DemoResult, version: str) -> str:
    return (
        f"<section><h2>The same in code</h2><pre>{escape(CODE.format(name=result.about.model))}</pre></section>"
        f"<footer>Made by lensbridge {escape(version)}. Induction: Elhage et al. 2021, A Mathematical Framework "
        "for Transformer Circuits; Olsson et al. 2022 (arXiv:2209.11895). Indirect objects: Wang et al. 2022 "
        "(arXiv:2211.00593). Activation patching: Meng et al. 2022 (arXiv:2202.05262).</footer>"
    )
