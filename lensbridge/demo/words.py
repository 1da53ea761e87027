"""What do the numbers say, in sentences?

Every sentence is chosen by comparing a number with a threshold that stands here as a constant and is named in the
sentence where it decides something, so a model that does not have a circuit is told so as plainly as one that has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lensbridge.demo.analyses import DemoResult
from lensbridge.demo.formats import percent, plain, signed
from lensbridge.demo.heads import Head, ranked_heads, score_of
from lensbridge.demo.induction import Ablation, Composition, InductionResult
from lensbridge.demo.ioi import IoiResult
from lensbridge.demo.patching_sweep import SMALLEST_GAP, SweepResult

Verdict = Literal["clear", "partial", "none"]

#: Fall of the loss from the first to the second copy (nats per token) that counts as copying, and as a trace of it.
COPYING, TRACE = 1.0, 0.25
#: Tokens at the end of the second copy that must be predicted badly before the copying is said to break off.
SHORTEST_BREAK = 3
#: A silenced head matters when the loss rises by this much (nats per token) and this many times more than for others.
MATTERS, TIMES_MORE = 0.1, 3.0
#: Share of the induction score that must go for one head to be said to depend on another.
DEPENDS = 0.5
#: Accuracy from which the model is said to solve the task, and from which it does better than guessing.
SOLVES, BETTER = 0.9, 0.65
#: Mean attention from the last position by which a head is said to look at a name.
LOOKS = 0.3
#: Part of the answer brought back by which a position holds it, and by which one is worth naming (heads too).
HOLDS, NAMED = 0.5, 0.1
#: The places of the names, in the order of ``IoiResult.attention``; only the first makes a head a name mover.
ROLE_NAMES = (
    "the indirect object, as name movers do",
    "the first mention of the subject",
    "the giver (the second mention of the subject)",
)


@dataclass(frozen=True)
class Words:
    """One analysis in words: a verdict, one line that can stand alone, and the sentences behind it."""

    verdict: Verdict
    headline: str
    sentences: list[str]


def all_words(result: DemoResult) -> dict[str, Words]:
    """The words for each analysis that was run, under ``induction``, ``ioi`` and ``sweep``."""
    words = {"induction": induction_words(result.induction)}
    if result.ioi is not None:
        words["ioi"] = ioi_words(result.ioi)
    if result.sweep is not None:
        words["sweep"] = sweep_words(result.sweep)
    return words


def induction_words(result: InductionResult) -> Words:
    """What the repeated random tokens showed."""
    drop = result.first_loss - result.second_loss
    table = result.scores.induction
    best = f"{result.strongest} ({score_of(table, result.strongest):.2f})"
    floor = f"attention spread evenly would score {result.uniform_score:.2f}"
    losses = f"from {result.first_loss:.2f} nats per token in the first copy to {result.second_loss:.2f} in the second"
    if drop >= COPYING:
        copying = f"The loss falls {losses}: the model copies what it saw once."
    elif drop >= TRACE:
        copying = f"The loss falls only a little, {losses}; copying would be a fall of at least {COPYING:.0f} nat."
    else:
        copying = f"The loss does not fall ({losses}): the model does not use the first copy."
    if result.heads:
        heads = (
            f"{_count(len(result.heads), 'head')} of {table.numel()} put at least {result.threshold:.2f} of their "
            f"attention on the token after the previous occurrence: {listed(table, result.heads)}; {floor}."
        )
    else:
        heads = f"No head reaches an induction score of {result.threshold:.2f}; the highest is {best}; {floor}."

    verdict: Verdict
    if result.heads and drop >= COPYING:
        verdict, headline = "clear", f"Induction heads: {listed(table, result.heads, 3)}. Loss falls {losses}."
    elif result.heads or drop >= TRACE:
        verdict, headline = "partial", f"Some induction: strongest head {best}, loss {losses}."
    else:
        verdict, headline = "none", f"No induction: no head above {result.threshold:.2f}, loss {losses}."
    sentences = [copying, *_reach(result), heads, _previous_token(result)]
    sentences += [_ablation(ablation, result.second_loss) for ablation in result.ablations]
    part = result.composition
    # Where no head attends to the previous token there is nothing that induction could build on in this way.
    if part is not None and score_of(result.scores.previous_token, part.previous_token_head) >= result.threshold:
        sentences.append(_composition(part))
    return Words(verdict, headline, sentences)


def ablation_matters(ablation: Ablation, unablated: float) -> bool:
    """Whether silencing these heads hurts clearly, and clearly more than silencing as many others does."""
    change, control = ablation.loss - unablated, ablation.control_loss - unablated
    return change >= MATTERS and (math.isnan(control) or change >= TIMES_MORE * control)


def ioi_words(result: IoiResult) -> Words:
    """What the indirect-object prompts showed."""
    right = f"right name in {percent(result.accuracy)} of prompts"
    score = (
        f"in {percent(result.accuracy)} of {result.n_prompts} prompts (guessing: 50%), by "
        f"{signed(result.logit_difference)} nats on average (standard deviation {plain(result.logit_difference_std)})"
    )
    verdict: Verdict
    if result.accuracy >= SOLVES and result.logit_difference > 0:
        top = f"of the whole vocabulary it is the likeliest token in {percent(result.top_1)}"
        verdict, task = "clear", [f"The model prefers the indirect object {score}; {top}."]
        writers = listed(result.head_attribution, result.writers[:3], signs=True)
        headline = f"{_capital(right)}; the heads that write it most: {writers}."
    elif result.accuracy >= BETTER and result.logit_difference > 0:
        short = f"more than guessing, below the {percent(SOLVES)} of a solved task"
        verdict, task = "partial", [f"The model prefers the indirect object {score}: {short}."]
        headline = f"{_capital(right)}: better than guessing, not solved."
    else:
        why = "What follows describes how it comes to its logits, not a circuit for the right answer."
        verdict, task = "none", [f"The model does not do the task: it prefers the indirect object {score}.", why]
        headline = f"Not solved: {right}, where guessing gives 50%."
    return Words(verdict, headline, [*task, _swapped(result), *_attribution(result)])


def sweep_words(result: SweepResult) -> Words:
    """What activation patching showed."""
    gap = (
        f"The logit difference is {signed(result.clean_difference)} on the clean prompts and "
        f"{signed(result.corrupted_difference)} on the corrupted ones"
    )
    if not result.meaningful:
        headline = f"Not measured: clean and corrupted prompts differ by less than {SMALLEST_GAP} nats."
        return Words("none", headline, [f"{gap}: too close (below {SMALLEST_GAP} nats) to measure a part of it."])
    verdict, headline, moved = _journey(result)
    return Words(verdict, headline, [f"{gap}.", moved, _stations(result), _carriers(result)])


# --- parts -----------------------------------------------------------------------------------------------------------


def listed(table: torch.Tensor, heads: Sequence[Head], limit: int = 6, *, signs: bool = False) -> str:
    """Heads with their scores, as "L2H1 (0.97), L3H0 (0.55) and 3 more"; with a plus or minus sign where ``signs``."""
    if not heads:
        return "no head"
    shown = [f"{head} ({(signed if signs else plain)(score_of(table, head))})" for head in heads[:limit]]
    more = [f"{len(heads) - limit} more"] if len(heads) > limit else []
    return joined([*shown, *more])


def joined(parts: Iterable[str]) -> str:
    """Parts as an English enumeration: "a", "a and b", "a, b and c"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _reach(result: InductionResult) -> list[str]:
    """A sentence about where copying breaks off, if the end of the second copy is predicted as badly as the first."""
    begin = result.start + result.period
    failing = result.loss_by_position[begin:] > result.first_loss / 2
    broken = len(failing) - (int((~failing).nonzero()[-1]) + 1 if bool((~failing).any()) else 0)
    if not SHORTEST_BREAK <= broken < len(failing):
        return []
    loss = float(result.loss_by_position[-broken:].mean())
    # Entry p of the loss scores the token at position p + 1.
    position = len(result.loss_by_position) - broken + 1
    return [f"From position {position} to the end the loss is {loss:.2f} again: the copying does not reach that far."]


