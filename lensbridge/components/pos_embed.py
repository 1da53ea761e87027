"""How do positions become vectors?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..utilities.tensors import get_offset_position_ids
from ._parameters import Config, weight


class PosEmbed(nn.Module):
    """A learned vector for each position, ``W_pos[position]`` (TransformerLens' PosEmbed)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_pos = weight(self.cfg.n_ctx, self.cfg.d_model, cfg=self.cfg)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The embedding of each token's position; of ``tokens`` only the shape is used.

        ``past_kv_pos_offset`` tokens came before, in a key-value cache. With a mask (of those too), positions count
        attended tokens only, and the others get zeros.

        Raises:
            IndexError: a position lies beyond ``n_ctx``.
        """
        batch, length = tokens.shape
        end = past_kv_pos_offset + length
        if attention_mask is None:
            if end > len(self.W_pos):
                raise IndexError(
                    f"the input is {end} tokens long (with the key-value cache), n_ctx is {self.cfg.n_ctx}"
                )
            # Each row its own copy, so that a hook can edit one in place.
            return self.W_pos[past_kv_pos_offset:end].repeat(batch, 1, 1)
        embedded = self.at(get_offset_position_ids(past_kv_pos_offset, attention_mask))
        padding = attention_mask[:, past_kv_pos_offset:end] == 0
        return embedded.masked_fill(padding.unsqueeze(-1), 0)

    def at(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The embedding of these positions."""
        return torch.nn.functional.embedding(positions, self.W_pos)
