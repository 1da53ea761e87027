"""How does BERT say whether one sentence follows another?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ._parameters import Config, bias, weight


class BertNSPHead(nn.Module):
    """Two logits, for "follows" and "does not follow" (TransformerLens' BertNSPHead)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = weight(self.cfg.d_model, 2, cfg=self.cfg)
        self.b = bias(2, cfg=self.cfg)
        self.hook_nsp_out = HookPoint()

    def forward(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch 2"]:
        """The logits for the pooled vectors of pairs of sentences."""
        return self.hook_nsp_out(resid @ self.W + self.b)
