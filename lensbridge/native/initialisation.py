"""How are the weights of a new model drawn?

One after another, in the order in which the model lists its parameters, so that a seed gives the weights that it gives
in TransformerLens 3.9.0. Only parameters with ``W_`` in their name are drawn; biases stay zero, norms stay one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ..config import HookedTransformerConfig
from ..utilities.initialization_utils import (
    calc_fan_in_and_fan_out,
    init_kaiming_normal_,
    init_kaiming_uniform_,
    init_xavier_normal_,
    init_xavier_uniform_,
)

#: Fills one parameter, given its name.
Draw = Callable[[str, torch.Tensor], object]


def _gpt2(name: str, parameter: torch.Tensor, scale: float) -> object:
    return nn.init.normal_(parameter, std=scale)


def _mu_p(name: str, parameter: torch.Tensor, scale: float) -> object:
    """muP (https://arxiv.org/abs/2203.03466) as in TransformerLens, where the unembedding counts as an embedding."""
    fan_in, _ = calc_fan_in_and_fan_out(parameter)
    return nn.init.normal_(parameter, std=1.0 if "embed" in name else 1 / math.sqrt(fan_in))


#: What each ``init_mode`` does with a parameter; the last argument is ``initializer_range``, a deviation or a gain.
MODES: dict[str, Callable[[str, torch.Tensor, float], object]] = {
    "gpt2": _gpt2,
    "xavier_uniform": lambda name, parameter, gain: init_xavier_uniform_(parameter, gain=gain),
    "xavier_normal": lambda name, parameter, gain: init_xavier_normal_(parameter, gain=gain),
    "kaiming_uniform": lambda name, parameter, gain: init_kaiming_uniform_(parameter, gain=gain),
    "kaiming_normal": lambda name, parameter, gain: init_kaiming_normal_(parameter, gain=gain),
    "muP": _mu_p,
}


def draw_for(cfg: HookedTransformerConfig) -> Draw:
    """The function that draws a parameter of a model of this config.

    Raises:
        ValueError: the ``init_mode`` is unknown.
    """
    if cfg.init_mode not in MODES:
        raise ValueError(f"init_mode={cfg.init_mode!r} is unknown: one of {', '.join(map(repr, MODES))}")
    mode, scale = MODES[cfg.init_mode], cfg.initializer_range
    return lambda name, parameter: mode(name, parameter, scale)


def is_drawn(name: str) -> bool:
    """Whether a parameter of this name is drawn; the others start at zero or one."""
    return "W_" in name


def init_weights(model: nn.Module, cfg: HookedTransformerConfig) -> None:
    """Draw all weights of ``model``, after seeding torch where the config has a seed."""
    draw = draw_for(cfg)
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    for name, parameter in model.named_parameters():
        if is_drawn(name):
            draw(name, parameter)
