"""How much does each part of a model contribute to one logit, or to the difference of two?

The last norm apart, a logit is linear in the residual stream, and the stream is the sum of what the parts wrote to it.
So each part's share is what it wrote, scaled as the norm scales the whole, times the unembedding of the token. What is
left out is ``b_U``, which no part wrote. (nostalgebraist 2020, the logit lens; Wang et al. 2022, arXiv 2211.00593.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...activation_cache import ActivationCache
from ...utilities.slice import SliceInput

TokenInput = str | int | Tensor
#: "component", "layer" or "head".
Unit = str

UNITS = ("component", "layer", "head")


@dataclass
class DirectLogitAttribution:
    """What `direct_logit_attribution` found: a number for each part, and the parts' names.

    ``attribution`` is [part, batch], with an axis for positions if several were asked for, and without that of the
    batch if the cache has none.
    """

    attribution: Float[Tensor, "component *batch_and_pos"]
    labels: list[str]
    unit: Unit

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` parts that contribute most, (name, value), on average over batch and positions."""
        shares = self.attribution.reshape(len(self.labels), -1).mean(-1)
        best = shares.topk(min(k, len(shares)))
        return [(self.labels[index], value) for value, index in zip(*map(torch.Tensor.tolist, best), strict=True)]


def direct_logit_attribution(
    model: Any,
    input: str | list[str] | Tensor | None = None,
    answer_tokens: TokenInput | None = None,
    incorrect_tokens: TokenInput | None = None,
    *,
    unit: Unit = "component",
    pos: SliceInput = -1,
    cache: ActivationCache | None = None,
) -> DirectLogitAttribution:
    """Each part's contribution to the logit of a token, or to its lead over another one.

    Args:
        model: a HookedTransformer; with ``fold_ln``, so that the last norm is a scaling.
        input: what it runs on, unless there is a ``cache``.
        answer_tokens: the token, as text, id or tensor of ids.
        incorrect_tokens: the other one.
        unit: "component" (embeddings, and what each attention and MLP writes), "layer" (the stream up to each of them)
            or "head" (what each head writes, and the rest).
        pos: the position, or a slice of them; None: all.
        cache: of a run that was made before.

    Raises:
        ValueError: for another ``unit``, without ``answer_tokens``, or without both ``input`` and ``cache``.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
    if answer_tokens is None:
        raise ValueError("answer_tokens is needed: the token whose logit is taken apart")
    if cache is None:
        if input is None:
            raise ValueError("give an input for the model to run on, or the cache of a run")
        with torch.no_grad():
            _, cache = model.run_with_cache(input)
    assert cache is not None
    # `logit_attrs` scales; doing it here too would do it twice.
    stack, labels = _parts(cache, unit, pos)
    attribution = cache.logit_attrs(
        stack,
        tokens=answer_tokens,
        incorrect_tokens=incorrect_tokens,
        pos_slice=pos,
        has_batch_dim=cache.has_batch_dim,
    )
    return DirectLogitAttribution(attribution, labels, unit)


def _parts(cache: ActivationCache, unit: Unit, pos: SliceInput) -> Any:
    common = {"apply_ln": False, "pos_slice": pos, "return_labels": True}
    if unit == "component":
        return cache.decompose_resid(**common)  # type: ignore[arg-type]
    if unit == "layer":
        return cache.accumulated_resid(incl_mid=True, **common)  # type: ignore[arg-type]
    return cache.stack_head_results(incl_remainder=True, **common)  # type: ignore[arg-type]
