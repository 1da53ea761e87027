"""How are a component's parameters made?

Weights are left as the memory they are given: a model draws them (`lensbridge.native.initialisation`), or a state dict
fills them. Biases are zero from the start, as in TransformerLens, because no init mode draws them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import HookedTransformerConfig, TransformerLensConfig

#: What every component takes: a config, or a dict of its fields.
Config = HookedTransformerConfig | TransformerLensConfig | dict[str, Any]


def weight(*shape: int, cfg: HookedTransformerConfig) -> nn.Parameter:
    """A weight of this shape in the config's dtype, not yet drawn."""
    return nn.Parameter(torch.empty(*shape, dtype=cfg.dtype))


def bias(*shape: int, cfg: HookedTransformerConfig) -> nn.Parameter:
    """Zeros of this shape in the config's dtype."""
    return nn.Parameter(torch.zeros(*shape, dtype=cfg.dtype))
