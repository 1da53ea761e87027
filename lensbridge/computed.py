"""What does a layer multiply with that keeps no plain matrix of its own?

Quantised layers keep codes and scales, layers with an adapter keep a matrix and what is added to it. TransformerLens'
weights are matrices, so such a layer has its matrix computed here, each time that it is asked for: as often as not it
is never asked for, and all of them together would be the model that somebody took pains to make smaller.

What is known of each kind is in `quantised` and `adapters`; `affine` asks both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_OUTLINED: ContextVar[bool] = ContextVar("lensbridge_outlined", default=False)


@contextmanager
def outlined() -> Iterator[None]:
    """Within the context, matrices that would have to be computed have their shape only, and no memory."""
    token = _OUTLINED.set(True)
    try:
        yield
    finally:
        _OUTLINED.reset(token)


@dataclass(frozen=True)
class Computed:
    """The matrix and bias that a layer multiplies with and adds.

    Args:
        shape: of the matrix, ``[out, in]`` as that of an ``nn.Linear``; of an embedding ``[rows, width]``.
        make: computes the matrix, or raises an UnsupportedModelError.
        why: a half sentence that says why the matrix is no parameter of the model.
        sources: the tensors that it is computed from.
        state: whatever else it depends on.
        bias: the bias, if there is one.
        made_bias: whether the bias is computed, too.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    why: str
    sources: tuple[Tensor, ...]
    state: Hashable = ()
    bias: Tensor | None = None
    made_bias: bool = False

    def with_bias_in(self, dtype: torch.dtype | None) -> Computed:
        """The same with the bias in a dtype; as it is for None."""
        if self.bias is None or dtype in (None, self.bias.dtype):
            return self
        return replace(self, bias=self.bias.to(dtype), made_bias=True, sources=(*self.sources, self.bias))

    @property
    def weight(self) -> Tensor:
        """The matrix; see `outlined`."""
        if _OUTLINED.get():
            return torch.zeros((), dtype=self.dtype, device=self.sources[0].device).expand(self.shape)
        return self.make().to(self.dtype)
