"""Which attention head is meant, and how is it switched off?

Every analysis of the demo scores heads in one ``[layer, head]`` table and then acts on a few of them, so picking heads
out of a table and silencing them is written once, here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float

from lensbridge.utils import get_act_name

if TYPE_CHECKING:
    from lensbridge.model import HookedTransformer

Hook = tuple[str, Callable[..., Any]]


class Head(NamedTuple):
    """One attention head: its layer and its number within the layer. Prints as ``L4H11``."""

    layer: int
    number: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.number}"


def all_heads(model: HookedTransformer) -> list[Head]:
    """Every head of the model, layer by layer."""
    return [Head(layer, number) for layer in range(model.cfg.n_layers) for number in range(model.cfg.n_heads)]


def ranked_heads(scores: Float[torch.Tensor, "layer head"], limit: int | None = None) -> list[Head]:
    """The heads in order of falling score, at most ``limit`` of them."""
    n_heads = scores.shape[1]
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [Head(*divmod(position, n_heads)) for position in order[:limit]]


def score_of(scores: Float[torch.Tensor, "layer head"], head: Head) -> float:
    """One entry of a ``[layer, head]`` table."""
    return float(scores[head.layer, head.number])


def zero_hooks(heads: Iterable[Head]) -> list[Hook]:
    """Forward hooks, for ``run_with_hooks``, that set the output (``hook_z``) of these heads to zero."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for head in heads:
        by_layer[head.layer].append(head.number)

    def silencer(indices: Sequence[int]) -> Callable[..., Any]:
        def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            z[:, :, list(indices)] = 0.0
            return z

        return silence

    return [(get_act_name("z", layer), silencer(indices)) for layer, indices in sorted(by_layer.items())]
