"""How is the registry asked?

Functions under TransformerLens' names. A model is given by its hub id or a TransformerLens alias of it. "Supported"
means: in the table of names, and of an architecture that lensbridge has a record of. ``from_pretrained`` takes more
than the table has, namely any hub id or directory of such an architecture.
"""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from importlib import resources
from typing import Any

from ...architectures import BY_CLASS
from ...errors import UnsupportedModelError
from ...model_names import resolve, table
from .exceptions import ModelNotFoundError
from .schemas import ArchitectureGap, ArchitectureStats, ModelEntry


@lru_cache(maxsize=1)
def _architectures() -> dict[str, list[str]]:
    """HuggingFace class -> hub ids, of all models in the table whose weights are in HuggingFace's format."""
    path = resources.files("lensbridge") / "assets" / "model_architectures.json"
    return json.loads(path.read_text(encoding="utf8"))["architectures"]


def _supported() -> dict[str, list[str]]:
    return {name: models for name, models in _architectures().items() if name in BY_CLASS}


def clear_cache() -> None:
    """Read the tables anew when they are next asked for."""
    _architectures.cache_clear()
    table.cache_clear()


# --- models -----------------------------------------------------------------------------------------------------------


def get_supported_models(architecture: str | None = None, verified_only: bool = False) -> list[ModelEntry]:
    """The supported models, all or those of one architecture. None of them is verified."""
    entries = [ModelEntry(name, model) for name, models in _supported().items() for model in models]
    return [
        entry
        for entry in entries
        if (architecture is None or entry.architecture_id == architecture) and not (verified_only and entry.status != 1)
    ]


def is_model_supported(model_id: str) -> bool:
    """Whether a model is supported."""
    return get_model_architecture(model_id) in BY_CLASS


def get_model_architecture(model_id: str) -> str | None:
    """The HuggingFace class of a model in the table, supported or not; None if it is not there."""
    official = resolve(model_id)
    return next((name for name, models in _architectures().items() if official in models), None)


def get_model_info(model_id: str) -> ModelEntry:
    """The entry of a supported model.

    Raises:
        ModelNotFoundError: if it is not in the table.
        UnsupportedModelError: if there is no record of its architecture.
    """
    architecture = get_model_architecture(model_id)
    if architecture is None:
        raise ModelNotFoundError(model_id, suggest_similar_model(model_id))
    if architecture not in BY_CLASS:
        raise UnsupportedModelError(f"{model_id!r} is a {architecture}; known: {', '.join(sorted(BY_CLASS))}")
    return ModelEntry(architecture, resolve(model_id))


def suggest_similar_model(model_id: str) -> str | None:
    """The supported model with the most similar id; None if the model is supported, or no id is similar."""
    if is_model_supported(model_id):
        return None
    ids = {entry.model_id.lower(): entry.model_id for entry in get_supported_models()}
    close = difflib.get_close_matches(model_id.lower(), ids, n=1)
    return ids[close[0]] if close else None


# --- architectures ----------------------------------------------------------------------------------------------------


def get_supported_architectures() -> list[str]:
    """Every HuggingFace class that can be loaded, in alphabetical order."""
    return sorted(BY_CLASS)


def is_architecture_supported(architecture_id: str) -> bool:
    """Whether models of a HuggingFace class can be loaded."""
    return architecture_id in BY_CLASS


def get_architecture_models(architecture_id: str) -> list[str]:
    """The supported models of a HuggingFace class."""
    return list(_supported().get(architecture_id, []))


def get_unsupported_architectures(min_models: int = 0, top_n: int | None = None) -> list[ArchitectureGap]:
    """The architectures of the table that cannot be loaded, those with most models first."""
    missing = {name: models for name, models in _architectures().items() if name not in BY_CLASS}
    gaps = [ArchitectureGap(name, len(models), models[:10]) for name, models in missing.items()]
    gaps.sort(key=lambda gap: -gap.total_models)
    return [gap for gap in gaps if gap.total_models >= min_models][:top_n]


def get_all_architectures_with_stats() -> list[ArchitectureStats]:
    """Every architecture that is in the table or can be loaded, those with most models first."""
    known = dict.fromkeys(BY_CLASS, ()) | _architectures()
    out = [
        ArchitectureStats(name, name in BY_CLASS, len(models), example_models=list(models[:5]))
        for name, models in known.items()
    ]
    return sorted(out, key=lambda stats: -stats.model_count)


def get_registry_stats() -> dict[str, Any]:
    """How many models and architectures there are, supported and not."""
    gaps = get_unsupported_architectures()
    return {
        "total_supported_models": len(get_supported_models()),
        "total_supported_architectures": len(BY_CLASS),
        "total_verified": len(get_supported_models(verified_only=True)),
        "total_unsupported_architectures": len(gaps),
        "total_unsupported_models": sum(gap.total_models for gap in gaps),
    }