def _previous_token(result: InductionResult) -> str:
    table = result.scores.previous_token
    ranking = ranked_heads(table)
    strong = [head for head in ranking if score_of(table, head) >= result.threshold]
    if strong:
        return f"Previous-token heads, which an induction head needs below it: {listed(table, strong)}."
    best = listed(table, ranking[:1])
    return f"No head attends to the previous token by {result.threshold:.2f} or more; the nearest is {best}."


def _ablation(ablation: Ablation, unablated: float) -> str:
    change, control = ablation.loss - unablated, ablation.control_loss - unablated
    one = len(ablation.heads) == 1
    seen = (
        f"Silencing {joined(map(str, ablation.heads))} {'together ' if not one else ''}changes the second-copy loss by "
        f"{signed(change)} nats per token ({unablated:.2f} to {ablation.loss:.2f})"
    )
    if ablation.controls:
        drawn = _count(len(ablation.controls[0]), "head")
        draws = f"mean of {len(ablation.controls)} draws"
        seen += f", silencing {drawn} drawn at random from outside the circuit by {signed(control)} ({draws})"
    it = "this head" if one else "these heads"
    if ablation_matters(ablation, unablated):
        return f"{seen}: the copying depends on {it}."
    if change >= MATTERS:
        return f"{seen}: less than {TIMES_MORE:.0f} times as much, so nothing special about {it} is shown."
    return f"{seen}: below {MATTERS} nats, so the copying does not hang on {it} alone."


