"""What small things are done to any tensor: convert, cut, compare, count.

Nothing here knows about models. Shapes in the annotations say what a function expects; ``...`` stands for
any leading dimensions.
"""

from __future__ import annotations

from typing import Any, TypeVar

import einops
import numpy as np
import torch
from jaxtyping import Float, Int

Value = TypeVar("Value")


def to_numpy(tensor: Any) -> np.ndarray:
    """Turn a tensor, list, tuple or Python scalar into a numpy array; an array is returned as it is.

    Tensors are detached and moved to the CPU. bfloat16, which numpy lacks, becomes float32.

    Raises:
        ValueError: the value is none of those.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, torch.Tensor):
        plain = tensor.detach().cpu()
        return (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()
    if isinstance(tensor, (list, tuple, int, float, bool, str)):
        return np.array(tensor)
    raise ValueError(
        f"to_numpy got a {type(tensor).__name__}; it takes a tensor, numpy array, list, tuple, number, bool or str."
    )


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first ``n`` entries along every dimension; for a quick look at a tensor or a FactoredMatrix."""
    return tensor[(slice(n),) * tensor.ndim]


def remove_batch_dim(tensor: torch.Tensor) -> torch.Tensor:
    """Drop the first dimension where it has length 1; any other tensor is returned unchanged."""
    return tensor[0] if tensor.shape[0] == 1 else tensor


def transpose(tensor: Float[torch.Tensor, "... a b"]) -> Float[torch.Tensor, "... b a"]:
    """Swap the last two dimensions (a view)."""
    return tensor.transpose(-2, -1)


def is_square(x: torch.Tensor) -> bool:
    """Whether ``x`` is one square matrix; False for any other number of dimensions."""
    return x.dim() == 2 and x.size(0) == x.size(1)


def is_lower_triangular(x: torch.Tensor) -> bool:
    """Whether ``x`` is one square matrix with zeros above its diagonal."""
    return is_square(x) and torch.equal(x, torch.tril(x))


def _order_mismatches(t1: torch.Tensor, t2: torch.Tensor, line: str, verbose: bool) -> list[int]:
    """Indices i where "row i >= row i + 1" holds at different columns in the two matrices."""
    first, second = t1[:-1] >= t1[1:], t2[:-1] >= t2[1:]
    mismatches = [i for i in range(len(first)) if not torch.equal(first[i], second[i])]
    if verbose:
        for i in mismatches:
            print(f"\t{line} {i}:{i + 1}\n\tt1: {first[i].tolist()}\n\tt2: {second[i].tolist()}")
    return mismatches


def check_structure(t1: torch.Tensor, t2: torch.Tensor, *, verbose: bool = False) -> None:
    """Print whether two matrices rise and fall at the same places, row to row and column to column.

    Prints ``PASSED``, or the indices where neighbouring rows (or, if all rows agree, columns) compare differently.

    Raises:
        AssertionError: the tensors are not matrices of one shape.
    """
    if t1.ndim != 2 or t1.shape != t2.shape:
        raise AssertionError(f"two matrices of one shape are needed, got {tuple(t1.shape)} and {tuple(t2.shape)}")
    found = {}
    for kind, one, other in (("row", t1, t2), ("column", t1.T, t2.T)):
        if verbose:
            print(f"Checking {kind}s")
        found[kind] = _order_mismatches(one, other, "rows" if kind == "row" else "columns", verbose)
    wrong = [(kind, where) for kind, where in found.items() if where]
    print(f"{wrong[0][0]} mismatch: {wrong[0][1]}" if wrong else "PASSED")


def get_offset_position_ids(
    past_kv_pos_offset: int, attention_mask: Int[torch.Tensor, "batch offset_pos"]
) -> Int[torch.Tensor, "batch pos"]:
    """Position of each new token among the attended ones, so that the first attended token is at 0.

    Padding before it also gets 0, which keeps every id a valid index. ``past_kv_pos_offset`` tokens, those already in a
    key-value cache, are left out of the result.
    """
    attended_before_or_here = torch.cumsum(attention_mask, dim=1)
    return (attended_before_or_here - 1).clamp(min=0)[:, past_kv_pos_offset:]


def get_cumsum_along_dim(tensor: torch.Tensor, dim: int, reverse: bool = False) -> torch.Tensor:
    """Cumulative sum along ``dim``, counted from the end when ``reverse`` is set."""
    if not reverse:
        return tensor.cumsum(dim)
    return tensor.flip(dim).cumsum(dim).flip(dim)


def repeat_along_head_dimension(
    tensor: Float[torch.Tensor, "batch pos d_model"], n_heads: int, clone_tensor: bool = True
) -> Float[torch.Tensor, "batch pos n_heads d_model"]:
    """Give every head its own copy of the residual stream.

    With ``clone_tensor=False`` the heads share one storage, so an in-place edit of one head reaches all of them.
    """
    per_head = einops.repeat(tensor, "batch pos d_model -> batch pos heads d_model", heads=n_heads)
    return per_head.clone() if clone_tensor else per_head


def filter_dict_by_prefix(dictionary: dict[str, Value], prefix: str) -> dict[str, Value]:
    """The entries below a dotted prefix, under the rest of their names.

    ``filter_dict_by_prefix({"h.0.w": 1, "h.1.w": 2}, "h.0")`` is ``{"w": 1}``; the dot may be written or left out.
    """
    stem = prefix.removesuffix(".") + "."
    return {key.removeprefix(stem): value for key, value in dictionary.items() if key.startswith(stem)}
