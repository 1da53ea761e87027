"""How does the residual stream become logits?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ._parameters import Config, bias, weight


class Unembed(nn.Module):
    """``residual @ W_U + b_U``, with ``d_vocab_out`` logits per position (TransformerLens' Unembed)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_U = weight(self.cfg.d_model, self.cfg.d_vocab_out, cfg=self.cfg)
        self.b_U = bias(self.cfg.d_vocab_out, cfg=self.cfg)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab_out"]:
        """The logits, before any softcap."""
        return self.hook_out(torch.nn.functional.linear(self.hook_in(residual), self.W_U.t(), self.b_U))
