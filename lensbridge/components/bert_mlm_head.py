"""How does BERT prepare its stream for guessing masked tokens?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ._parameters import Config, bias, weight
from .layer_norm import LayerNorm


class BertMLMHead(nn.Module):
    """``ln(gelu(resid @ W + b))``, to be unembedded (TransformerLens' BertMLMHead)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = weight(self.cfg.d_model, self.cfg.d_model, cfg=self.cfg)
        self.b = bias(self.cfg.d_model, cfg=self.cfg)
        self.act_fn = nn.GELU()
        self.ln = LayerNorm(self.cfg)

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the unembedding reads."""
        return self.ln(self.act_fn(resid @ self.W + self.b))
