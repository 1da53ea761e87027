"""Does a native model continue a text from a key-value cache as TransformerLens 3.9.0 does?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens import TransformerLensKeyValueCache as ReferenceCache

from compat_tests.comparison import caches_close, close
from compat_tests.native_models import NativePair, caching, forget_alibi, native_pair
from lensbridge import TransformerLensKeyValueCache

KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "rotary": {"positional_embedding_type": "rotary"},
    "rotary, groups": {"positional_embedding_type": "rotary", "n_heads": 4, "n_key_value_heads": 2},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "alibi": {"positional_embedding_type": "alibi"},
    "local": {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]},
    "log-n, dynamic NTK": {
        "positional_embedding_type": "rotary",
        "use_logn_attn": True,
        "use_dynamic_ntk_rope": True,
        "train_seq_length": 4,
    },
    "bidirectional": {"attention_dir": "bidirectional"},
    "clipped": {"clip_qkv": 0.5},
}

TOKENS = torch.randint(0, 17, (2, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[0, :2] = 0


def continue_with(pair: NativePair, caches: tuple[Any, Any], tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """One more piece of text; logits, hook points and caches agree."""
    mine, theirs = caches
    before = mine.previous_attention_mask
    whole = mine.append_attention_mask(mask)
    with caching(pair.mine) as seen, torch.no_grad():
        logits = pair.mine(tokens, attention_mask=whole, past_key_values=mine).logits
    forget_alibi(pair.theirs)
    expected, expected_seen = pair.theirs.run_with_cache(tokens, attention_mask=mask, past_kv_cache=theirs)
    close("logits", logits, expected.detach())
    caches_close(seen, expected_seen.cache_dict)
    for layer in range(2):
        close("past_keys", mine[layer].past_keys, theirs[layer].past_keys)
        close("past_values", mine[layer].past_values, theirs[layer].past_values)
    assert mine.frozen or mine.previous_attention_mask.shape[1] == before.shape[1] + tokens.shape[1]


def new_caches(pair: NativePair) -> tuple[Any, Any]:
    return (
        TransformerLensKeyValueCache.init_cache(pair.mine.cfg, "cpu", 2),
        ReferenceCache.init_cache(pair.theirs.cfg, "cpu", 2),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(5, 4, 1, 1), (1, 6), (12,)])
def test_pieces(kind: str, pieces: tuple[int, ...]) -> None:
    pair = native_pair(**KINDS[kind])
    caches = new_caches(pair)
    done = 0
    for length in pieces:
        here = slice(done, done + length)
        continue_with(pair, caches, TOKENS[:, here], MASK[:, here])
        done += length


@pytest.mark.parametrize("kind", ["standard", "rotary, groups"])
def test_a_frozen_cache(kind: str) -> None:
    pair = native_pair(**KINDS[kind])
    caches = new_caches(pair)
    continue_with(pair, caches, TOKENS[:, :5], MASK[:, :5])
    for cache in caches:
        cache.freeze()
    for start in (5, 7):
        continue_with(pair, caches, TOKENS[:, start : start + 2], MASK[:, start : start + 2])
    assert caches[0][0].past_keys.shape[1] == 5


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("bidirectional", "log-n, dynamic NTK")])
def test_pieces_give_what_the_whole_gives(kind: str) -> None:
    mine = native_pair(**KINDS[kind]).mine
    cache = TransformerLensKeyValueCache.init_cache(mine.cfg, "cpu", 2)
    with torch.no_grad():
        pieces = [mine(TOKENS[:, i : i + 4], past_key_values=cache).logits for i in (0, 4, 8)]
        close("logits", torch.cat(pieces, dim=1), mine(TOKENS).logits)
