"""Does every kind of head get the score it should, and does bad input get a clear error?"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from lensbridge import head_detector as hd
from lensbridge.head_detector import compute_head_attention_similarity_score as similarity
from lensbridge.head_detector import detect_head

TEXT = "The cat sat on"


@pytest.fixture
def tokens() -> torch.Tensor:
    """a b c a b: two tokens come twice."""
    return torch.tensor([[7, 8, 9, 7, 8]])


def pairs(pattern: torch.Tensor) -> set[tuple[int, int]]:
    """The (query, key) pairs where a pattern is 1; everywhere else it must be 0."""
    assert set(pattern.unique().tolist()) <= {0.0, 1.0}
    return {(q, k) for q, k in pattern.nonzero().tolist()}


def test_previous_token_pattern(tokens: torch.Tensor) -> None:
    assert pairs(hd.get_previous_token_head_detection_pattern(tokens)) == {(1, 0), (2, 1), (3, 2), (4, 3)}


def test_duplicate_token_pattern(tokens: torch.Tensor) -> None:
    assert pairs(hd.get_duplicate_token_head_detection_pattern(tokens)) == {(3, 0), (4, 1)}


def test_induction_pattern(tokens: torch.Tensor) -> None:
    assert pairs(hd.get_induction_head_detection_pattern(tokens)) == {(3, 1), (4, 2)}


def test_a_name_for_every_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    hd.get_supported_heads()
    assert capsys.readouterr().out == f"Supported heads: {hd.HEAD_NAMES}\n"
    assert get_args(hd.HeadName) == hd.HEAD_NAMES
    assert all(callable(getattr(hd, f"get_{name}_detection_pattern")) for name in hd.HEAD_NAMES)


@pytest.fixture
def attention() -> torch.Tensor:
    return torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.3, 0.2]])


@pytest.mark.parametrize(
    ("bos", "current", "score"),
    [(False, False, 0.55 / 3), (True, False, 0.3 / 1.25), (False, True, 0.55 / 1.05), (True, True, 1.0)],
)
def test_mul_is_the_share_of_attention_on_the_pattern(
    attention: torch.Tensor, bos: bool, current: bool, score: float
) -> None:
    wanted = hd.get_previous_token_head_detection_pattern(torch.zeros(1, 3))
    before = attention.clone()
    found = similarity(attention, wanted, exclude_bos=bos, exclude_current_token=current, error_measure="mul")
    assert found == pytest.approx(score)
    assert torch.equal(attention, before)


def test_abs_is_one_for_the_pattern_itself_and_counts_differences_per_query(attention: torch.Tensor) -> None:
    options: dict[str, Any] = {"exclude_bos": False, "exclude_current_token": False, "error_measure": "abs"}
    assert similarity(attention, attention, **options) == 1.0
    other = attention.clone()
    other[1] = torch.tensor([0.85, 0.15, 0.0])
    # One of three queries differs, by 0.6 on each of two keys.
    assert similarity(attention, other, **options) == pytest.approx(1 - 0.4)
    assert similarity(attention, other, **options | {"exclude_bos": True}) == pytest.approx(1 - 0.2)


def test_attention_must_be_one_causal_matrix(attention: torch.Tensor) -> None:
    options: dict[str, Any] = {"exclude_bos": False, "exclude_current_token": False}
    with pytest.raises(AssertionError, match="remove_batch_dim"):
        similarity(attention[None], attention, error_measure="mul", **options)
    with pytest.raises(AssertionError, match="not square"):
        similarity(attention[:2], attention, error_measure="mul", **options)
    with pytest.raises(AssertionError, match="lower triangular"):
        similarity(attention.T, attention, error_measure="abs", **options)


def test_scores_of_all_heads_by_hand(lens: Any) -> None:
    scores = detect_head(lens, TEXT, "previous_token_head")
    _, cache = lens.run_with_cache(TEXT)
    pattern = torch.stack([cache["pattern", layer][0] for layer in range(2)])
    by_hand = pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1) / pattern.sum((-1, -2))
    torch.testing.assert_close(scores, by_hand)


def test_only_the_patterns_that_are_needed_are_run_for(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = lens.run_with_cache
    monkeypatch.setattr(lens, "run_with_cache", lambda *a, **k: asked.append(k["names_filter"]) or run(*a, **k))
    scores = detect_head(lens, TEXT, "induction_head", heads=[(1, 0), (1, 2)])
    assert asked == [["blocks.1.attn.hook_pattern"]]
    assert (scores != -1).nonzero().tolist() == [[1, 0], [1, 2]]
    assert torch.equal(scores, detect_head(lens, TEXT, "induction_head", heads={1: [0, 2]}))


def test_a_cache_saves_the_run(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = detect_head(lens, TEXT, "duplicate_token_head", error_measure="abs")
    _, cache = lens.run_with_cache(TEXT, remove_batch_dim=True)
    kept = cache["pattern", 0].clone()
    monkeypatch.setattr(lens, "run_with_cache", None)
    assert torch.equal(
        detect_head(lens, TEXT, "duplicate_token_head", cache=cache, error_measure="abs", exclude_bos=False), expected
    )
    detect_head(lens, TEXT, "duplicate_token_head", cache=cache, exclude_bos=True, exclude_current_token=True)
    assert torch.equal(cache["pattern", 0], kept)


def test_several_prompts_give_the_mean(lens: Any) -> None:
    texts = [TEXT, "the dog saw Mary and"]
    single = torch.stack([detect_head(lens, text, "previous_token_head") for text in texts])
    torch.testing.assert_close(detect_head(lens, texts, "previous_token_head"), single.mean(0))
    assert not torch.allclose(single[0], single[1])


def test_several_prompts_with_a_matrix_give_the_mean_too(lens: Any) -> None:
    texts = ["The cat sat", "The dog sat"]
    length = lens.to_tokens(texts[0]).shape[1]
    assert lens.to_tokens(texts[1]).shape[1] == length
    diagonal = torch.eye(length)
    single = torch.stack([detect_head(lens, text, diagonal) for text in texts])
    torch.testing.assert_close(detect_head(lens, texts, diagonal), single.mean(0))


def test_fractions_in_a_pattern_are_warned_of_with_mul(lens: Any, caplog: pytest.LogCaptureFixture) -> None:
    length = lens.to_tokens(TEXT).shape[1]
    detect_head(lens, TEXT, 0.5 * torch.eye(length), error_measure="abs")
    assert not caplog.records
    detect_head(lens, TEXT, 0.5 * torch.eye(length))
    assert "other than 0 or 1" in caplog.text


def test_bad_input_is_refused(lens: Any) -> None:
    length = lens.to_tokens(TEXT).shape[1]
    _, cache = lens.run_with_cache(TEXT, remove_batch_dim=True)
    with pytest.raises(AssertionError, match="error_measure=sum"):
        detect_head(lens, TEXT, "induction_head", error_measure="sum")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="got inductive_head"):
        detect_head(lens, TEXT, "inductive_head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        detect_head(lens, TEXT, [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one prompt"):
        detect_head(lens, [TEXT, TEXT], "induction_head", cache=cache)
    with pytest.raises(AssertionError, match="more than one token"):
        detect_head(lens, "", "induction_head")
    with pytest.raises(AssertionError, match="more than one token"):
        detect_head(lens, "The cat sat on the mat " * 9, "induction_head")
    with pytest.raises(AssertionError, match=f"sequence_length={length}; got"):
        detect_head(lens, TEXT, torch.eye(length + 1))
    with pytest.raises(AssertionError, match="lower triangular"):
        detect_head(lens, TEXT, torch.ones(length, length))
