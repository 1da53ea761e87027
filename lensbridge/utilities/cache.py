"""At which position does a text go on that a key-value cache has begun?"""

from __future__ import annotations

from ..cache import TransformerLensKeyValueCache


def get_pos_offset(past_kv_cache: TransformerLensKeyValueCache | None, batch_size: int) -> int:
    """The number of positions in the cache; 0 without one.

    Raises:
        AssertionError: the cache was made for another batch size.
    """
    if past_kv_cache is None:
        return 0
    cached_batch, length = past_kv_cache[0].past_keys.shape[:2]
    assert cached_batch == batch_size, f"the cache holds {cached_batch} texts, and this batch {batch_size}"
    return length
