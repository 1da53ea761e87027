"""What came out of a check, and when do two tensors count as equal?

A check is one fact about a model, such as "resid_mid is resid_pre + attn_out", looked at in all layers. It holds, or it
fails, or it is known not to hold and why, or what it speaks of does not exist in the model, for a reason that the
outcome gives. Nothing is left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

#: ``max |a - b| <= TOLERANCE * max |b|``: a hundred times what rounding makes of float32, as sums and products of a
#: model's width add it up.
TOLERANCE = 1e-5

#: Group -> pattern of checks, as for `fnmatch` -> why these are known not to hold.
Known = Mapping[str, Mapping[str, str]]
Status = Literal["holds", "fails", "known", "absent"]


@dataclass(frozen=True)
class Outcome:
    """One check: its group and name, how it went, what to say of it, and the largest relative difference it has found.

    ``lacking`` says why some layers, or all, have nothing that it could look at.
    """

    group: str
    check: str
    status: Status
    detail: str = ""
    difference: float | None = None
    lacking: tuple[str, ...] = ()

    @property
    def is_fine(self) -> bool:
        """Whether there is nothing to explain."""
        return self.status != "fails"


@dataclass
class _Finding:
    problems: list[str] = field(default_factory=list)
    difference: float | None = None
    compared: int = 0
    absent: list[str] = field(default_factory=list)


class Findings:
    """The outcomes of one group of checks, while they are made; a check may be looked at many times.

    Args:
        group: the name of the group.
        known: group -> check -> why it is known not to hold.
    """

    def __init__(self, group: str, known: Known | None = None) -> None:
        self.group = group
        self.known = (known or {}).get(group, {})
        self._found: dict[str, _Finding] = {}

    def compare(self, check: str, mine: Tensor, theirs: Tensor, where: str = "", tolerance: float = TOLERANCE) -> bool:
        """Note how far apart two tensors are that should be equal up to rounding; whether they are."""
        difference = relative_difference(mine, theirs)
        finding = self._of(check)
        finding.difference = max(difference, finding.difference or 0.0)
        if difference > tolerance:
            problem = unlike(mine, theirs) or f"relative difference {difference:.1e}"
            finding.problems.append(f"{where}: {problem}" if where else problem)
        return difference <= tolerance

    def same(self, check: str, mine: Tensor, theirs: Tensor, where: str = "") -> bool:
        """Note whether two tensors are equal bit by bit."""
        equal = torch.equal(mine, theirs)
        difference = relative_difference(mine, theirs)
        finding = self._of(check)
        finding.difference = max(difference, finding.difference or 0.0)
        if not equal:
            problem = unlike(mine, theirs) or f"not equal, relative difference {difference:.1e}"
            finding.problems.append(f"{where}: {problem}" if where else problem)
        return equal

    def say(self, check: str, holds: bool, problem: str) -> None:
        """Note whether a fact holds, and what is wrong otherwise."""
        finding = self._of(check)
        if not holds:
            finding.problems.append(problem)

    def absent(self, check: str, reason: str) -> None:
        """Note that a check does not apply, and why."""
        reasons = self._found.setdefault(check, _Finding()).absent
        if reason not in reasons:
            reasons.append(reason)

    @contextmanager
    def trying(self, check: str, where: str = "") -> Iterator[None]:
        """An exception in here is a problem of the check, and the others go on."""
        try:
            yield
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            self._of(check).problems.append(f"{where}: {problem}" if where else problem)

    def _of(self, check: str) -> _Finding:
        finding = self._found.setdefault(check, _Finding())
        finding.compared += 1
        return finding

    def outcomes(self) -> list[Outcome]:
        """What was found, in the order in which checks were first looked at."""
        return [self._outcome(check, finding) for check, finding in self._found.items()]

    def _outcome(self, check: str, finding: _Finding) -> Outcome:
        lacking = tuple(finding.absent)
        if not finding.compared:
            return Outcome(self.group, check, "absent", "; ".join(lacking), lacking=lacking)
        if not finding.problems:
            return Outcome(self.group, check, "holds", "", finding.difference, lacking)
        shown, more = finding.problems[:3], len(finding.problems) - 3
        detail = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
        known = next((reason for pattern, reason in self.known.items() if fnmatchcase(check, pattern)), None)
        if known is not None:
            return Outcome(self.group, check, "known", known, finding.difference, lacking)
        return Outcome(self.group, check, "fails", detail, finding.difference, lacking)


def relative_difference(mine: Tensor, theirs: Tensor) -> float:
    """``max |mine - theirs| / max |theirs|`` over the finite entries; infinite if those are not the same ones."""
    if mine.shape != theirs.shape:
        return float("inf")
    if not theirs.numel() or torch.equal(mine, theirs):
        return 0.0
    mine, theirs = mine.detach().double(), theirs.detach().double()
    gap, size = (mine - theirs).abs().max().item(), theirs.abs().max().item()
    if math.isfinite(gap) and math.isfinite(size):
        return gap / size if size else gap
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()) or not torch.equal(
        mine[~finite].nan_to_num(nan=7.0), theirs[~finite].nan_to_num(nan=7.0)
    ):
        return float("inf")
    mine, theirs = mine[finite], theirs[finite]
    if not theirs.numel():
        return 0.0
    gap, size = (mine - theirs).abs().max().item(), theirs.abs().max().item()
    return gap / size if size else gap


def unlike(mine: Tensor, theirs: Tensor) -> str | None:
    """What keeps two tensors from being compared number by number, in words."""
    if mine.shape != theirs.shape:
        return f"shape {list(mine.shape)} instead of {list(theirs.shape)}"
    if not torch.equal(mine.isfinite(), theirs.isfinite()):
        return f"{int((~mine.isfinite()).sum())} entries are not finite, instead of {int((~theirs.isfinite()).sum())}"
    return None