def _composition(part: Composition) -> str:
    lost = 1 - part.score_after / part.score_before if part.score_before > 0 else 0.0
    control = f" (silencing {part.control_head} instead: {part.control_score:.2f})" if part.control_head else ""
    seen = (
        f"Silencing {part.previous_token_head}, the strongest previous-token head below {part.head}, takes the "
        f"induction score of {part.head} from {part.score_before:.2f} to {part.score_after:.2f}{control}: "
    )
    return seen + ("it builds on that head." if lost >= DEPENDS else "it does not depend on that head alone.")


def _swapped(result: IoiResult) -> str:
    flips = result.swapped_logit_difference < 0 < result.logit_difference
    seen = (
        f"With the other person named as the giver the difference becomes {signed(result.swapped_logit_difference)}: "
    )
    return seen + (
        "the answer follows who is named twice." if flips else "the answer does not follow who is named twice."
    )


def _attribution(result: IoiResult) -> list[str]:
    table = result.head_attribution
    # Of a difference of next to nothing every head writes a large part.
    share = NAMED * max(1.0, abs(result.logit_difference))
    towards = [head for head in result.writers if score_of(table, head) >= share]
    against = [head for head in result.opponents if score_of(table, head) <= -share]
    largest = int(result.component_attribution.argmax())
    return [
        f"Heads that directly write {plain(share)} nats or more towards it: {listed(table, towards, signs=True)}. "
        f"{_looks(result, towards)}"
        if towards
        else f"No head directly writes {plain(share)} nats or more towards it.",
        f"Heads that write as much against it: {listed(table, against, signs=True)}."
        if against
        else f"No head writes {plain(share)} nats or more against it.",
        f"Of the layers' outputs {result.component_labels[largest]} adds most "
        f"({signed(float(result.component_attribution[largest]))}). All parts add up to {signed(result.explained)}; "
        f"{_exactness(result)}.",
    ]


