"""How does TransformerLens' key-value cache reach HuggingFace's attention, and come back?

TransformerLens' entries are plain tensors, [batch, pos, head, d_head] in the active basis, and stay the truth: HF's
cache is made from them for a run and read back after it, so that a user may edit, slice or build entries at will.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..basis import Basis
from ..errors import UnsupportedModelError
from .tensor_parallel import divide_heads, gather_heads, heads_are_divided

#: layer -> `Basis.value_bias`, to be computed once for the way there and back.
ValueBiases = dict[int, Tensor | None]
#: What a layer keeps that needs no more than its keys and values.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def empty_cache(hf_model: Any) -> DynamicCache:
    """HF's cache at the start of a text: where layers keep more than keys and values, as its config says.

    Otherwise all positions are kept, those outside of a sliding window too, which patterns show as not attended to.
    """
    as_configured = DynamicCache(config=hf_model.config)
    return as_configured if _keeps_more(as_configured) else DynamicCache()


def _keeps_more(cache: DynamicCache) -> bool:
    return any(type(layer) not in KEYS_AND_VALUES for layer in cache.layers)


def _to_hf(basis: Basis, layer: int, letter: str, tensor: Tensor, biases: ValueBiases) -> Tensor:
    # A model of our own is on one device.
    tensor = tensor if basis.hf_model is None else tensor.to(basis.device_of(layer))
    maps = basis.head_maps(layer)
    if maps is not None:
        tensor = torch.einsum("bphd,hde->bphe", tensor, getattr(maps[1], letter))
    bias = _value_bias(basis, layer, biases) if letter == "v" else None
    heads = (tensor if bias is None else tensor + bias).transpose(1, 2)
    return divide_heads(basis.hf_model, heads) if _are_divided(basis, layer) else heads


def _are_divided(basis: Basis, layer: int) -> bool:
    """Whether HF's cache has some of the heads, those of this process."""
    return basis.hf_model is not None and heads_are_divided(basis.hf_model, basis.weights.architecture, layer)


def _from_hf(basis: Basis, layer: int, letter: str, tensor: Tensor, biases: ValueBiases) -> Tensor:
    tensor = tensor.transpose(1, 2)
    bias = _value_bias(basis, layer, biases) if letter == "v" else None
    if bias is not None:
        tensor = tensor - bias
    maps = basis.head_maps(layer)
    return tensor if maps is None else torch.einsum("bphd,hde->bphe", tensor, getattr(maps[0], letter))


def _value_bias(basis: Basis, layer: int, biases: ValueBiases) -> Tensor | None:
    if layer not in biases:
        biases[layer] = basis.value_bias(layer)
    return biases[layer]


def hf_cache(entries: dict[int, Any], basis: Basis, biases: ValueBiases | None = None) -> DynamicCache:
    """A HF cache that holds what the TransformerLens entries (by layer) hold.

    Args:
        biases: a dict for `append_new` to find the value biases in.

    Raises:
        UnsupportedModelError: the model's layers keep more than keys and values.
    """
    hf_model: Any = basis.hf_model
    if hf_model is not None and _keeps_more(DynamicCache(config=hf_model.config)):
        raise UnsupportedModelError(
            f"a TransformerLensKeyValueCache holds keys and values, and layers of {type(hf_model).__name__} keep more "
            "of a text than these (the state of a recurrence, say): run the whole text, or use generate()"
        )
    cache, biases = DynamicCache(), {} if biases is None else biases
    for layer, entry in entries.items():
        if entry.past_keys.shape[1]:
            keys = _to_hf(basis, layer, "k", entry.past_keys, biases)
            values = _to_hf(basis, layer, "v", entry.past_values, biases)
            cache.update(keys, values, basis.number(layer))
    return cache


def append_new(entries: dict[int, Any], cache: DynamicCache, basis: Basis, biases: ValueBiases | None = None) -> None:
    """Append to the entries what a run has added to the HF cache; frozen entries stay as they are.

    Raises:
        UnsupportedModelError: HF keeps something else in a layer than keys and values of the size that entries have.
    """
    biases = {} if biases is None else biases
    for layer, entry in entries.items():
        if not _are_divided(basis, layer):
            _refuse_others(layer, entry, cache.layers[basis.number(layer) : basis.number(layer) + 1])
    for layer, entry in entries.items():
        past = entry.past_keys.shape[1]
        kept: Any = cache.layers[basis.number(layer)]
        new = [each[:, :, past:] for each in (kept.keys, kept.values)]
        if _are_divided(basis, layer):
            new = [gather_heads(basis.hf_model, each) for each in new]
        keys, values = (_from_hf(basis, layer, letter, each, biases) for letter, each in zip("kv", new, strict=True))
        entry.append(keys.to(entry.past_keys.device), values.to(entry.past_values.device))


def _refuse_others(layer: int, entry: Any, kept: list[Any]) -> None:
    """Latent keys and values have one head, those of some layers another size, and some layers none of their own."""
    heads, d_head = entry.past_keys.shape[2:]
    found = [getattr(each, name, None) for each in kept for name in ("keys", "values")]
    sizes = [None if tensor is None else (tensor.shape[1], tensor.shape[-1]) for tensor in found]
    if sizes != [(heads, d_head)] * 2:
        there = "; ".join(f"{size[0]} of {size[1]}" for size in sizes if size is not None)
        raise UnsupportedModelError(
            f"a TransformerLensKeyValueCache holds keys and values with {heads} heads of {d_head} numbers, and "
            f"HuggingFace keeps {f'other ones ({there})' if there else 'none'} of layer {layer} of this model, where "
            "attention is latent, say, or shares keys: run the whole text, or use generate()"
        )
