"""What does a comparison say, as plain data?

Everything that the terminal, the page and the JSON file show is here. A difference is about one point (or the logits)
in one basis, against one of the two references; a promise is what must hold of them, and decides the exit code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .. import __version__
from ..points import POINTS, layer_of, template
from .gaps import Gap

#: What the format of `Comparison.as_json` is called; it changes with the format.
SCHEMA = "lensbridge-compare/1"
HUGGINGFACE = "HuggingFace"
REFERENCE = "TransformerLens 3.9.0"
#: Rows that are about no hook point.
LOGITS = "logits"
LOG_PROBABILITIES = "log probabilities"

#: Kind of point -> its place in TransformerLens' order.
_ORDER = {point.name: index for index, point in reversed([*enumerate(POINTS)])}
_FIRST_IN_LAYERS = _ORDER["blocks.{l}.hook_resid_pre"]

Basis = Literal["without processing", "with processing"]
RAW: Basis = "without processing"
PROCESSED: Basis = "with processing"
Status = Literal["holds", "fails", "known", "shown"]


@dataclass(frozen=True)
class Difference:
    """How far a point is from a reference over all prompts.

    ``source`` says what it is compared with. The status is "known" where a difference has a reason that is written
    down, "shown" where the reference is no measure; ``reason`` has it in both cases, and what is wrong where it fails.
    """

    against: str
    basis: Basis
    point: str
    source: str
    status: Status
    largest: float
    mean: float
    relative: float
    relative_mean: float
    same_bits: bool
    reason: str = ""

    @classmethod
    def of(
        cls, against: str, basis: Basis, point: str, source: str, gap: Gap, tolerance: float, excuse: str = ""
    ) -> Difference:
        """A difference by its numbers; ``excuse`` is why it may be larger than the tolerance."""
        holds = not gap.problem and gap.relative <= tolerance
        status: Status = "holds" if holds else "known" if excuse else "fails"
        reason = "" if holds else excuse or gap.problem or f"more than {tolerance:.0e} of the largest value"
        return cls(
            against,
            basis,
            point,
            source,
            status,
            gap.largest,
            gap.mean,
            gap.relative,
            gap.relative_mean,
            gap.same_bits,
            reason,
        )

    def only_shown(self, reason: str) -> Difference:
        """The same where the reference is no measure."""
        return replace(self, status="shown", reason=reason)

    def place(self) -> tuple[bool, int, int, str]:
        """What rows are sorted by: basis, layer, and TransformerLens' order of the points."""
        rank, layer = _ORDER.get(self.kind, len(POINTS)), self.layer
        around = -1 if rank < _FIRST_IN_LAYERS else 10**6
        return self.basis == PROCESSED, around if layer is None else layer, rank, self.point

    @property
    def kind(self) -> str:
        """The point with ``{l}`` for its layer."""
        return template(self.point)

    @property
    def layer(self) -> int | None:
        """The layer of the point; None around the layers."""
        return layer_of(self.point)


@dataclass(frozen=True)
class Promise:
    """One thing that must hold, whether it does, and the number or reason that shows it. None: it was not tried."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class Cost:
    """What a tool takes on this model: milliseconds by task, and MiB; ``problem`` is why there are none."""

    tool: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    fastest: dict[str, float] = field(default_factory=dict)
    mebibytes: dict[str, float] = field(default_factory=dict)
    load_seconds: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Setting:
    """What was compared, and how."""

    model: str
    hf_class: str
    model_type: str
    n_layers: int
    n_parameters: int
    dtype: str
    device: str
    attention: str
    prompts: tuple[str, ...]
    lengths: tuple[int, ...]
    bases: tuple[Basis, ...]
    tolerance: float
    rounds: int
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """The whole of it."""

    setting: Setting
    differences: tuple[Difference, ...]
    promises: tuple[Promise, ...]
    costs: tuple[Cost, ...] = ()
    #: kind of point -> why the model has none, in some layer or in all.
    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: What else there is to say, a sentence each.
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no promise is broken."""
        return all(promise.holds is not False for promise in self.promises)

    @property
    def groups(self) -> list[tuple[str, Basis]]:
        """The pairs of a reference and a basis that something was compared in."""
        return list(dict.fromkeys((each.against, each.basis) for each in self.differences))

    def of(self, against: str, basis: Basis) -> list[Difference]:
        """The differences from one reference in one basis, in the order of the points."""
        return [each for each in self.differences if (each.against, each.basis) == (against, basis)]

    def worst(self, against: str, basis: Basis) -> list[Difference]:
        """Of each kind of point the difference that is largest relative to its values, what fails before the rest."""
        return worst_by_kind(self.of(against, basis))

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file; what is no finite number is null, and its reason says why."""
        return {
            "schema": SCHEMA,
            "lensbridge": __version__,
            "holds": self.holds,
            **_plain({"setting": asdict(self.setting), "promises": [asdict(each) for each in self.promises]}),
            "differences": [
                _plain({**asdict(each), "kind": each.kind, "layer": each.layer}) for each in self.differences
            ],
            "costs": [_plain(asdict(each)) for each in self.costs],
            "absent": {kind: list(reasons) for kind, reasons in self.absent.items()},
            "notes": list(self.notes),
        }


def worst_by_kind(differences: Iterable[Difference]) -> list[Difference]:
    """Of each kind of point the worst difference, in the order in which kinds first appear."""
    found: dict[str, Difference] = {}
    for each in differences:
        before = found.get(each.kind)
        if before is None or _badness(each) > _badness(before):
            found[each.kind] = each
    return list(found.values())


def _badness(difference: Difference) -> tuple[bool, float]:
    return difference.status == "fails", difference.relative


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
