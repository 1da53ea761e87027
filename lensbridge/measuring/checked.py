"""Which points of a measured record hold on the model?

What was measured is looked at once more, as every family's record is: the identities between points, on this model. A
point that breaks one, or that cannot be served at all, is refused with what was seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .. import loading
from ..architectures.record import Architecture
from ..checking.identities import Identity, identities_of
from ..checking.outcome import TOLERANCE, relative_difference
from ..checking.report import check_model
from ..checking.shapes import shape_problems
from ..checking.subject import Look, Subject
from ..errors import UnsupportedModelError
from ..model import HookedTransformer
from ..points import layer_of, template
from .derive import refusals
from .findings import NEURONS, QUERIES, VALUES

#: Checks that are not about single points.
WHOLE = ("HuggingFace's values", "exactness")
#: What among them is about attention that not all classes have.
ELSEWHERE = ("scaled dot product attention",)
#: Points whose equation names what a norm returns.
READERS = frozenset((*QUERIES, *VALUES, *NEURONS))


def checked(hf_model: torch.nn.Module, record: Architecture) -> Architecture:
    """The record, with what does not hold on this model refused.

    Raises:
        UnsupportedModelError: if something that is about no single point does not hold.
    """
    with _quiet():
        for seen in (_unreadable, _contradicted):
            subject = Subject(hooked_with(hf_model, record))
            refused = dict(seen(subject))
            if refused:
                record = replace(record, lacks=(*record.lacks, *refusals(refused)))
        failures = check_model(hooked_with(hf_model, record), groups=WHOLE).failures
    fatal = [each for each in failures if each.check not in ELSEWHERE and "KeyError: 'blocks." not in each.detail]
    reasons = [f"{each.check}: {each.detail}" for each in fatal]
    if reasons:
        raise UnsupportedModelError(
            f"{record.hf_class} has no record, and the one that was measured does not hold: {'; '.join(reasons)}"
        )
    return record


def hooked_with(hf_model: torch.nn.Module, record: Architecture) -> HookedTransformer:
    """The model as a `HookedTransformer` with this record, without processing and tokenizer."""
    architecture = record.for_model(hf_model)
    cfg = loading.read_config(hf_model, architecture, loading.Wish(record.hf_class), record.hf_class)
    with loading.building(loading.Loaded(hf_model, architecture, cfg)):
        return HookedTransformer(cfg, None, move_to_device=False)


def _contradicted(subject: Subject) -> Iterator[tuple[str, str]]:
    """(point by its name in the table, what was seen) of what is not as its equation says, or does not fire."""
    for flags in subject.flags():
        with subject.turned_on(flags):
            look = subject.look()
            for name in subject.names:
                problems = shape_problems(subject, name, look[name]) if name in look else ["it does not fire"]
                if problems:
                    yield template(name), f"{name} {', '.join(problems)}"
            for identity in identities_of(subject):
                problem = _problem(subject, identity, look)
                if problem is not None:
                    yield template(identity.point), problem


def _problem(subject: Subject, identity: Identity, look: Look) -> str | None:
    """How a value contradicts its equation; None if it does not, or if the equation speaks of points there are not."""
    layer = layer_of(identity.point)
    if layer is not None and subject.block(layer).gated_norms and template(identity.point) in READERS:
        # What they read is not the norm's output.
        return None
    try:
        with torch.no_grad():
            difference = relative_difference(*identity.sides(look, look[identity.point]))
    except (KeyError, LookupError):
        return None
    except (RuntimeError, ValueError) as error:
        return f"{identity.point} cannot be compared with {identity.equation}: {error}"
    if difference <= TOLERANCE:
        return None
    return f"{identity.point} was measured, but is not {identity.equation} (relative difference {difference:.1e})"


def _unreadable(subject: Subject) -> Iterator[tuple[str, str]]:
    """(point, error) of each kind of point that a run with only it fails at, if a run with all fails."""
    for flags in subject.flags():
        with subject.turned_on(flags):
            try:
                subject.look()
                continue
            except Exception as error:
                logging.debug("a run with every point fails: %s", error)
            for point in dict.fromkeys(map(template, subject.names)):
                names = [name for name in subject.names if template(name) == point]
                try:
                    subject.model.run_with_cache(subject.tokens, names_filter=names)
                except Exception as error:
                    # Whatever it is, the user is told.
                    yield point, f"it cannot be read: {type(error).__name__}: {error}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of ours about a model that nobody has asked for yet."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
