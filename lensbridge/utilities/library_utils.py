"""Is an optional package there?"""

from __future__ import annotations

import importlib.util
import sys


def is_library_available(name: str) -> bool:
    """Whether ``import name`` would find something; nothing is imported to find out."""
    return name in sys.modules or importlib.util.find_spec(name) is not None
