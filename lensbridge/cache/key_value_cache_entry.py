"""What one layer remembers of the tokens it has seen: their keys and values.

Keys are kept before rotary embedding and, under grouped-query attention, once per key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float


@dataclass
class TransformerLensKeyValueCacheEntry:
    """Keys and values of one layer so far (TransformerLens' class of the same name)."""

    past_keys: Float[torch.Tensor, "batch pos_so_far n_heads d_head"]
    past_values: Float[torch.Tensor, "batch pos_so_far n_heads d_head"]
    #: Whether :meth:`append` leaves the entry as it is.
    frozen: bool = False

    @classmethod
    def init_cache_entry(
        cls, cfg: Any, device: torch.device | str | None, batch_size: int = 1
    ) -> TransformerLensKeyValueCacheEntry:
        """An entry without tokens, in the config's dtype, so that appending leaves the dtype of the model's values."""
        n_heads = cfg.n_heads if cfg.n_key_value_heads is None else cfg.n_key_value_heads
        keys, values = torch.empty(2, batch_size, 0, n_heads, cfg.d_head, device=device, dtype=cfg.dtype)
        return cls(past_keys=keys, past_values=values)

    def append(
        self,
        new_keys: Float[torch.Tensor, "batch new_tokens n_heads d_head"],
        new_values: Float[torch.Tensor, "batch new_tokens n_heads d_head"],
    ) -> tuple[
        Float[torch.Tensor, "batch pos_so_far_plus_new_tokens n_heads d_head"],
        Float[torch.Tensor, "batch pos_so_far_plus_new_tokens n_heads d_head"],
    ]:
        """All keys and values, the new ones last; the entry keeps them unless it is frozen.

        Raises:
            RuntimeError: the new ones do not have the batch size or the heads of the old.
        """
        keys = torch.cat((self.past_keys, new_keys), dim=1)
        values = torch.cat((self.past_values, new_values), dim=1)
        if not self.frozen:
            self.past_keys, self.past_values = keys, values
        return keys, values
