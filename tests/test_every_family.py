"""Does everything hold that must, on a tiny random model of every family that has a record?

HuggingFace's own forward is the reference. What is checked, and how, is `lensbridge.checking`; here each group of
checks of each family is one test. What is known not to hold is in `lensbridge.checking.known`, with its reason, and an
entry there that holds after all fails here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from lensbridge.architectures import BY_CLASS
from lensbridge.architectures.record import Architecture
from lensbridge.checking import GROUPS, KNOWN, Outcome, Report, hooked
from lensbridge.checking.edits import check_edits
from lensbridge.checking.effects import check_effects
from lensbridge.checking.exactness import processed
from lensbridge.checking.families import family_class, recorded, refusal
from lensbridge.checking.subject import Subject
from lensbridge.errors import UnsupportedModelError
from lensbridge.tiny import FAMILIES, tiny_family

KEYS = [key for key in recorded() if refusal(key) is None]


@lru_cache(maxsize=2)
def subject_of(key: str) -> Subject:
    """The tiny model of a family; the checks of a family come one after the other."""
    return Subject(hooked(tiny_family(key), key), KNOWN.get(key))


@lru_cache(maxsize=1)
def table() -> ModuleType:
    """The script that makes the table of families."""
    path = Path(__file__).parent.parent / "docs" / "make_families.py"
    spec = importlib.util.spec_from_file_location("make_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page() -> str:
    """The table of families, as it is."""
    return table().PAGE.read_text(encoding="utf-8")


@lru_cache(maxsize=4 * len(GROUPS))
def outcomes_of(key: str, group: str) -> tuple[Outcome, ...]:
    return tuple(GROUPS[group](subject_of(key)))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word about options of processing that are left out."""
    monkeypatch.setattr(logging.root, "level", logging.ERROR)


def explained(outcomes: Any) -> str:
    return "\n".join(f"{outcome.group}: {outcome.check}: {outcome.detail}" for outcome in outcomes)


#: The groups that are checked by default; the others take minutes.
QUICK = ("points", "identities", "HuggingFace's values", "exactness")


@pytest.mark.parametrize(
    ("key", "group"),
    [pytest.param(key, group, marks=[] if group in QUICK else [pytest.mark.slow]) for key in KEYS for group in GROUPS],
)
def test_what_must_hold(key: str, group: str) -> None:
    outcomes = outcomes_of(key, group)
    failures = [outcome for outcome in outcomes if not outcome.is_fine]
    assert not failures, explained(failures)
    no_text = subject_of(key).architecture.no_text
    if group == "generation" and no_text is not None:
        assert [outcome.detail for outcome in outcomes] == [no_text]
    else:
        assert any(outcome.status in ("holds", "known") for outcome in outcomes), f"nothing was checked: {outcomes}"
    report = Report("", key, outcomes, KNOWN.get(key, {}))
    assert list(report.unneeded()) == [], "listed as not holding, but nothing fails there"


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_an_edit_at_every_point_of_every_layer(key: str) -> None:
    outcomes = check_edits(subject_of(key), everywhere=True)
    assert not (failures := [outcome for outcome in outcomes if not outcome.is_fine]), explained(failures)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_edits_in_the_processed_basis(key: str) -> None:
    subject = subject_of(key)
    with processed(subject):
        outcomes = check_edits(subject) + check_effects(subject)
    assert not (failures := [outcome for outcome in outcomes if not outcome.is_fine]), explained(failures)


#: Attributes that transformers' masks ask any config for, which few have.
READ_WITH_A_DEFAULT = ("is_causal",)


@pytest.mark.parametrize(
    ("record", "condition"),
    [pytest.param(r, c, id=f"{r.model_type}-{c}") for r in BY_CLASS.values() for c in r.refused],
)
def test_what_a_record_refuses_is_refused_with_its_reason(record: Architecture, condition: str) -> None:
    hf = tiny_family(record.model_type)
    path, _, value = condition.partition("=")
    unlike, path = path.endswith("!"), path.removesuffix("!")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, hf.config.get_text_config(decoder=True))
    assert hasattr(owner, name) or name in READ_WITH_A_DEFAULT
    # Configs look at types: of numbers there are some of either.
    tried = (value != "False", 1, 1.0) if value in ("", "True", "False") else (value,)
    for given in (getattr(owner, name) * 2,) if unlike else tried:
        with contextlib.suppress(StrictDataclassFieldValidationError):
            setattr(owner, name, given)
            break
    with pytest.raises(UnsupportedModelError, match=re.escape(record.refused[condition])):
        hooked(hf)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_the_table_of_families_has_what_was_found(key: str) -> None:
    outcomes = tuple(outcome for group in GROUPS for outcome in outcomes_of(key, group))
    report = Report("", key, outcomes, KNOWN.get(key, {}))
    assert table().rows_of(page())[key] == table().row(key, report), f"run `python docs/make_families.py {key}`"


@pytest.mark.slow
def test_the_table_of_families_is_whole() -> None:
    """Besides the rows of what is checked, which the test above compares."""
    rows = table().rows_of(page())
    assert all(rows[key] == table().row_of_refused(key) for key in FAMILIES if not table().served(key))
    assert table().render(rows) == page(), "run `python docs/make_families.py`"


def test_every_record_is_of_some_family() -> None:
    """A record that no tiny model has would not be tested; `test_multimodal.py` has the one that also sees."""
    tested = {family_class(key) for key in KEYS}
    assert tested == set(BY_CLASS) - {"MllamaForConditionalGeneration"}


def test_what_is_known_not_to_hold_is_of_a_family_and_a_group() -> None:
    assert set(KNOWN) <= set(FAMILIES)
    assert all(set(groups) <= set(GROUPS) for groups in KNOWN.values())
