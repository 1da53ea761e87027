"""Does `detect_head` give every head 3.9.0's score, for every kind of head, measure and exclusion?"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any, get_args

import pytest
import torch
from transformer_lens import head_detector as theirs

from compat_tests.comparison import close, outcome, same_outcome
from compat_tests.conftest import Pair, Pairs
from compat_tests.rough_models import CORPUS, SUBJECT

ours = import_module(f"{SUBJECT}.head_detector")

TEXTS = [
    "The cat sat on the mat",
    "Mary and John and Mary and John",
    "aaaa",
    ["The cat sat on the mat", "John saw Mary"],
]
#: Each is tried with both measures.
ERRORS: list[dict[str, Any]] = [
    {"detection_pattern": "no_such_head"},
    {"error_measure": "sum"},
    {"seq": ""},
    {"seq": CORPUS[0] * 5},
    {"seq": CORPUS[:1], "cache": object()},
    {"detection_pattern": torch.ones(3, 3)},
    {"detection_pattern": torch.eye(3)},
    {"heads": [(7, 0)]},
    {"heads": {0: [9]}},
]


@pytest.fixture(params=["default", "raw"])
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> Pair:
    return pairs.get(processing=request.param)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The "abs" measure without its rounding, which would turn the last bits of a pattern into a step of 0.001."""
    for module in (ours, theirs):
        monkeypatch.setattr(module, "round", lambda value, digits: value, raising=False)


def detect(pair: Pair, seq: Any, pattern: Any, **options: Any) -> tuple[Any, Any]:
    return tuple(
        module.detect_head(model, seq, pattern, **options)
        for module, model in zip((ours, theirs), pair.both, strict=True)
    )


def test_constants() -> None:
    assert ours.HEAD_NAMES == theirs.HEAD_NAMES
    assert get_args(ours.HeadName) == get_args(theirs.HeadName)
    assert set(get_args(ours.ErrorMeasure)) == set(get_args(theirs.ErrorMeasure))
    for name in ("INVALID_HEAD_NAME_ERR", "DET_PAT_NOT_SQUARE_ERR"):
        assert getattr(ours, name).count("%") == getattr(theirs, name).count("%")


@pytest.mark.parametrize("head", theirs.HEAD_NAMES)
@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_named_heads(pair: Pair, head: str, measure: str, unrounded: None) -> None:
    for seq, bos, current in itertools.product(TEXTS, (False, True), (False, True)):
        options = {"exclude_bos": bos, "exclude_current_token": current, "error_measure": measure}
        close("detect_head", *detect(pair, seq, head, **options))


@pytest.mark.parametrize("heads", [None, [(0, 1), (1, 3), (1, 0)], {1: [2, 0]}, [], {}])
def test_some_heads(pair: Pair, heads: Any) -> None:
    close("detect_head", *detect(pair, TEXTS[0], "induction_head", heads=heads))


@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_a_pattern_of_ones_own(pair: Pair, measure: str, unrounded: None) -> None:
    length = pair.ours.to_tokens(TEXTS[0]).shape[1]
    fractions = torch.rand(length, length, generator=torch.Generator().manual_seed(0)).tril()
    for pattern in (fractions, fractions.round(), torch.eye(length)):
        close("detect_head", *detect(pair, TEXTS[0], pattern, error_measure=measure))


def test_a_given_cache(pair: Pair) -> None:
    for head in theirs.HEAD_NAMES:
        found = [
            module.detect_head(model, TEXTS[0], head, cache=model.run_with_cache(TEXTS[0], remove_batch_dim=True)[1])
            for module, model in zip((ours, theirs), pair.both, strict=True)
        ]
        close("detect_head", *found)


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("change", ERRORS, ids=lambda change: "-".join(change))
def test_errors(pair: Pair, change: dict[str, Any], measure: str) -> None:
    call = {"seq": TEXTS[0], "detection_pattern": "induction_head", "error_measure": measure} | change
    mine, other = (
        outcome(lambda m=module, model=model: m.detect_head(model, **call))
        for module, model in zip((ours, theirs), pair.both, strict=True)
    )
    same_outcome("detect_head", mine, other)


def test_detection_patterns() -> None:
    generator = torch.Generator().manual_seed(0)
    for length, vocabulary in itertools.product((1, 2, 5, 12), (1, 3, 100)):
        tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
        for head in theirs.HEAD_NAMES:
            name = f"get_{head}_detection_pattern"
            mine, other = (getattr(module, name)(tokens) for module in (ours, theirs))
            assert torch.equal(mine, other) and mine.dtype == other.dtype


@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_similarity_of_matrices(measure: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for bos, current in itertools.product((False, True), (False, True)):
        attention = torch.randn(6, 6, generator=generator).tril().abs()
        wanted = torch.rand(6, 6, generator=generator).tril().round()
        options = {"exclude_bos": bos, "exclude_current_token": current, "error_measure": measure}
        mine, other = (
            module.compute_head_attention_similarity_score(attention.clone(), wanted, **options)
            for module in (ours, theirs)
        )
        assert type(mine) is type(other)
        assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.ours_only
def test_a_matrix_with_several_prompts_is_scored_on_all_of_them(pairs: Pairs) -> None:
    pair = pairs.get()
    texts = ["Mary and John", "John and Mary"]
    length = pair.ours.to_tokens(texts[0]).shape[1]
    assert pair.ours.to_tokens(texts).shape[1] == length
    diagonal = torch.eye(length)
    single = [theirs.detect_head(pair.theirs, text, diagonal) for text in texts]
    close("detect_head", ours.detect_head(pair.ours, texts, diagonal), torch.stack(single).mean(0))
    # 3.9.0 has only looked at the first.
    close("detect_head", theirs.detect_head(pair.theirs, texts, diagonal), single[0])
