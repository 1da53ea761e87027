"""Where does each head look?"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activation_cache import ActivationCache
from ..utilities.components_utils import get_act_name
from .stream import Prompt, as_tokens

PerHead = Float[Tensor, "layer head"]


@dataclass(frozen=True)
class AttentionSummary:
    """Numbers about every head's attention, each ``[layer, head]``; all but the entropy are shares of attention.

    They are means over the batch and over the queries that can have the property: for ``duplicate_token`` and
    ``induction`` those whose token occurred before (NaN if there is none), for the others all but the first, which has
    nothing to choose from.
    """

    #: How spread out attention is, in nats: 0 on one token, log(n) evenly over n.
    entropy: PerHead
    #: On the token before (Vig and Belinkov 2019, "Analyzing the Structure of Attention in a Transformer Language
    #: Model").
    previous_token: PerHead
    #: On the first token, where heads rest (Xiao et al. 2023, "Efficient Streaming Language Models with Attention
    #: Sinks").
    first_token: PerHead
    #: On the token itself.
    current_token: PerHead
    #: On earlier occurrences of the same token (Wang et al. 2022, "Interpretability in the Wild").
    duplicate_token: PerHead
    #: On what followed them: the prefix matching score (Olsson et al. 2022, "In-context Learning and Induction Heads").
    induction: PerHead

    def top(self, name: str, k: int = 5) -> list[tuple[int, int, float]]:
        """The ``k`` heads with the highest number of a kind, as (layer, head, number).

        Raises:
            ValueError: for a name that is none of the fields.
        """
        known = [field.name for field in fields(self)]
        if name not in known:
            raise ValueError(f"there is no {name!r} in an AttentionSummary: it has {', '.join(known)}")
        scores: Tensor = getattr(self, name)
        order = scores.flatten().argsort(descending=True)[:k].tolist()
        return [(*divmod(at, scores.shape[1]), float(scores.flatten()[at])) for at in order]


def attention_summary(model: Any, input: Prompt, cache: ActivationCache | None = None) -> AttentionSummary:
    """Measure where every head looks on a prompt, or on a batch of prompts of one length.

    Patterns are measured as they pass and not kept. Repeated random tokens, ``torch.cat([x, x], dim=1)``, are the usual
    input for ``induction`` and ``previous_token``; padding would be taken for text.

    Args:
        input: a text or tokens.
        cache: the activations of a run on this input, with every layer's ``pattern``, to save the run.

    Raises:
        UnknownPointError: (a KeyError) if the cache lacks a pattern.
        ValueError: for an input of one token.
    """
    tokens = as_tokens(model, input)
    if tokens.shape[1] < 2:
        raise ValueError("a prompt of one token leaves nothing to choose from: give two or more")
    places = _places(tokens)
    rows: dict[int, list[Tensor]] = {}

    def measure(layer: int, pattern: Tensor) -> None:
        rows[layer] = [_entropy(pattern), *(_share(pattern, *place) for place in places)]

    layers = range(model.cfg.n_layers)
    if cache is not None:
        for layer in layers:
            pattern = cache["pattern", layer]
            measure(layer, pattern if cache.has_batch_dim else pattern[None])
    else:
        hooks = [(get_act_name("pattern", layer), lambda p, hook: measure(hook.layer(), p)) for layer in layers]
        with torch.no_grad():
            model.run_with_hooks(tokens, return_type=None, fwd_hooks=hooks)
    return AttentionSummary(*(torch.stack(column) for column in zip(*(rows[layer] for layer in layers), strict=True)))


def _places(tokens: Int[Tensor, "batch pos"]) -> list[tuple[Tensor, Tensor]]:
    """For each share of `AttentionSummary`: the keys it counts, ``[batch, query, key]``, and the queries,
    ``[batch, query]``."""
    batch, length = tokens.shape
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after = torch.nn.functional.pad(same[:, :, :-1], (1, 0)).tril(-1)
    diagonal = torch.eye(length, dtype=torch.bool, device=tokens.device)
    first = torch.zeros_like(diagonal)
    first[:, 0] = True
    later = (torch.arange(length, device=tokens.device) > 0).expand(batch, -1)
    fixed = [diagonal.roll(-1, dims=1).tril(-1), first, diagonal]
    return [*((keys.expand(batch, -1, -1), later) for keys in fixed), *((keys, keys.any(-1)) for keys in (same, after))]


def _share(pattern: Float[Tensor, "batch head query key"], keys: Tensor, queries: Tensor) -> Float[Tensor, "head"]:
    keys, queries = keys.to(pattern.device), queries.to(pattern.device)
    counted = (pattern.float() * (keys & queries[:, :, None])[:, None]).sum((0, 2, 3))
    return counted / queries.sum()


def _entropy(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "head"]:
    return torch.special.entr(pattern.float()).sum(-1)[:, :, 1:].mean((0, 2))
