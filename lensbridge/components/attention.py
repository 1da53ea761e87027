"""What is attention with keys and values of its own for every head?"""

from __future__ import annotations

from ._parameters import Config, bias, weight
from .abstract_attention import AbstractAttention


class Attention(AbstractAttention):
    """Multi-head attention; all weights ``[head_index, d_model, d_head]``, ``W_O`` the other way round.

    Arguments as for `AbstractAttention` (TransformerLens' Attention).
    """

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        super().__init__(cfg, attn_type, layer_id)
        n_heads, d_model, d_head = self.W_Q.shape
        self.W_K = weight(n_heads, d_model, d_head, cfg=self.cfg)
        self.W_V = weight(n_heads, d_model, d_head, cfg=self.cfg)
        self.b_K = bias(n_heads, d_head, cfg=self.cfg)
        self.b_V = bias(n_heads, d_head, cfg=self.cfg)
