"""How do tokens become vectors?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ._parameters import Config, weight
from .layer_norm import LayerNorm


class Embed(nn.Module):
    """``W_E[token]``, normed when ``cfg.post_embedding_ln`` says so, as in Bloom (TransformerLens' Embed)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_E = weight(self.cfg.d_vocab, self.cfg.d_model, cfg=self.cfg)
        if self.cfg.post_embedding_ln:
            self.ln = LayerNorm(self.cfg)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The embedding of each token."""
        embedded = torch.nn.functional.embedding(tokens, self.W_E)
        return self.ln(embedded) if self.cfg.post_embedding_ln else embedded
