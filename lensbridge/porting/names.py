"""What is a name of TransformerLens called here, and is it here at all?

Answered by looking at the package itself and the tables in `module_names`, so that nothing has to be kept up to date.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from lensbridge.errors import near_misses
from lensbridge.module_names import OLD_NAMES, SAME_MODULE, why_not

THEIRS = "transformer_lens"
OURS = "lensbridge"


def is_theirs(name: str) -> bool:
    """Whether a dotted name is TransformerLens or something in it."""
    return name == THEIRS or name.startswith(f"{THEIRS}.")


def module_of(name: str) -> str | None:
    """Our module for one of TransformerLens', by its own name; None if there is none."""
    path = name.removeprefix(THEIRS).removeprefix(".")
    ours = f"{OURS}.{SAME_MODULE.get(path, path)}".rstrip(".")
    return ours if _imported(ours) is not None else None


def member_of(module: str, name: str) -> str | None:
    """What a name of one of our modules is called there (or a module below it); None if there is none."""
    if module == OURS and name in OLD_NAMES:
        return OLD_NAMES[name]
    return name if _member(importlib.import_module(module), name) is not None else None


def missing(name: str) -> str | None:
    """What is wrong with a dotted name below ``transformer_lens``, as far as modules and classes can tell; or None."""
    there: Any = importlib.import_module(OURS)
    seen = OURS
    for part in name.split(".")[1:]:
        found = _member(there, part)
        if found is None:
            return why_missing(name, seen, part)
        there, seen = found, f"{seen}.{part}"
        if not isinstance(there, (ModuleType, type)):
            break
    return None


def why_missing(name: str, module: str | None = None, part: str = "") -> str:
    """Why a dotted name of TransformerLens has no counterpart here."""
    reason = why_not(name.removeprefix(f"{THEIRS}."))
    if reason is None and module is not None:
        known = dir(_imported(module) or importlib.import_module(OURS))
        reason = f"{module} has no {part}.{near_misses(part, known)}".rstrip(".")
    return f"{name} has no counterpart: {reason or 'lensbridge has no such module'}"


def _member(there: ModuleType | type, name: str) -> Any:
    found = getattr(there, name, None)
    if found is None and isinstance(there, ModuleType) and hasattr(there, "__path__"):
        found = _imported(f"{there.__name__}.{name}")
    return True if found is None and name in vars(there) else found


def _imported(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
