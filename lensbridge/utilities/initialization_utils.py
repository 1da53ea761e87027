"""How are weights in TransformerLens' shapes drawn at random?

Its weights are written ``[d_in, d_out]`` and ``[n_heads, d_model, d_head]``, the transpose of torch's convention, so
the numbers of inputs and outputs (fan in and fan out) have to be read differently. The formulas are Xavier's
(https://proceedings.mlr.press/v9/glorot10a.html) and Kaiming's (https://arxiv.org/abs/1502.01852).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

#: What ``torch.nn.init.calculate_gain`` knows.
NonlinearityType = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "selu",
]


def calc_fan_in_and_fan_out(tensor: torch.Tensor) -> tuple[int, int]:
    """Number of inputs and outputs of a weight: ``[d_out]``, ``[d_in, d_out]`` or ``[n_heads, d_model, d_head]``.

    Raises:
        ValueError: the tensor has no dimension or more than three.
    """
    shape = tuple(tensor.shape)
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape
    if len(shape) == 3:
        n_heads, d_model, d_head = shape
        return d_model, n_heads * d_head
    raise ValueError(f"Fan in and fan out are defined for 1, 2 or 3 dimensions, not for a tensor of shape {shape}.")


def _xavier_std(param: torch.Tensor, gain: float) -> float:
    return gain * math.sqrt(2.0 / sum(calc_fan_in_and_fan_out(param)))


def _kaiming_std(param: torch.Tensor, a: float, nonlinearity: NonlinearityType, gain: float, mode: str) -> float:
    fans = dict(zip(("fan_in", "fan_out"), calc_fan_in_and_fan_out(param), strict=True))
    if mode not in fans:
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', not {mode!r}.")
    return gain * nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fans[mode])


def _uniform_(param: torch.Tensor, std: float) -> torch.Tensor:
    """A uniform distribution with this standard deviation reaches sqrt(3) times as far."""
    bound = math.sqrt(3.0) * std
    return nn.init.uniform_(param, -bound, bound)


def init_xavier_uniform_(param: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Fill ``param`` in place, uniformly, with variance ``2 gain**2 / (fan_in + fan_out)``; returns it."""
    return _uniform_(param, _xavier_std(param, gain))


def init_xavier_normal_(param: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Fill ``param`` in place, normally distributed, with variance ``2 gain**2 / (fan_in + fan_out)``; returns it."""
    return nn.init.normal_(param, mean=0.0, std=_xavier_std(param, gain))


def init_kaiming_uniform_(
    param: torch.Tensor,
    a: float = 0,
    nonlinearity: NonlinearityType = "relu",
    gain: float = 1.0,
    mode: str = "fan_in",
) -> torch.Tensor:
    """Fill ``param`` in place, uniformly, with variance ``(gain * gain of the nonlinearity)**2 / fan``; returns it.

    ``mode`` says which fan (``"fan_in"`` or ``"fan_out"``); ``a`` is the nonlinearity's parameter, if it has one.

    Raises:
        ValueError: the mode or the nonlinearity is unknown.
    """
    return _uniform_(param, _kaiming_std(param, a, nonlinearity, gain, mode))


def init_kaiming_normal_(
    param: torch.Tensor,
    a: float = 0,
    nonlinearity: NonlinearityType = "relu",
    gain: float = 1.0,
    mode: str = "fan_in",
) -> torch.Tensor:
    """Fill ``param`` in place, normally distributed, otherwise as :func:`init_kaiming_uniform_`; returns it."""
    return nn.init.normal_(param, mean=0.0, std=_kaiming_std(param, a, nonlinearity, gain, mode))
