"""What can go wrong when the registry is asked?"""

from __future__ import annotations

from ...errors import LensbridgeError


class ModelRegistryError(LensbridgeError):
    """Base class of the registry's errors."""


class ModelNotFoundError(ModelRegistryError):
    """A model is not in the registry.

    Args:
        model_id: what was asked for.
        suggestion: a model that might have been meant.
    """

    def __init__(self, model_id: str, suggestion: str | None = None) -> None:
        self.model_id = model_id
        self.suggestion = suggestion
        hint = f". Did you mean {suggestion!r}?" if suggestion else ""
        super().__init__(f"the model {model_id!r} is not in the registry{hint}")
