"""How does BERT put a whole text into one vector?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ._parameters import Config, bias, weight


class BertPooler(nn.Module):
    """``tanh(resid @ W + b)`` at the first token, ``[CLS]`` (TransformerLens' BertPooler)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = weight(self.cfg.d_model, self.cfg.d_model, cfg=self.cfg)
        self.b = bias(self.cfg.d_model, cfg=self.cfg)
        self.activation = nn.Tanh()
        self.hook_pooler_out = HookPoint()

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch d_model"]:
        """One vector per text."""
        return self.hook_pooler_out(self.activation(resid[:, 0] @ self.W + self.b))
