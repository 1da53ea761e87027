"""How far is each point, and are the logits, from HuggingFace's own forward?

The model is run with everything cached, and by itself with PyTorch's own hooks; `sources` pairs the points with what
HuggingFace has there. Without processing the logits must be the same to the last bit, with and without a cache; with
processing, log probabilities must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..checking.known import KNOWN
from ..checking.subject import DEFAULT_PROCESSING, Look, Subject
from ..points import template
from ..processing import Processing
from .gaps import Gap
from .result import HUGGINGFACE, LOG_PROBABILITIES, LOGITS, PROCESSED, RAW, Basis, Difference, Promise
from .sources import comparisons

GROUPS = {RAW: ("identities", "HuggingFace's values"), PROCESSED: ("identities, processed", "HuggingFace's values")}
Step = Callable[[str], None]


class OnTokens(Subject):
    """A model under comparison, on tokens that were chosen."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        super().__init__(model, KNOWN.get(model.hf_model.config.model_type))
        self.__dict__["tokens"] = tokens


@contextmanager
def shown(subject: Subject, basis: Basis) -> Iterator[None]:
    """The time in which the model shows values in a basis."""
    with subject.processed(DEFAULT_PROCESSING if basis == PROCESSED else Processing()):
        yield


def looks(subject: Subject) -> Iterator[tuple[tuple[str, ...], Look]]:
    """Full caches with all flags on in turn: (the flags, the run)."""
    for flags in subject.flags():
        with subject.turned_on(flags):
            yield flags, subject.look()


class HuggingFaceComparison:
    """Collects the differences from HuggingFace's own forward over prompts.

    Args:
        bases: those in which values are compared.
        tolerance: how far apart they may be, relative to the largest.
    """

    def __init__(self, bases: Sequence[Basis], tolerance: float) -> None:
        self.bases, self.tolerance = tuple(bases), tolerance
        self._gaps: dict[tuple[Basis, str], tuple[Gap, str]] = {}
        self._uncompared: dict[str, str] = {}
        #: point -> the point whose equation it is compared by.
        self._through: dict[str, str] = {}
        self._known: Mapping[str, Mapping[str, str]] = {}

    def add(self, model: Any, tokens: Tensor, step: Step = lambda what: None) -> None:
        """Compare on one more prompt."""
        subject = OnTokens(model, tokens)
        self._known = subject.known
        logits = subject.plain.logits
        assert logits is not None
        for basis in self.bases:
            step(f"HuggingFace, {basis}")
            with shown(subject, basis), torch.no_grad():
                self._add_logits(basis, subject.run(), logits, "no hooks")
                self._add_points(subject, basis, logits)

    def _add_points(self, subject: Subject, basis: Basis, logits: Tensor) -> None:
        seen: set[str] = set()
        compared: set[str] = set()
        for _, look in looks(subject):
            self._add_logits(basis, look.logits, logits, "a cache of everything")
            seen |= set(look.values)
            for each in comparisons(subject, look):
                if each.point not in compared:
                    compared.add(each.point)
                    gap = self._gap(basis, each.point, each.source)
                    self._through[each.point] = each.through or each.point
                    if isinstance(each.expected, str):
                        gap.fail(each.expected)
                    else:
                        gap.add(each.value, each.expected)
        for name in sorted(seen - compared):
            self._uncompared.setdefault(name, "no equation, and no module that shows it")

    def _add_logits(self, basis: Basis, mine: Tensor, theirs: Tensor, how: str) -> None:
        if basis == RAW:
            self._gap(basis, LOGITS, "HuggingFace's logits").add(mine, theirs)
        else:
            mine, theirs = mine.float().log_softmax(-1), theirs.float().log_softmax(-1)
            self._gap(basis, LOG_PROBABILITIES, "log softmax of HuggingFace's logits").add(mine, theirs)

    def _gap(self, basis: Basis, point: str, source: str) -> Gap:
        return self._gaps.setdefault((basis, point), (Gap(), source))[0]

    # --- what came out ------------------------------------------------------------------------------------------------

    def differences(self) -> list[Difference]:
        """One row for each point and basis, in TransformerLens' order of the points; logits come last."""
        found = []
        for (basis, point), (gap, source) in self._gaps.items():
            excuse = self._excuse(basis, point)
            found.append(Difference.of(HUGGINGFACE, basis, point, source, gap, self.tolerance, excuse))
        return sorted(found, key=Difference.place)

    def _excuse(self, basis: Basis, point: str) -> str:
        """Why a point is known not to agree, if it is."""
        kind = template(self._through.get(point, point))
        for group in GROUPS[basis]:
            for pattern, reason in self._known.get(group, {}).items():
                about_norms = pattern == "norms' outputs" and point.endswith(".hook_normalized")
                if about_norms or fnmatchcase(kind, pattern):
                    return reason
        return ""

    def promises(self) -> list[Promise]:
        """What must hold next to HuggingFace."""
        found = []
        differences = self.differences()
        for basis in self.bases:
            rows = [each for each in differences if each.basis == basis]
            if basis == RAW:
                logits = self._gaps[RAW, LOGITS][0]
                detail = "equal to the last bit" if logits.same_bits else f"apart by up to {logits.largest:.1e}"
                found.append(Promise("logits are HuggingFace's, without processing", logits.same_bits, detail))
            else:
                gap = self._gaps[PROCESSED, LOG_PROBABILITIES][0]
                detail = gap.problem or f"apart by up to {gap.relative:.1e} of the largest"
                holds = gap.relative <= self.tolerance
                found.append(Promise("log probabilities are HuggingFace's, with processing", holds, detail))
            points = [each for each in rows if each.point not in (LOGITS, LOG_PROBABILITIES)]
            found.append(promise_of(f"points are HuggingFace's, {basis}", points))
        if self._uncompared:
            names = ", ".join(self._uncompared)
            found.append(Promise("every point could be compared with HuggingFace", None, f"not compared: {names}"))
        return found


def promise_of(name: str, points: Sequence[Difference]) -> Promise:
    """That no point is too far from its reference."""
    wrong = [each for each in points if each.status == "fails"]
    if wrong:
        worst = max(wrong, key=lambda each: each.relative)
        return Promise(name, False, f"{len(wrong)} of {len(points)} are not; {worst.point}: {worst.reason}")
    fine = [each for each in points if each.status == "holds"]
    if not fine:
        return Promise(name, None, "nothing was compared")
    worst = max(fine, key=lambda each: each.relative)
    known = len(points) - len(fine)
    detail = f"{len(fine)} points, the worst {worst.relative:.1e} apart ({worst.point})"
    return Promise(name, True, detail + (f"; {known} known to differ" if known else ""))
