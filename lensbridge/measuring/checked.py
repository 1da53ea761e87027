"""Which points of a measured record hold on the model?

What was measured is looked at once more, as every family's record is: the identities between points, on this model. A
point that breaks one, or that cannot be served at all, is refused with what was seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .. import loading
from ..architectures.record import Architecture
from ..checking.outcome import Outcome
from ..checking.report import check_model
from ..errors import UnsupportedModelError
from ..model import HookedTransformer
from ..points import BY_NAME, template
from .facts import some_tokens

GROUPS = ("points", "identities", "HuggingFace's values", "exactness")
#: How often points are left out and the others looked at again: leaving out one can only take others with it.
ROUNDS = 4


def checked(hf_model: Any, record: Architecture) -> Architecture:
    """The record, with what does not hold on this model refused.

    Raises:
        UnsupportedModelError: if something that is about no single point does not hold.
    """
    failures: list[Outcome] = []
    with _quiet():
        for _ in range(ROUNDS):
            model = hooked_with(hf_model, record)
            failures = [each for each in check_model(model, groups=GROUPS).failures if not _only_unlooked_at(each)]
            refused = _refused(model, failures)
            if not refused:
                break
            record = replace(record, refusals={**record.refusals, **refused})
    if failures:
        reasons = "; ".join(f"{each.check}: {each.detail}" for each in failures)
        raise UnsupportedModelError(
            f"{record.hf_class} has no record, and the one that was measured does not hold: {reasons}"
        )
    return record


def hooked_with(hf_model: Any, record: Architecture) -> HookedTransformer:
    """The model as a `HookedTransformer` with this record, without processing and tokenizer."""
    architecture = record.for_model(hf_model)
    cfg = loading.read_config(hf_model, architecture, loading.Wish(record.hf_class), record.hf_class)
    with loading.building(loading.Loaded(hf_model, architecture, cfg)):
        return HookedTransformer(cfg, None, move_to_device=False)


def _only_unlooked_at(failure: Outcome) -> bool:
    """Whether a check says no more than that no identity is about a point."""
    return failure.detail.endswith("is in no identity") and "!=" not in failure.detail


def _refused(model: HookedTransformer, failures: list[Outcome]) -> dict[str, str]:
    """Point -> what was seen of it."""
    found = {
        each.check: f"it was measured, but does not hold: {each.detail}" for each in failures if each.check in BY_NAME
    }
    if any(each.check not in BY_NAME for each in failures):
        # A point that cannot be served breaks the run that all are looked at in.
        found |= {point: f"it cannot be read: {error}" for point, error in _unreadable(model)}
    return found


def _unreadable(model: HookedTransformer) -> Iterator[tuple[str, str]]:
    """(point, error) of each kind of point that a run with only it fails at."""
    tokens = some_tokens(model.hf_model)
    for point in dict.fromkeys(map(template, model.hook_dict)):
        try:
            model.run_with_cache(tokens, names_filter=lambda name, point=point: template(name) == point)
        except Exception as error:
            # Whatever it is, the user is told.
            yield point, f"{type(error).__name__}: {error}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of ours about a model that nobody has asked for yet."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
