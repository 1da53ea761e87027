"""Is the Learning Interpretability Tool there, and which of its classes are ours built on?

``lit_nlp`` is an optional package. Without it `lensbridge.lit` can be imported, and what needs it says so when it is
used.
"""

from __future__ import annotations

import importlib
from typing import Any

from .constants import ERRORS

#: Why not, if it is not there: it may also lack a package of its own.
_reasons: list[ImportError] = []


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"lit_nlp.{name}")
    except ImportError as error:
        _reasons.append(error)
        return None


_model, _dataset, _types = _module("api.model"), _module("api.dataset"), _module("api.types")

#: LIT looks at the classes of what it is given.
Model: Any = _model.Model if _model else object
BatchedModel: Any = _model.BatchedModel if _model else object
Dataset: Any = _dataset.Dataset if _dataset else object


def require() -> None:
    """Refuse to go on without LIT.

    Raises:
        ImportError: if it is not installed.
    """
    if _types is None:
        raise ImportError(ERRORS.LIT_NOT_INSTALLED) from (_reasons[0] if _reasons else None)


def types() -> Any:
    """LIT's types of fields.

    Raises:
        ImportError: if LIT is not installed.
    """
    require()
    return _types
