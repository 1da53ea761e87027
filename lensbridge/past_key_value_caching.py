"""Where are key-value caches under TransformerLens 2's names?"""

from __future__ import annotations

from .cache import TransformerLensKeyValueCache as HookedTransformerKeyValueCache
from .cache import TransformerLensKeyValueCacheEntry as HookedTransformerKeyValueCacheEntry

__all__ = ["HookedTransformerKeyValueCache", "HookedTransformerKeyValueCacheEntry"]
