"""How do single heads and neurons add to the residual stream, and how are such parts put in one stack?

A *stack* is a tensor ``[components, *batch_and_pos, d_model]`` whose first axis runs over parts of the residual stream.
Everything here is a function of tensors: no model, no cache. Weights follow the activations to their device, so a
cache that was moved to the CPU can still be taken apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import einsum
from jaxtyping import Float

from lensbridge.utilities.slice import Slice, SliceInput

#: Parts of the residual stream; batch and position dimensions are there unless they were sliced away.
Stack = Float[torch.Tensor, "components *batch_and_pos d_model"]
#: Directions to project on, as columns.
Projection = Float[torch.Tensor, "d_model outputs"]


def as_slice(given: Slice | SliceInput) -> Slice:
    """The slice itself, or one made from an int, a tuple, a list, an array or None."""
    return given if isinstance(given, Slice) else Slice(given)


def join(parts: Iterable[torch.Tensor]) -> Stack:
    """One stack from parts of equal shape.

    Raises:
        RuntimeError: there are none, which is what the arguments of the caller amounted to.
    """
    parts = list(parts)
    if not parts:
        raise RuntimeError("There is nothing to stack: with these arguments no component is left.")
    return torch.stack(together(parts))


def together(parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The parts on the device of the first: layers may be on several."""
    parts = list(parts)
    return [part.to(parts[0].device) for part in parts]


def head_results(z: torch.Tensor, W_O: torch.Tensor) -> torch.Tensor:
    """What each head writes to the residual stream, without the bias of the output projection.

    From ``[*batch_and_pos, heads, d_head]`` and ``[heads, d_head, d_model]`` to ``[*batch_and_pos, heads, d_model]``.
    """
    return einsum(z, W_O.to(z.device), "... head d_head, head d_head d_model -> ... head d_model")


def neuron_results(activations: torch.Tensor, W_out: torch.Tensor, projection: Projection | None) -> torch.Tensor:
    """What each neuron writes to the residual stream, projected if asked for.

    ``activations`` is ``[*batch_and_pos, neurons]`` and ``W_out`` ``[neurons, d_model]``; the neuron dimension may be
    absent from both. Projecting comes first, so that ``[..., neurons, d_model]`` is never built when it need not be.
    """
    directions = W_out.to(activations.device)
    if projection is not None:
        directions = directions @ projection.to(directions.device)
    return activations[..., None] * directions


def as_matrix(projection: torch.Tensor | None) -> tuple[Projection | None, bool]:
    """The projection as a matrix, and whether it was given as a single vector.

    Raises:
        ValueError: it is neither a vector nor a matrix.
    """
    if projection is None or projection.ndim == 2:
        return projection, False
    if projection.ndim != 1:
        raise ValueError(
            f"project_output_onto must be [d_model] or [d_model, num_outputs], not {tuple(projection.shape)}."
        )
    return projection[:, None], True


def centred(stack: torch.Tensor) -> torch.Tensor:
    """The stack minus its mean over d_model, the linear part of LayerNorm."""
    return stack - stack.mean(dim=-1, keepdim=True)


def one_scale_for_all_heads(scale: torch.Tensor) -> torch.Tensor:
    """The scale that all heads share, from ``[*batch_and_pos, heads, 1]``: one for the input of each head.

    Raises:
        RuntimeError: a hook has made the heads' inputs different, so that there is no one scale.
    """
    first = scale[..., :1, :]
    if not torch.allclose(scale, first.expand_as(scale)):
        raise RuntimeError(
            "The heads of this layer read different inputs, so no single norm scale applies to a part of the residual "
            "stream. Run without the hook that edits one head's input, or without use_split_qkv_input and use_attn_in."
        )
    return first.squeeze(-2)
