"""Does the key-value cache grow, freeze and sit on the right devices?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lensbridge.cache import TransformerLensKeyValueCache, TransformerLensKeyValueCacheEntry


def config(**changed: Any) -> Any:
    sizes = {"n_layers": 4, "n_heads": 6, "n_key_value_heads": None, "d_head": 5, "dtype": torch.float32}
    return SimpleNamespace(**{**sizes, "device": "cpu", "n_devices": 1, **changed})


@pytest.mark.parametrize(("kv_heads", "heads"), [(None, 6), (2, 2)])
def test_a_new_cache_is_empty(kv_heads: int | None, heads: int) -> None:
    cache = TransformerLensKeyValueCache.init_cache(
        config(n_key_value_heads=kv_heads, dtype=torch.bfloat16), "cpu", batch_size=3
    )
    assert len(cache.entries) == 4
    assert cache.previous_attention_mask.shape == (3, 0)
    for layer in range(4):
        entry = cache[layer]
        assert isinstance(entry, TransformerLensKeyValueCacheEntry)
        assert entry.past_keys.shape == entry.past_values.shape == (3, 0, heads, 5)
        assert entry.past_keys.dtype == entry.past_values.dtype == torch.bfloat16


def test_entries_grow_until_they_are_frozen() -> None:
    cache = TransformerLensKeyValueCache.init_cache(config(), None)
    first, second = torch.randn(2, 1, 3, 6, 5), torch.randn(2, 1, 2, 6, 5)
    keys, values = cache[2].append(*first)
    assert torch.equal(keys, first[0]) and torch.equal(values, first[1])
    cache.append_attention_mask(torch.ones(1, 3, dtype=torch.int64))

    cache.freeze()
    assert cache.frozen and all(entry.frozen for entry in cache.entries)
    keys, values = cache[2].append(*second)
    assert torch.equal(keys, torch.cat([first[0], second[0]], dim=1))
    assert torch.equal(values, torch.cat([first[1], second[1]], dim=1))
    mask = cache.append_attention_mask(torch.zeros(1, 2, dtype=torch.int64))
    assert mask.tolist() == [[1, 1, 1, 0, 0]]
    assert torch.equal(cache[2].past_keys, first[0]) and torch.equal(cache[2].past_values, first[1])
    assert cache.previous_attention_mask.tolist() == [[1, 1, 1]]

    cache.unfreeze()
    assert not cache.frozen and not any(entry.frozen for entry in cache.entries)
    cache[2].append(*second)
    cache.append_attention_mask(torch.zeros(1, 2, dtype=torch.int64))
    assert cache[2].past_keys.shape[1] == cache.previous_attention_mask.shape[1] == 5
    assert cache[0].past_keys.shape[1] == 0


def test_entries_do_not_share_memory() -> None:
    cache = TransformerLensKeyValueCache.init_cache(config(), None)
    cache[0].append(torch.ones(1, 1, 6, 5), torch.zeros(1, 1, 6, 5))
    assert cache[0].past_keys.all() and not cache[0].past_values.any()
    assert cache[1].past_keys.numel() == 0


def test_batches_that_differ_are_refused() -> None:
    cache = TransformerLensKeyValueCache.init_cache(config(), None, batch_size=2)
    with pytest.raises(RuntimeError):
        cache[0].append(torch.zeros(3, 1, 6, 5), torch.zeros(3, 1, 6, 5))
    with pytest.raises(RuntimeError):
        cache.append_attention_mask(torch.ones(3, 1))


def test_entries_are_where_their_blocks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[Any] = []
    monkeypatch.setattr(
        TransformerLensKeyValueCacheEntry, "init_cache_entry", lambda cfg, device, batch_size: placed.append(device)
    )
    TransformerLensKeyValueCache.init_cache(config(device="meta", n_devices=2), "meta")
    assert [device.index for device in placed] == [0, 0, 1, 1]
    placed.clear()
    cache = TransformerLensKeyValueCache.init_cache(config(device=None), None)
    assert placed == [torch.device("cpu")] * 4
    assert cache.previous_attention_mask.device.type == "cpu"
