"""Does the key-value cache grow as that of TransformerLens 3.9.0?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as TheirCache

from compat_tests.agreement import outcome, same
from lensbridge.cache import TransformerLensKeyValueCache


@pytest.mark.parametrize("n_key_value_heads", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_devices", [1, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_cache(n_key_value_heads: int | None, dtype: torch.dtype, n_devices: int | None, batch: int) -> None:
    sizes = {"n_layers": 3, "n_heads": 4, "d_head": 5, "device": "cpu", "n_key_value_heads": n_key_value_heads}
    cfg: Any = SimpleNamespace(**sizes, dtype=dtype, **({} if n_devices is None else {"n_devices": n_devices}))
    caches = [kind.init_cache(cfg, None, batch) for kind in (TransformerLensKeyValueCache, TheirCache)]
    torch.manual_seed(0)
    for step, frozen in enumerate((False, True, False)):
        keys, values = torch.randn(2, batch, 2 + step, n_key_value_heads or 4, 5, dtype=dtype)
        mask = torch.randint(0, 2, (batch, 2 + step))
        states = []
        for cache in caches:
            (cache.freeze if frozen else cache.unfreeze)()
            returned = [cache.append_attention_mask(mask), *cache[1].append(keys, values)]
            flags = [cache.frozen, *(entry.frozen for entry in cache.entries)]
            assert cache[1] is cache.entries[1]
            kept = [cache.previous_attention_mask, *(t for e in cache.entries for t in (e.past_keys, e.past_values))]
            states.append((returned + kept, flags))
        assert states[0][1] == states[1][1] == [frozen] * 4
        for mine, other in zip(states[0][0], states[1][0], strict=True):
            same(mine, other)
    assert outcome(caches[0][0].append, keys[:, :, :1], values) is outcome(caches[1][0].append, keys[:, :, :1], values)
