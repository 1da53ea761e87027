"""What lies at a dotted path?"""

from __future__ import annotations

from typing import Any


def find_property(needle: str, haystack: Any) -> Any:
    """Follow ``"transformer.h"`` through keys of dicts and attributes of everything else.

    Raises:
        KeyError, AttributeError: if the path leads nowhere.
    """
    for name in needle.split("."):
        haystack = haystack[name] if isinstance(haystack, dict) else getattr(haystack, name)
    return haystack
