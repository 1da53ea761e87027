"""What if a matrix lies the other way round?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion


class TransposeTensorConversion(BaseTensorConversion):
    """The transpose of a matrix, both ways; everything that is no matrix stays as it is."""

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return input_value.T if isinstance(input_value, Tensor) and input_value.ndim == 2 else input_value

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        return self.handle_conversion(input_value)

    def __repr__(self) -> str:
        return "TransposeTensorConversion()"
