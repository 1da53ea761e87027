"""What is done to the products of queries and keys before they are scores?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recording import Op


class Scoring(NamedTuple):
    """``scores = cap(factor * q . k) + bias``: the factor, and whether positions add something."""

    factor: float
    biased: bool


def cap_among(ops: list[Op]) -> float | None:
    """The bound of ``cap * tanh(x / cap)`` among operations."""
    for index, op in enumerate(ops):
        if op.name == "tanh":
            for later in ops[index + 1 :]:
                if later.name in ("mul", "mul_") and op.outputs[0] in later.inputs:
                    numbers = [arg for arg in later.args[:2] if isinstance(arg, (int, float))]
                    return float(numbers[0]) if numbers else None
    return None


def scoring(queries: Tensor, keys: Tensor, scores: Tensor, cap: float | None) -> Scoring | None:
    """How scores come from queries and keys; None if not by a factor and a bias.

    Args:
        queries: [batch, head, pos, d_head] of at least two rows, as they meet the keys.
        keys: the same, perhaps with fewer heads.
        scores: [batch, head, query, key], masked where that is what they are.
    """
    groups = queries.shape[1] // keys.shape[1]
    products = queries.double() @ keys.double().repeat_interleave(groups, dim=1).transpose(-1, -2)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    values = scores.double()
    seen = seen & (values > -1e4).all(0).all(0)
    if cap is not None:
        values = cap * torch.atanh((values / cap).clamp(-1 + 1e-12, 1 - 1e-12))
    # A bias is the same in every row of tokens.
    apart = [(x[0] - x[1])[..., seen].flatten() for x in (products, values)]
    factor = float((apart[0] @ apart[1]) / (apart[0] @ apart[0]))
    if (factor * apart[0] - apart[1]).abs().max() > 1e-3 * (1 + apart[1].abs().max()):
        return None
    rest = (values - factor * products)[..., seen]
    return Scoring(factor, bool(rest.abs().max() > 1e-3 * (1 + values[..., seen].abs().max())))


def settings(scorings: list[tuple[int, Scoring, float]]) -> dict[str, Any]:
    """Fields of TransformerLens' config that say how scores are made.

    Args:
        scorings: (layer, how its scores are made, what they are divided by as far as its module says); of the latter,
            TransformerLens' config knows the first only.
    """
    found: dict[str, Any] = {}
    if not scorings:
        return found
    if any(scoring.biased for _, scoring, _ in scorings):
        found["positional_embedding_type"] = "alibi"
    usual = scorings[0][2]
    divisors = [1 / scoring.factor / usual for _, scoring, _ in scorings]
    by_layer = [divisor / (layer + 1) for divisor, (layer, _, _) in zip(divisors, scorings, strict=True)]
    if len(divisors) > 1 and not _equal(divisors) and _equal(by_layer):
        found["scale_attn_by_inverse_layer_idx"] = True
        divisors = by_layer
    if not _equal(divisors) or _equal([divisors[0], 1.0]):
        return found
    # More digits than that are rounding.
    whole = float(f"{divisors[0] * usual:.6g}")
    return found | ({"use_attn_scale": False} if _equal([whole, 1.0]) else {"attn_scale": whole})


def _equal(numbers: list[float]) -> bool:
    return all(abs(number - numbers[0]) <= 2e-3 * abs(numbers[0]) for number in numbers)
