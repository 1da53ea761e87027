"""How do tokens, positions and sentences become BERT's vectors?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ._parameters import Config
from .embed import Embed
from .layer_norm import LayerNorm
from .pos_embed import PosEmbed
from .token_typed_embed import TokenTypeEmbed


class BertEmbed(nn.Module):
    """The sum of the embeddings of token, position and token type, normed (TransformerLens' BertEmbed)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.embed = Embed(self.cfg)
        self.pos_embed = PosEmbed(self.cfg)
        self.token_type_embed = TokenTypeEmbed(self.cfg)
        self.ln = LayerNorm(self.cfg)
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.hook_token_type_embed = HookPoint()

    def forward(
        self, input_ids: Int[Tensor, "batch pos"], token_type_ids: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The first residual stream; without types all tokens are of the first sentence."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        tokens = self.hook_embed(self.embed(input_ids))
        positions = self.hook_pos_embed(self.pos_embed(input_ids))
        types = self.hook_token_type_embed(self.token_type_embed(token_type_ids))
        return self.ln(tokens + positions + types)
