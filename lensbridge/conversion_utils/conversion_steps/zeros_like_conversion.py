"""What if a value has to be there but counts for nothing?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion


class ZerosLikeConversion(BaseTensorConversion):
    """Zeros in the shape of the value; ``revert`` changes nothing."""

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        return torch.zeros_like(input_value)

    def __repr__(self) -> str:
        return "ZerosLikeConversion()"
