"""How does a part of a parameter pass for a parameter?

TransformerLens' weights are parameters of their own; here most are parts of a fused or transposed parameter of the HF
model. An ordinary view of it shares its values, but an assignment to the view's ``.data`` would leave the parameter
alone without an error, and the view's ``.grad`` would stay empty. `SharedWeight` passes both on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SharedWeight(torch.Tensor):
    """A view of a part of a parameter, with its ``.data`` and ``.grad``; what is computed from it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values, without autograd. Assigning overwrites them in the parameter.

        Raises:
            ValueError: the new values have another shape.
        """
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ValueError(f"this weight has shape {tuple(self.shape)}, got {tuple(value.shape)}")
        with torch.no_grad():
            self.copy_(value)

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The part of the parameter's gradient that belongs to these values; None before a backward pass."""
        gradient = None if self._base is None else self._base.grad
        return None if gradient is None else gradient.as_strided(self.shape, self.stride(), self.storage_offset())

    def detach(self) -> SharedWeight:
        """The same values outside of autograd, still shared with the parameter."""
        return super().detach().as_subclass(SharedWeight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.as_subclass(Tensor).detach().clone()
