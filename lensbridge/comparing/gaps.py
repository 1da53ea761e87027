"""How far apart are two tensors that should be equal?

Four numbers over all entries: the largest and the mean absolute difference, and both relative to the tensor that is
compared with. "Relative" is to its largest, or mean, absolute entry, as in everything that the tests compare: single
entries near zero would make a quotient of rounding errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checking.outcome import unlike

#: ``max |a - b| <= tolerance * max |b|``: what the tests ask for.
TOLERANCE = 1e-4
#: In formats that are shorter than float32: as many units in the last place of the largest entry, because equations are
#: computed in the same format.
UNITS = 4


def tolerance_of(dtype: torch.dtype) -> float:
    """How far apart values may be, relative to the largest."""
    return max(TOLERANCE, UNITS * torch.finfo(dtype).eps) if is_short(dtype) else TOLERANCE


def is_short(dtype: torch.dtype) -> bool:
    """Whether a format has less precision than float32."""
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


@dataclass
class Gap:
    """How far apart the tensors are that were added; ``problem`` says why some could not be compared as numbers."""

    largest: float = 0.0
    relative: float = 0.0
    same_bits: bool = True
    problem: str = ""
    _sum: float = 0.0
    _size: float = 0.0
    _count: int = 0

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Take in another pair; entries that are not finite have to be the same ones."""
        mine, theirs = mine.detach(), theirs.detach().to(mine.device)
        self.same_bits &= mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        reason = unlike(mine, theirs)
        if reason is not None:
            self.fail(reason)
            return
        mine, theirs = mine.double(), theirs.double()
        finite = theirs.isfinite()
        if not torch.equal(mine[~finite].nan_to_num(nan=7.0), theirs[~finite].nan_to_num(nan=7.0)):
            self.fail("the entries that are not finite are others")
            return
        gap, size = (mine - theirs)[finite].abs(), theirs[finite].abs()
        if not gap.numel():
            return
        largest, scale = gap.max().item(), size.max().item()
        self.largest = max(self.largest, largest)
        self.relative = max(self.relative, largest / scale if scale else largest)
        self._sum, self._size, self._count = (
            self._sum + gap.sum().item(),
            self._size + size.sum().item(),
            self._count + gap.numel(),
        )

    def fail(self, reason: str) -> None:
        """Note that a pair could not be compared, and why."""
        self.problem = self.problem or reason
        self.largest = self.relative = float("inf")

    @property
    def mean(self) -> float:
        """The mean absolute difference."""
        return float("inf") if self.problem else self._sum / self._count if self._count else 0.0

    @property
    def relative_mean(self) -> float:
        """The mean absolute difference over the mean absolute value."""
        if self.problem:
            return float("inf")
        return self._sum / self._size if self._size else self._sum
