"""What does the model do when a direction is added to its residual stream?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .stream import Prompt, position_in, residual_stream, stream_point

#: Which positions of a run are meant: all, one, a slice, or several.
Positions = int | slice | list[int] | Tensor | None
Direction = Float[Tensor, "*batch_and_pos d_model"]


@contextmanager
def steer(
    model: Any,
    direction: Direction,
    *,
    layer: int | None | Iterable[int],
    coefficient: float = 1.0,
    positions: Positions = None,
) -> Iterator[Any]:
    """A context in which every run of the model has ``coefficient * direction`` added to its residual stream.

    Activation addition (Turner et al. 2023, "Steering Language Models With Activation Engineering") adds the difference
    of two prompts' streams at the first positions of the run: pass ``[pos, d_model]`` and ``positions=slice(0, n)``.
    Contrastive activation addition (Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition") adds
    one direction, as `mean_difference` finds it, at every position after the prompt.

    Args:
        direction: ``[d_model]``, or anything that can be added to ``[batch, chosen positions, d_model]``, in the basis
            that the model shows.
        layer: where, as everywhere in `lensbridge.lenses`; several layers get the same direction.
        coefficient: how much; negative to steer away.
        positions: which positions of each run get it, counted within that run: None for all, an int, a slice, or a
            list. In ``generate`` with a key-value cache, each step after the first is a run of one position: turn the
            cache off (``use_past_kv_cache=False``) to steer positions of the prompt only.

    Raises:
        IndexError: for a layer that the model does not have.
        TypeError: if the direction is no tensor.
        ValueError: if the last axis of the direction is not ``d_model``.
    """
    if not isinstance(direction, Tensor):
        raise TypeError(f"a direction is a tensor that ends in d_model, not a {type(direction).__name__}")
    if direction.shape[-1] != model.cfg.d_model:
        raise ValueError(f"a direction ends in d_model={model.cfg.d_model}, but this is {tuple(direction.shape)}")
    chosen = [positions] if isinstance(positions, int) else slice(None) if positions is None else positions

    def add(resid: Tensor, hook: Any) -> Tensor:
        resid[:, chosen] += coefficient * direction.to(resid)
        return resid

    layers = layer if isinstance(layer, Iterable) else [layer]
    with model.hooks(fwd_hooks=[(stream_point(model, at), add) for at in layers]):
        yield model


def steered(
    model: Any,
    input: Prompt,
    direction: Direction,
    *,
    layer: int | None | Iterable[int],
    coefficient: float = 1.0,
    positions: Positions = None,
    **forward_arguments: Any,
) -> Any:
    """One run under `steer`: ``model(input, **forward_arguments)``, by default the logits."""
    with steer(model, direction, layer=layer, coefficient=coefficient, positions=positions):
        return model(input, **forward_arguments)


def mean_difference(
    model: Any,
    positive: Iterable[str | Tensor],
    negative: Iterable[str | Tensor],
    *,
    layer: int | None,
    position: int = -1,
) -> Float[Tensor, "d_model"]:
    """The mean residual stream of some prompts minus that of others, at one layer and position: a direction.

    Where the two sets differ in one concept, it stands for that concept (Rimsky et al. 2024; Marks and Tegmark 2023,
    "The Geometry of Truth"). Prompts run one by one and without gradients, so they may differ in length and none is
    padded; of a tensor of tokens, ``[batch, pos]``, every row is a prompt.

    Raises:
        IndexError: for a layer that the model does not have, or a position outside a prompt.
        ValueError: if one of the sets is empty.
    """
    return _mean(model, positive, layer, position, "positive") - _mean(model, negative, layer, position, "negative")


def _mean(model: Any, prompts: Iterable[str | Tensor], layer: int | None, position: int, which: str) -> Tensor:
    if isinstance(prompts, str):
        raise TypeError(f"{which} is a collection of prompts, not one text")
    states = []
    with torch.no_grad():
        for prompt in prompts:
            stream = residual_stream(model, prompt, layer)[0]
            states.append(stream[position_in(len(stream), position, "position")])
    if not states:
        raise ValueError(f"there are no {which} prompts")
    return torch.stack(states).mean(0)
