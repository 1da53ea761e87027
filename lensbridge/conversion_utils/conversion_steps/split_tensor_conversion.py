"""What if a value is one part of a larger one (queries in a fused projection, say)?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion


class SplitTensorConversion(BaseTensorConversion):
    """Part number ``index`` of ``num_splits`` along ``dim``; ``revert`` cannot know the others and changes nothing."""

    def __init__(self, index: int, num_splits: int, dim: int = 0) -> None:
        super().__init__()
        self.index = index
        self.num_splits = num_splits
        self.dim = dim

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        return torch.chunk(input_value, self.num_splits, dim=self.dim)[self.index]

    def __repr__(self) -> str:
        return f"SplitTensorConversion({self.index}, {self.num_splits}, dim={self.dim})"
