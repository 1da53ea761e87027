"""How does TransformerLens' key-value cache reach HuggingFace's attention, and come back?

TransformerLens' entries are plain tensors, [batch, pos, head, d_head] in the active basis, and stay the truth: HF's
cache is made from them for a run and read back after it, so that a user may edit, slice or build entries at will.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..basis import Basis


def _to_hf(basis: Basis, layer: int, letter: str, tensor: Tensor) -> Tensor:
    maps = basis.head_maps(layer)
    if maps is not None:
        tensor = torch.einsum("bphd,hde->bphe", tensor, getattr(maps[1], letter))
    bias = basis.value_bias(layer) if letter == "v" else None
    return (tensor if bias is None else tensor + bias).transpose(1, 2)


def _from_hf(basis: Basis, layer: int, letter: str, tensor: Tensor) -> Tensor:
    tensor = tensor.transpose(1, 2)
    bias = basis.value_bias(layer) if letter == "v" else None
    if bias is not None:
        tensor = tensor - bias
    maps = basis.head_maps(layer)
    return tensor if maps is None else torch.einsum("bphd,hde->bphe", tensor, getattr(maps[0], letter))


def hf_cache(entries: dict[int, Any], basis: Basis) -> DynamicCache:
    """A HF cache that holds what the TransformerLens entries (by layer) hold."""
    cache = DynamicCache()
    for layer, entry in entries.items():
        if entry.past_keys.shape[1]:
            keys, values = _to_hf(basis, layer, "k", entry.past_keys), _to_hf(basis, layer, "v", entry.past_values)
            cache.update(keys, values, layer)
    return cache


def append_new(entries: dict[int, Any], cache: DynamicCache, basis: Basis) -> None:
    """Append to the entries what a run has added to the HF cache; frozen entries stay as they are."""
    for layer, entry in entries.items():
        past = entry.past_keys.shape[1]
        kept: Any = cache.layers[layer]
        keys, values = kept.keys, kept.values
        entry.append(_from_hf(basis, layer, "k", keys[:, :, past:]), _from_hf(basis, layer, "v", values[:, :, past:]))
