"""What if only the axes of a value change?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion


class RearrangeTensorConversion(BaseTensorConversion):
    """``einops.rearrange`` by a pattern; undone by the pattern read from right to left.

    Args:
        pattern: ``"(head d_head) d_model -> head d_model d_head"``, say.
        axes_lengths: the sizes that einops cannot infer, in either direction.
    """

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
        return einops.rearrange(input_value, self.pattern, **self.axes_lengths)

    def revert(self, input_value: Tensor, *full_context: Any) -> Tensor:
        before, after = (side.strip() for side in self.pattern.split("->"))
        return einops.rearrange(input_value, f"{after} -> {before}", **self.axes_lengths)

    def __repr__(self) -> str:
        return f"RearrangeTensorConversion({self.pattern!r})"
