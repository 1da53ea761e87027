"""When do two calls agree: ours and TransformerLens', on the same arguments?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformer_lens import utilities as theirs

from lensbridge import utilities as ours


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or the type of what it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


def same(mine: Any, other: Any, tolerance: float = 0.0) -> None:
    """Equal values; for tensors and arrays also in shape and dtype."""
    if isinstance(other, torch.Tensor):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif isinstance(other, np.ndarray):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(mine, other)
    else:
        assert mine == other


def agree(name: str, *args: Any, **kwargs: Any) -> None:
    """Both helpers of this name give the same, or raise the same type."""
    same(outcome(getattr(ours, name), *args, **kwargs), outcome(getattr(theirs, name), *args, **kwargs))
