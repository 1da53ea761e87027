"""What if a conversion is just a function?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base_tensor_conversion import BaseTensorConversion


class CallableTensorConversion(BaseTensorConversion):
    """``convert_callable(input_value, *full_context)``; it has no inverse, so ``revert`` changes nothing."""

    def __init__(self, convert_callable: Callable[..., Any]) -> None:
        super().__init__()
        self.convert_callable = convert_callable

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return self.convert_callable(input_value, *full_context)

    def __repr__(self) -> str:
        return f"CallableTensorConversion({self.convert_callable})"
