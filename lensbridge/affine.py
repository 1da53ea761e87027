"""What does an affine layer, or an embedding, multiply with and add?

For most it is their ``weight`` and ``bias``. Quantised layers and layers with adapters have theirs computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapters import base_of, inside, is_adapted, of_adapted
from .computed import Computed
from .quantised import of_quantised


def computed(module: nn.Module, dtype: torch.dtype | None = None) -> Computed | None:
    """What a layer multiplies with, if that has to be computed; None if it is the parameter `stored_in` it.

    Args:
        dtype: of matrix and bias; if not given, the matrix is in float32 and the bias as it is stored.
    """
    module = inside(module)
    cls: Any = module.__class__
    if not is_adapted(cls):
        return of_quantised(module, dtype)
    base = base_of(module)
    return of_adapted(module, base, computed(base, dtype), dtype)


def stored_in(module: Any) -> Tensor:
    """The weight that a layer keeps."""
    return inside(module).weight


def matrix(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of an affine layer as [in, out], sharing memory, or computed in a dtype."""
    found = computed(module, dtype)
    if found is not None:
        return found.weight.T
    weight = stored_in(module)
    # transformers' Conv1D stores [in, out], nn.Linear [out, in].
    return weight if inside(module).__class__.__name__ == "Conv1D" else weight.T


def bias_of(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor | None:
    """The bias of an affine layer or norm, if it has one; in a dtype, if it is computed."""
    found = computed(module, dtype)
    return getattr(inside(module), "bias", None) if found is None else found.bias


def widths(module: Any) -> tuple[int, int]:
    """The sizes of what an affine layer is given and gives; of an embedding, its width and its number of rows."""
    found = computed(module)
    if found is not None:
        return found.shape[1], found.shape[0]
    rows, columns = stored_in(module).shape
    return (rows, columns) if inside(module).__class__.__name__ == "Conv1D" else (columns, rows)
