"""What if several conversions are made one after the other?"""

from __future__ import annotations

from typing import Any

from .base_tensor_conversion import BaseTensorConversion


class ChainTensorConversion(BaseTensorConversion):
    """The conversions in order; undone in the opposite order.

    Converting leaves out the conversions' own filters, as in TransformerLens.
    """

    def __init__(self, conversions: list[BaseTensorConversion]) -> None:
        super().__init__()
        self.conversions = conversions

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        for conversion in self.conversions:
            input_value = conversion.handle_conversion(input_value, *full_context)
        return input_value

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        for conversion in reversed(self.conversions):
            input_value = conversion.revert(input_value, *full_context)
        return input_value

    def __repr__(self) -> str:
        return f"ChainTensorConversion({self.conversions})"
