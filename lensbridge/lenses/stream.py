"""Which hook point is the residual stream at a layer, and what passes there?"""

from __future__ import annotations

import operator
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..utilities.components_utils import get_act_name

Prompt = str | list[str] | Int[Tensor, "batch pos"]


def as_tokens(model: Any, prompt: Prompt) -> Int[Tensor, "batch pos"]:
    """Tokens with a batch axis, on the model's device."""
    if not isinstance(prompt, Tensor):
        return model.to_tokens(prompt)
    return (prompt if prompt.dim() > 1 else prompt[None]).to(model.cfg.device)


def depth(model: Any, layer: int | None) -> int:
    """The layer as a number from 0 to ``n_layers``; -1 and None mean ``n_layers``.

    Raises:
        IndexError: for any other number.
    """
    n_layers = model.cfg.n_layers
    at = n_layers if layer is None or layer == -1 else operator.index(layer)
    if not 0 <= at <= n_layers:
        raise IndexError(
            f"there is no layer {layer}: give 0 to {n_layers - 1} for the stream that enters a block, or {n_layers}, "
            "-1 or None for what the last block leaves"
        )
    return at


def stream_point(model: Any, layer: int | None) -> str:
    """The hook point of the residual stream at a layer."""
    at = depth(model, layer)
    return get_act_name("resid_pre", at) if at < model.cfg.n_layers else get_act_name("resid_post", at - 1)


def position_in(length: int, position: int, what: str) -> int:
    """A position counted from the start.

    Raises:
        IndexError: if there is no such position.
    """
    if not -length <= position < length:
        raise IndexError(f"{what} {position} is outside the prompt, which has {length} tokens")
    return position % length


def residual_stream(model: Any, prompt: Prompt, layer: int | None = None) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream at a layer; later layers do not run.

    Raises:
        IndexError: for a layer that the model does not have.
    """
    return model(as_tokens(model, prompt), stop_at_layer=depth(model, layer))
