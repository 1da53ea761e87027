"""What if a value is repeated along an axis?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion


class RepeatTensorConversion(BaseTensorConversion):
    """``einops.repeat`` by a pattern; ``revert`` changes nothing, as in TransformerLens."""

    def __init__(
        self,
        pattern: str,
        input_filter: Callable[[Any], Any] | None = None,
        output_filter: Callable[[Any], Any] | None = None,
        **axes_lengths: int,
    ) -> None:
        super().__init__(input_filter=input_filter, output_filter=output_filter)
        self.pattern = pattern
        self.axes_lengths = axes_lengths

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        return einops.repeat(input_value, self.pattern, **self.axes_lengths)

    def __repr__(self) -> str:
        return f"RepeatTensorConversion({self.pattern!r})"
