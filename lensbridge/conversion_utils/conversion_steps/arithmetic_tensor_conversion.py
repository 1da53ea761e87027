"""What if one number, or one tensor, is added to a value or multiplied with it?"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion


class OperationTypes(Enum):
    """What `ArithmeticTensorConversion` does with its value."""

    ADDITION = 0
    SUBTRACTION = 1
    MULTIPLICATION = 2
    DIVISION = 3


#: operation -> (what it does, what undoes it)
_OPERATORS: dict[OperationTypes, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    OperationTypes.ADDITION: (operator.add, operator.sub),
    OperationTypes.SUBTRACTION: (operator.sub, operator.add),
    OperationTypes.MULTIPLICATION: (operator.mul, operator.truediv),
    OperationTypes.DIVISION: (operator.truediv, operator.mul),
}


class ArithmeticTensorConversion(BaseTensorConversion):
    """``input_value (operation) value``; undone by the inverse operation, between the same filters."""

    def __init__(
        self,
        operation: OperationTypes,
        value: float | int | Tensor,
        input_filter: Callable[[Any], Any] | None = None,
        output_filter: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(input_filter=input_filter, output_filter=output_filter)
        self.operation = operation
        self.value = value

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return _OPERATORS[self.operation][0](input_value, self.value)

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        return self._filtered(lambda value: _OPERATORS[self.operation][1](value, self.value), input_value)

    def __repr__(self) -> str:
        return f"ArithmeticTensorConversion({self.operation}, {self.value})"
