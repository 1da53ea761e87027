"""How does attention keep its keys and values in HuggingFace's cache?

Attention asks an entry how much it holds and appends to it. A layer of a ``DynamicCache`` can do both, with heads and
positions the other way round. Keys are stored as TransformerLens stores them, before rotary embedding, so such a cache
serves this model only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache

Heads = Float[Tensor, "batch pos n_heads d_head"]


class HFEntry:
    """One layer of HuggingFace's cache as attention wants it."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    @property
    def past_keys(self) -> Tensor:
        """Something of the right length; nobody reads its values."""
        return torch.empty(0, self.cache.get_seq_length(self.layer))

    def append(self, new_keys: Heads, new_values: Heads) -> tuple[Heads, Heads]:
        """All keys and values, the new ones last."""
        keys, values = self.cache.update(new_keys.transpose(1, 2), new_values.transpose(1, 2), self.layer)
        return keys.transpose(1, 2), values.transpose(1, 2)


class HFEntries:
    """HuggingFace's cache as blocks want it: one entry per layer.

    Raises:
        ValueError: the cache is of a kind that does not hand back just the keys it was given.
    """

    def __init__(self, cache: Cache) -> None:
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"past_key_values must be a DynamicCache, not a {type(cache).__name__}")
        self.cache = cache

    def __getitem__(self, layer: int) -> HFEntry:
        return HFEntry(self.cache, layer)
