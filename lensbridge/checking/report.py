"""What do all checks together say about a model?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from .baseline import check_against_modules, check_identities, check_points
from .edits import check_edits
from .effects import check_effects
from .exactness import check_dtype, check_exactness, check_processing, processed
from .gradients import check_gradients
from .outcome import Known, Outcome
from .subject import Subject
from .texts import check_generation, check_padding
from .weights import check_weights


def _processed_identities(subject: Subject) -> list[Outcome]:
    with processed(subject):
        return check_identities(subject, "identities, processed")


def _bfloat16(subject: Subject) -> list[Outcome]:
    return check_dtype(subject, torch.bfloat16)


Group = Callable[[Subject], list[Outcome]]

#: name -> what makes its checks, the cheap ones first.
GROUPS: dict[str, Group] = {
    "points": check_points,
    "identities": check_identities,
    "HuggingFace's values": check_against_modules,
    "exactness": check_exactness,
    "weights": check_weights,
    "processing": check_processing,
    "identities, processed": _processed_identities,
    "effects": check_effects,
    "edits": check_edits,
    "gradients": check_gradients,
    "padding": check_padding,
    "generation": check_generation,
    "bfloat16": _bfloat16,
}


@dataclass(frozen=True)
class Report:
    """The outcomes of the checks of one model."""

    model_class: str
    model_type: str
    outcomes: tuple[Outcome, ...]
    known: Known

    @property
    def holds(self) -> bool:
        """Whether nothing fails that is not known to."""
        return not self.failures

    @property
    def failures(self) -> list[Outcome]:
        """What fails."""
        return [outcome for outcome in self.outcomes if not outcome.is_fine]

    def of(self, group: str) -> list[Outcome]:
        """The outcomes of one group."""
        return [outcome for outcome in self.outcomes if outcome.group == group]

    def counts(self, group: str) -> Counter[str]:
        """How many checks of a group there are of each status."""
        return Counter(outcome.status for outcome in self.of(group))

    @property
    def groups(self) -> list[str]:
        """The groups that were checked, in order."""
        return list(dict.fromkeys(outcome.group for outcome in self.outcomes))

    def unneeded(self) -> Iterator[str]:
        """What is listed as not holding although nothing that was checked fails there."""
        for group in set(self.groups) & set(self.known):
            for pattern in self.known[group]:
                matching = [outcome for outcome in self.of(group) if fnmatchcase(outcome.check, pattern)]
                if not any(outcome.status == "known" for outcome in matching):
                    yield f"{group}: {pattern}"

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "model_class": self.model_class,
            "model_type": self.model_type,
            "holds": self.holds,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


def _outcomes(subject: Subject, group: str) -> list[Outcome]:
    """The outcomes of one group; that it cannot be checked at all is one, too."""
    try:
        return GROUPS[group](subject)
    except Exception as error:
        return [Outcome(group, "to run at all", "fails", f"{type(error).__name__}: {error}")]


def check_model(model: Any, known: Known | None = None, groups: Collection[str] | None = None) -> Report:
    """Check everything that must hold of a hooked model, by running it on a few random tokens.

    The model's hooks must be off. Its flags and processing are changed during the checks and put back.

    Args:
        model: a `HookedTransformer` on a HuggingFace model, without processing.
        known: what is known not to hold, and why.
        groups: names of `GROUPS`; all of them if not given. A copy of the model is made for "bfloat16".
    """
    subject = Subject(model, known)
    chosen = [name for name in GROUPS if groups is None or name in groups]
    outcomes = tuple(outcome for name in chosen for outcome in _outcomes(subject, name))
    hf = model.hf_model
    return Report(type(hf).__name__, hf.config.model_type, outcomes, subject.known)
