"""Which small computations make up an attention layer?

Weights have one slice per head; each function here joins the heads into one matrix multiplication where the input is
the same for all heads, and keeps them apart where every head has an input of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def project(
    x: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos head_index d_model"],
    weight: Float[Tensor, "head_index d_model d_head"],
    bias: Float[Tensor, "head_index d_head"],
) -> Float[Tensor, "batch pos head_index d_head"]:
    """``x @ weight + bias`` for every head; a fourth dimension of ``x`` gives each head its own input."""
    if x.dim() == 4:
        return torch.einsum("bphm,hmd->bphd", x, weight) + bias
    joined = weight.transpose(1, 2).flatten(0, 1)
    return F.linear(x, joined, bias.flatten()).unflatten(-1, bias.shape)


def project_out(
    z: Float[Tensor, "batch pos head_index d_head"],
    weight: Float[Tensor, "head_index d_head d_model"],
    bias: Float[Tensor, "d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """The sum over heads of ``z @ weight``, plus ``bias``."""
    return F.linear(z.to(weight.dtype).flatten(2), weight.flatten(0, 1).t(), bias)


def results(
    z: Float[Tensor, "batch pos head_index d_head"], weight: Float[Tensor, "head_index d_head d_model"]
) -> Float[Tensor, "batch pos head_index d_model"]:
    """What each head adds to the residual stream, the bias apart."""
    return torch.einsum("bphd,hdm->bphm", z.to(weight.dtype), weight)


def softmax_with_sinks(
    scores: Float[Tensor, "batch head_index query key"], sinks: Float[Tensor, "head_index"]
) -> Float[Tensor, "batch head_index query key"]:
    """Softmax over the keys and one more column per head, which is then dropped: rows sum to less than one."""
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return F.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]


def log_length_scale(offset: int, length: int, train_length: int, like: Tensor) -> Float[Tensor, "pos"] | None:
    """Qwen 1's factor for the queries at positions past the training length; None where no position is."""
    if offset + length <= train_length:
        return None
    positions = torch.arange(offset + 1, offset + length + 1, device=like.device, dtype=torch.float32)
    return (positions.log() / math.log(train_length)).clamp(min=1.0).to(like.dtype)


def normed_flat(norm: torch.nn.Module, x: Float[Tensor, "*batch d_head"]) -> Float[Tensor, "*batch d_head"]:
    """A norm over ``d_head`` whose hook points see ``[batch * pos * head_index, d_head]``."""
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)


def normed_jointly(
    norm: torch.nn.Module, x: Float[Tensor, "batch pos head_index d_head"]
) -> Float[Tensor, "batch pos head_index d_head"]:
    """A norm over all heads together (OLMo 2 and 3, OLMoE)."""
    return norm(x.flatten(2)).view(x.shape)
