"""How to reach an attribute by a dotted path."""

from __future__ import annotations

from operator import attrgetter
from typing import Any


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """``obj.a.b.c`` for the path ``"a.b.c"``."""
    return attrgetter(attr_str)(obj)


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """``obj.a.b.c = value`` for the path ``"a.b.c"``."""
    owner, _, attribute = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, owner) if owner else obj, attribute, value)
