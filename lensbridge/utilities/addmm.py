"""How is a bias added to a matrix product in one step, under TransformerLens' names?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def vanilla_addmm(
    input: Float[Tensor, "... #o"], mat1: Float[Tensor, "m n"], mat2: Float[Tensor, "n o"]
) -> Float[Tensor, "m o"]:
    """``input + mat1 @ mat2``, for matrices."""
    return torch.addmm(input, mat1, mat2)


def batch_addmm(
    bias: Float[Tensor, "... #d_out"], weight: Float[Tensor, "d_in d_out"], x: Float[Tensor, "... d_in"]
) -> Float[Tensor, "... d_out"]:
    """``x @ weight + bias``, with any leading dimensions of ``x``."""
    return vanilla_addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[-1])
