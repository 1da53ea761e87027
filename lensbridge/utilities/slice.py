"""Which positions of an axis a caller means.

Python's own indexing cannot say in one argument "this one position" (drop the axis), "these positions" and "this
range", so TransformerLens' :class:`Slice` reads the kind of choice from the type of its input:

    ==================  ==========  =======================
    input               mode        effect along the axis
    ==================  ==========  =======================
    None                identity    everything
    int                 int         that entry, axis dropped
    tuple or slice      slice       ``slice(*input)``
    list, array, tensor array       those entries (indices or a mask)
    ==================  ==========  =======================
"""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import torch

from .tensors import to_numpy

#: Everything that :class:`Slice` accepts. A tuple holds one to three integers: ``(stop,)``, ``(start, stop)``,
#: ``(start, stop, step)``.
SliceInput = (
    int | tuple[int] | tuple[int, int] | tuple[int, int, int] | list[int] | slice | torch.Tensor | np.ndarray | None
)


def _read(choice: Any) -> tuple[str, Any]:
    """The mode that a choice stands for, and the index to use."""
    if choice is None:
        return "identity", slice(None)
    if isinstance(choice, int):
        return "int", choice
    if isinstance(choice, tuple):
        return "slice", slice(*choice)
    if isinstance(choice, slice):
        return "slice", choice
    if isinstance(choice, (list, torch.Tensor, np.ndarray)):
        return "array", to_numpy(choice)
    raise ValueError(
        f"{choice!r} ({type(choice).__name__}) is no slice. Give None (everything), an int, a tuple of slice "
        "arguments such as (1, 5), a slice, or a list, array or tensor of indices."
    )


class Slice:
    """One choice along one axis, to be applied to any tensor (see the table above).

    ``mode`` names the kind of choice and ``slice`` holds the index itself.

    Raises:
        ValueError: the input is none of the accepted types.
    """

    slice: int | builtins.slice | np.ndarray
    mode: str

    def __init__(self, input_slice: SliceInput = None) -> None:
        self.mode, self.slice = _read(input_slice)

    def apply(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """``tensor`` with this choice made along ``dim`` (which may count from the end)."""
        index: list[Any] = [builtins.slice(None)] * tensor.ndim
        index[dim] = self.slice
        return tensor[tuple(index)]

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """The chosen indices of an axis of length ``max_ctx``, as an array (of length 1 for a single position).

        Raises:
            ValueError: ``max_ctx`` is missing and the choice is not a single position.
        """
        if self.mode == "int":
            return np.array([self.slice], dtype=np.int64)
        if max_ctx is None:
            raise ValueError(f"max_ctx, the length of the axis, is needed to list the indices of {self!r}")
        return np.arange(max_ctx, dtype=np.int64)[self.slice]

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode} "

    @classmethod
    def unwrap(cls, slice_input: Slice | SliceInput) -> Slice:
        """A :class:`Slice` from a Slice or from raw input, where a raw int keeps its axis (with length 1)."""
        if isinstance(slice_input, Slice):
            return slice_input
        return cls([slice_input] if isinstance(slice_input, int) else slice_input)
