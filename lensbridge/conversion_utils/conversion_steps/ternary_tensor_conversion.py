"""What if a value may be missing, and something else takes its place then?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..helpers.find_property import find_property
from .base_tensor_conversion import BaseTensorConversion

PRIMARY_CONVERSION = Tensor | BaseTensorConversion | None


class TernaryTensorConversion(BaseTensorConversion):
    """One conversion where there is a value, another where there is none.

    Args:
        fallback_conversion: for None: a tensor as it is; a path, looked up in the context; or (path, conversion).
        primary_conversion: for a value: None (as it is), a tensor to take its place, or a conversion.
    """

    def __init__(
        self,
        fallback_conversion: Any,
        primary_conversion: PRIMARY_CONVERSION = None,
        input_filter: Callable[[Any], Any] | None = None,
        output_filter: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(input_filter=input_filter, output_filter=output_filter)
        self.primary_conversion = primary_conversion
        self.fallback_conversion = fallback_conversion

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        if input_value is None:
            return self.handle_fallback_conversion(*full_context)
        return self.handle_primary_conversion(input_value, *full_context)

    def handle_primary_conversion(self, input_value: Any, *full_context: Any) -> Any:
        """What becomes of a value."""
        if self.primary_conversion is None:
            return input_value
        if isinstance(self.primary_conversion, Tensor):
            return self.primary_conversion
        return self.primary_conversion.convert(input_value, *full_context)

    def handle_fallback_conversion(self, *full_context: Any) -> Any:
        """What takes the place of None."""
        if isinstance(self.fallback_conversion, Tensor):
            return self.fallback_conversion
        if isinstance(self.fallback_conversion, str):
            return self.find_context_field(self.fallback_conversion, *full_context)
        path, conversion = self.fallback_conversion
        return conversion.convert(self.find_context_field(path, *full_context), *full_context)

    def find_context_field(self, field_key: str, *full_context: Any) -> Any:
        """The first thing that is not None at this path in one of the contexts, or None."""
        found = (find_property(field_key, context) for context in full_context)
        return next((value for value in found if value is not None), None)

    def __repr__(self) -> str:
        return f"TernaryTensorConversion({self.fallback_conversion}, {self.primary_conversion})"
