"""Where in the last axis of a projection are queries, keys and values?

Functions of a tensor alone, which know nothing of the model whose projection it is.
"""

from __future__ import annotations

from torch import Tensor


def by_head(whole: Tensor, heads: int, size: int | None) -> Tensor:
    """The last axis by heads, of each the first ``size`` entries: ``[..., head, d_head]``."""
    part = whole.unflatten(-1, (heads, -1))
    return part if size is None else part[..., :size]


def grouped(whole: Tensor, blocks: int, start: int, share: int, size: int) -> Tensor:
    """The ``share`` heads from ``start`` on of each of several blocks in the last axis: ``[..., head, d_head]``."""
    part = whole.unflatten(-1, (blocks, -1)).narrow(-1, start, share * size)
    return part.unflatten(-1, (share, size)).flatten(-3, -2)
