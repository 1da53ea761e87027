"""What a model remembers of the text so far, layer by layer, with the mask that says which tokens are text.

The cache is passed to the model with each new piece of text. A frozen cache is used but not extended, so that many
continuations of one beginning can be run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

from lensbridge.utilities.multi_gpu import get_device_for_block_index

from .key_value_cache_entry import TransformerLensKeyValueCacheEntry


@dataclass
class TransformerLensKeyValueCache:
    """Keys and values of each layer, and the attention mask so far (TransformerLens' class of the same name)."""

    entries: list[TransformerLensKeyValueCacheEntry]
    previous_attention_mask: Int[torch.Tensor, "batch pos_so_far"]
    #: Whether the cache stays as it is when it is used.
    frozen: bool = False

    @classmethod
    def init_cache(
        cls, cfg: Any, device: torch.device | str | None, batch_size: int = 1
    ) -> TransformerLensKeyValueCache:
        """A cache without tokens for a model of this config.

        Entries are on the devices of their blocks, counted from ``device`` (None: the config's, else the CPU).
        """
        first = device or cfg.device or "cpu"
        if hasattr(cfg, "n_devices") and cfg.device is not None:
            devices = [get_device_for_block_index(layer, cfg, first) for layer in range(cfg.n_layers)]
        else:
            devices = [torch.device(first)] * cfg.n_layers
        return cls(
            entries=[TransformerLensKeyValueCacheEntry.init_cache_entry(cfg, place, batch_size) for place in devices],
            previous_attention_mask=torch.empty(batch_size, 0, device=first, dtype=torch.int),
        )

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        for entry in self.entries:
            entry.frozen = frozen

    def freeze(self) -> None:
        """Keep the cache, with all its entries, as it is from now on."""
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """Let the cache, with all its entries, grow again."""
        self._set_frozen(False)

    def append_attention_mask(
        self, attention_mask: Int[torch.Tensor, "batch new_tokens"]
    ) -> Int[torch.Tensor, "batch pos_so_far_plus_new_tokens"]:
        """The mask of all tokens, the new ones last; the cache keeps it unless it is frozen.

        Raises:
            RuntimeError: the batch sizes differ.
        """
        so_far = self.previous_attention_mask
        updated = torch.cat((so_far, attention_mask.to(so_far.device)), dim=-1)
        if not self.frozen:
            self.previous_attention_mask = updated
        return updated

    def __getitem__(self, idx: int) -> TransformerLensKeyValueCacheEntry:
        """The entry of one layer."""
        return self.entries[idx]
