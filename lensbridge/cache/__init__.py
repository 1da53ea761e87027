"""The key-value cache for running a model on a text piece by piece, in TransformerLens' layout."""

from .key_value_cache import TransformerLensKeyValueCache
from .key_value_cache_entry import TransformerLensKeyValueCacheEntry

__all__ = ["TransformerLensKeyValueCache", "TransformerLensKeyValueCacheEntry"]
