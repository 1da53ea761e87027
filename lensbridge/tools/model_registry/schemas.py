"""What does the registry say of a model, and of an architecture?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ModelEntry:
    """A model: the HuggingFace class and the hub id. ``status`` is 0: nobody has verified it."""

    architecture_id: str
    model_id: str
    status: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelEntry:
        """An entry from a dict, which may hold more (such as one of TransformerLens' registry)."""
        return cls(data["architecture_id"], data["model_id"], data.get("status", 0))


@dataclass
class ArchitectureGap:
    """An architecture that cannot be loaded, with how many models of the table have it, and up to ten of them."""

    architecture_id: str
    total_models: int
    sample_models: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArchitectureGap:
        """A gap from a dict, which may hold more."""
        return cls(data["architecture_id"], data["total_models"], list(data.get("sample_models", [])))


@dataclass
class ArchitectureStats:
    """An architecture: whether it can be loaded, how many models of the table have it, and up to five of them."""

    architecture_id: str
    is_supported: bool
    model_count: int
    verified_count: int = 0
    example_models: list[str] = field(default_factory=list)
