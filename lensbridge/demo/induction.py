"""Does the model continue a sequence it has seen once, and which heads do it?

A random sequence written twice carries no meaning, so whatever the model predicts in the second copy comes from the
first. An induction head (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
"In-context Learning and Induction Heads") attends from a token to the one that followed its previous occurrence; a
previous-token head in an earlier layer tells each position what came before it, which is what the induction head
looks for. Attention alone is only a correlation, so the heads found are switched off and the loss is measured again,
against other heads drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from lensbridge.demo.heads import Head, all_heads, ranked_heads, score_of, zero_hooks
from lensbridge.utils import get_act_name

if TYPE_CHECKING:
    from lensbridge.model import HookedTransformer

#: Mean attention from which a head counts as an induction (or previous-token) head; the value TransformerLens' own
#: induction demo uses by eye. Uniform attention scores below 0.03 on a sequence of the default length.
HEAD_THRESHOLD = 0.4

#: At most this many heads are switched off together: on a large model the list of heads above the threshold is long.
MAX_ABLATED = 8


@dataclass(frozen=True)
class HeadScores:
    """Mean attention along three diagonals, one ``[layer, head]`` table each, every entry between 0 and 1.

    ``induction``: from a token of the second copy to the token after its first occurrence. ``previous_token``: from
    each token to the one before it. ``duplicate_token``: from a token of the second copy to its first occurrence.
    """

    induction: Float[torch.Tensor, "layer head"]
    previous_token: Float[torch.Tensor, "layer head"]
    duplicate_token: Float[torch.Tensor, "layer head"]


@dataclass(frozen=True)
class Ablation:
    """Second-copy loss (nats per token) with ``heads`` silenced, and with each random set in ``controls`` instead.

    There are no ``controls`` where every head belongs to the circuit.
    """

    heads: list[Head]
    loss: float
    controls: list[list[Head]]
    control_losses: list[float]

    @property
    def control_loss(self) -> float:
        """Mean over the random sets; NaN without any."""
        return sum(self.control_losses) / len(self.control_losses) if self.control_losses else float("nan")


@dataclass(frozen=True)
class Composition:
    """Induction score of ``head`` before and after an earlier previous-token head is silenced (K-composition)."""

    head: Head
    previous_token_head: Head
    score_before: float
    score_after: float
    control_head: Head | None
    control_score: float


@dataclass(frozen=True)
class InductionResult:
    """Everything measured on the repeated sequences; losses in nats per token.

    ``period`` is the length of one copy and ``start`` the index of its first token (1 behind a BOS token, else 0).
    ``example_pattern`` is the attention of the strongest head on the first sequence, ``[query, key]``.
    """

    n_sequences: int
    period: int
    start: int
    loss_by_position: Float[torch.Tensor, " pos"]
    first_loss: float
    second_loss: float
    scores: HeadScores
    uniform_score: float
    threshold: float
    heads: list[Head]
    strongest: Head
    ablations: list[Ablation]
    composition: Composition | None
    example_pattern: Float[torch.Tensor, "pos pos"]
    example_tokens: list[str]


def diagonal_scores(pattern: Float[torch.Tensor, "batch head query key"], period: int, start: int) -> torch.Tensor:
    """The three scores of every head of one layer, ``[3, head]``: induction, previous token, duplicate token.

    ``pattern`` is an attention pattern over ``start`` leading tokens and two copies of a sequence of ``period``
    tokens. A query at position q of the second copy has its first occurrence at q - period and the answer one
    further.
    """
    second = torch.arange(start + period, start + 2 * period, device=pattern.device)
    later = torch.arange(1, start + 2 * period, device=pattern.device)

    def mean_attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return pattern[:, :, query, key].float().mean(dim=(0, 2))

    return torch.stack(
        [
            mean_attention(second, second - period + 1),
            mean_attention(later, later - 1),
            mean_attention(second, second - period),
        ]
    )


def half_losses(loss: Float[torch.Tensor, "batch pos"], period: int, start: int) -> tuple[float, float]:
    """Mean loss in the first and in the second copy, from a per-token loss whose entry p scores the token at p + 1.

    The first token of each copy is left out of both: nothing that came before tells it, not even in the second copy.
    """
    first = loss[:, start : start + period - 1]
    second = loss[:, start + period : start + 2 * period - 1]
    return float(first.mean()), float(second.mean())


def uniform_score(period: int, start: int) -> float:
    """The induction score of a head that attends to all earlier positions equally: the floor to compare with."""
    positions = range(start + period, start + 2 * period)
    return sum(1 / (position + 1) for position in positions) / period


@torch.no_grad()
def measure_scores(model: HookedTransformer, tokens: Int[torch.Tensor, "batch pos"], period: int) -> HeadScores:
    """Induction, previous-token and duplicate-token score of every head on ``tokens`` (two copies of ``period``)."""
    names = [get_act_name("pattern", layer) for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(tokens, names_filter=names, return_type=None)
    start = tokens.shape[1] - 2 * period
    table = torch.stack([diagonal_scores(cache[name], period, start) for name in names], dim=1).cpu()
    return HeadScores(*table)


@torch.no_grad()
def run_induction(
    model: HookedTransformer,
    tokens: Int[torch.Tensor, "batch pos"],
    period: int,
    *,
    seed: int = 0,
    n_controls: int = 5,
    threshold: float = HEAD_THRESHOLD,
) -> InductionResult:
    """The whole analysis on ``tokens``: rows of two equal copies of ``period`` random tokens, behind BOS or not.

    Heads whose induction score reaches ``threshold`` are the induction heads; the strongest one is silenced alone
    and, when there are more, up to eight of them together. For comparison, ``n_controls`` random sets of as many
    heads that are neither induction nor previous-token heads are silenced, drawn from ``seed``.
    """
    start = tokens.shape[1] - 2 * period
    loss = model(tokens, return_type="loss", loss_per_token=True).float()
    first_loss, second_loss = half_losses(loss, period, start)
    scores = measure_scores(model, tokens, period)
    ranking = ranked_heads(scores.induction)
    found = [head for head in ranking if score_of(scores.induction, head) >= threshold]
    generator = torch.Generator().manual_seed(seed)

    sets = [ranking[:1]]
    if len(found) > 1:
        sets.append(found[:MAX_ABLATED])
    # Heads of the same circuit are no neutral comparison: the loss depends on them too.
    neutral = [
        head
        for head in all_heads(model)
        if head not in (*found, ranking[0]) and score_of(scores.previous_token, head) < threshold
    ]
    strongest = ranking[0]
    pattern_name = get_act_name("pattern", strongest.layer)
    _, cache = model.run_with_cache(tokens[:1], names_filter=pattern_name, return_type=None)
    return InductionResult(
        n_sequences=tokens.shape[0],
        period=period,
        start=start,
        loss_by_position=loss.mean(0).cpu(),
        first_loss=first_loss,
        second_loss=second_loss,
        scores=scores,
        uniform_score=uniform_score(period, start),
        threshold=threshold,
        heads=found,
        strongest=strongest,
        ablations=[_ablate(model, tokens, period, heads, neutral, n_controls, generator) for heads in sets],
        composition=_composition(model, tokens, period, scores, strongest, neutral, generator),
        example_pattern=cache[pattern_name][0, strongest.number].float().cpu(),
        example_tokens=_labels(model, tokens[0]),
    )


def _ablate(
    model: HookedTransformer,
    tokens: torch.Tensor,
    period: int,
    heads: list[Head],
    neutral: list[Head],
    n_controls: int,
    generator: torch.Generator,
) -> Ablation:
    size = min(len(heads), len(neutral))
    controls = [_draw(neutral, size, generator) for _ in range(n_controls)] if size else []
    return Ablation(
        heads=heads,
        loss=_second_loss(model, tokens, period, heads),
        controls=controls,
        control_losses=[_second_loss(model, tokens, period, control) for control in controls],
    )


def _second_loss(model: HookedTransformer, tokens: torch.Tensor, period: int, silenced: list[Head]) -> float:
    loss = model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=zero_hooks(silenced))
    return half_losses(loss.float(), period, tokens.shape[1] - 2 * period)[1]


def _composition(
    model: HookedTransformer,
    tokens: torch.Tensor,
    period: int,
    scores: HeadScores,
    strongest: Head,
    neutral: list[Head],
    generator: torch.Generator,
) -> Composition | None:
    """Silence the best previous-token head below ``strongest`` and look at its score again; None in layer 0."""
    earlier = [head for head in ranked_heads(scores.previous_token) if head.layer < strongest.layer]
    if not earlier:
        return None

    def score_without(head: Head) -> float:
        with model.hooks(fwd_hooks=zero_hooks([head])):
            return score_of(measure_scores(model, tokens, period).induction, strongest)

    comparable = [head for head in neutral if head.layer < strongest.layer and head != earlier[0]]
    control = _draw(comparable, 1, generator)[0] if comparable else None
    return Composition(
        head=strongest,
        previous_token_head=earlier[0],
        score_before=score_of(scores.induction, strongest),
        score_after=score_without(earlier[0]),
        control_head=control,
        control_score=score_without(control) if control else float("nan"),
    )


def _draw(heads: list[Head], size: int, generator: torch.Generator) -> list[Head]:
    order = torch.randperm(len(heads), generator=generator)[:size].tolist()
    return sorted(heads[position] for position in order)


def _labels(model: HookedTransformer, tokens: torch.Tensor) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in tokens.tolist()]
    return list(model.to_str_tokens(tokens))