def _looks(result: IoiResult, heads: Sequence[Head]) -> str:
    """Whom each head attends to from the last position, which tells a name mover from other heads that write a name."""
    roles = {head: _role(result, head) for head in heads}
    parts = []
    for role, name in enumerate(ROLE_NAMES):
        looking = [head for head in heads if roles[head] == role]
        if looking:
            shown = joined(f"{head} ({plain(float(result.attention[head][role]))})" for head in looking)
            parts.append(f"{shown} {_verb(looking)} at {name}")
    lost = [head for head in heads if roles[head] is None]
    if lost:
        parts.append(f"{joined(map(str, lost))} {_verb(lost)} at none of the names")
    return f"By at least {LOOKS} of their attention from the last position, {joined(parts)}."


def _verb(heads: Sequence[Head]) -> str:
    return "looks" if len(heads) == 1 else "look"


def _exactness(result: IoiResult) -> str:
    off = abs(result.explained - result.logit_difference)
    if off <= 0.01 * max(1.0, abs(result.logit_difference)):
        return f"measured: {signed(result.logit_difference)}"
    return f"measured: {signed(result.logit_difference)}, so on this model the decomposition is only approximate"


def _role(result: IoiResult, head: Head) -> int | None:
    """The role the head looks at most from the last position (0 IO, 1 S1, 2 S2), if it does so by ``LOOKS``."""
    role = int(result.attention[head].argmax())
    return role if float(result.attention[head][role]) >= LOOKS else None


def _journey(result: SweepResult) -> tuple[Verdict, str, str]:
    """Verdict, headline and sentence about where the answer leaves the giver and reaches the last position."""
    giver, end = result.resid[:, result.giver_position], result.resid[:, -1]
    holding, arrived_rows = (giver >= HOLDS).nonzero().flatten(), (end >= HOLDS).nonzero().flatten()
    if not len(holding) or not len(arrived_rows):
        short = "the giver" if not len(holding) else "the last position"
        moved = f"At no layer does {short} by itself hold {percent(HOLDS)} of the answer: it is spread over positions."
        return "partial", "The answer is spread over several positions.", moved
    left, arrived = int(holding[-1]), int(arrived_rows[0])
    moved = (
        f"The giver holds {percent(float(giver[left]))} of the answer {result.resid_labels[left]}, the last point at "
        f"which it holds half; the last position first holds half {result.resid_labels[arrived]} "
        f"({percent(float(end[arrived]))})"
    )
    if arrived == left + 1:
        headline = f"Layer {left} moves the answer from the giver to the last position."
        return "clear", headline, f"{moved}: layer {left} moves it."
    first, last = min(left, arrived - 1), max(left, arrived - 1)
    headline = f"Layers {first} to {last} move the answer from the giver to the last position."
    return "clear", headline, f"{moved}: layers {first} to {last} move it."


def _stations(result: SweepResult) -> str:
    between = result.resid[:, result.giver_position + 1 : -1]
    if not between.numel() or float(between.max()) < NAMED:
        return f"No position between the two ever holds {percent(NAMED)} of it."
    row, place = divmod(int(between.argmax()), between.shape[1])
    label = result.position_labels[result.giver_position + 1 + place]
    most = percent(float(between[row, place]))
    return f"Between the two it is seen most clearly at '{label}': {most} {result.resid_labels[row]}."


def _carriers(result: SweepResult) -> str:
    strong = [head for head in result.carriers if abs(score_of(result.heads, head)) >= NAMED]
    if not strong:
        return f"No single head brings back {percent(NAMED)} of it: many heads share the work."
    return f"Patching the output of one head brings back {listed_share(result, strong)}."


def listed_share(result: SweepResult, heads: Sequence[Head]) -> str:
    """Heads with the part of the answer each brings back, as "76% (L2H0) and -12% (L3H1)"."""
    return joined(f"{percent(score_of(result.heads, head))} ({head})" for head in heads)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
