"""How does a BERT token learn which of two sentences it belongs to?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ._parameters import Config, weight


class TokenTypeEmbed(nn.Module):
    """``W_token_type[0 or 1]``: a vector for the first sentence and one for the second (TransformerLens' class)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_token_type = weight(2, self.cfg.d_model, cfg=self.cfg)

    def forward(self, token_type_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The embedding of each token's type."""
        return torch.nn.functional.embedding(token_type_ids, self.W_token_type)
