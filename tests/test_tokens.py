"""Do texts become the right tokens, and tokens the right texts, BOS and padding included?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lensbridge.tokens import as_batch

TEXT = "The cat sat"


@pytest.fixture
def pieces(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of `TEXT`, without BOS."""
    return tokenizer.encode(TEXT, add_special_tokens=False)


def changed(tokenizer: PreTrainedTokenizerFast, **special: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with these special tokens, in memory only."""
    given = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **given)


# --- setting ---------------------------------------------------------------------------------------------------------


def test_missing_special_tokens_are_filled_in(raw: Any, tokenizer: Any) -> None:
    assert (raw.tokenizer.pad_token, raw.tokenizer.bos_token) == ("<|endoftext|>", "<|endoftext|>")
    raw.set_tokenizer(changed(tokenizer, bos_token=None, eos_token=None))
    assert raw.tokenizer.eos_token == raw.tokenizer.bos_token == raw.tokenizer.pad_token == "<|endoftext|>"
    raw.set_tokenizer(changed(tokenizer, pad_token="!", bos_token="?"))
    assert (raw.tokenizer.pad_token, raw.tokenizer.bos_token) == ("!", "?")


def test_whether_the_tokenizer_adds_bos_is_found_out(raw: Any, tokenizer: Any) -> None:
    assert raw.cfg.tokenizer_prepends_bos is True
    raw.set_tokenizer(changed(tokenizer, bos_token=None))
    assert raw.cfg.tokenizer_prepends_bos is False


def test_padding_side(raw: Any, tokenizer: Any) -> None:
    assert raw.tokenizer.padding_side == "right"
    raw.set_tokenizer(tokenizer, default_padding_side="left")
    assert raw.tokenizer.padding_side == "left"
    raw.set_tokenizer(raw.tokenizer)
    assert raw.tokenizer.padding_side == "left"
    with pytest.raises(AssertionError, match="default_padding_side must be"):
        raw.set_tokenizer(tokenizer, default_padding_side="middle")


def test_what_is_no_tokenizer_is_refused(raw: Any, tokenizer: Any) -> None:
    for wrong in ("gpt2", tokenizer.backend_tokenizer, None):
        with pytest.raises(AssertionError, match="is no HuggingFace tokenizer"):
            raw.set_tokenizer(wrong)


def test_a_model_without_tokenizer_says_what_to_do(raw: Any) -> None:
    raw.tokenizer = None
    for ask in (
        lambda: raw.to_tokens(TEXT),
        lambda: raw.to_string([1]),
        lambda: raw.to_str_tokens(torch.tensor([1])),
        lambda: raw.to_single_token("a"),
    ):
        with pytest.raises(AssertionError, match="model.set_tokenizer"):
            ask()


def test_a_tokenizer_that_was_assigned_directly_is_refused(raw: Any) -> None:
    raw.cfg.tokenizer_prepends_bos = None
    with pytest.raises(AssertionError, match="assigned directly"):
        raw.to_tokens(TEXT)


# --- text to tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_comes_first_if_asked_for_and_once(raw: Any, tokenizer: Any, pieces: list[int], adds_bos: bool) -> None:
    if not adds_bos:
        raw.set_tokenizer(changed(tokenizer, bos_token=None))
        assert raw.cfg.tokenizer_prepends_bos is False
    assert raw.to_tokens(TEXT).tolist() == [[0, *pieces]]
    assert raw.to_tokens(TEXT, prepend_bos=True).tolist() == [[0, *pieces]]
    assert raw.to_tokens(TEXT, prepend_bos=False).tolist() == [pieces]
    raw.cfg.default_prepend_bos = False
    assert raw.to_tokens(TEXT).tolist() == [pieces]
    assert raw.to_tokens(TEXT, prepend_bos=True).tolist() == [[0, *pieces]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_several_texts_are_padded(raw: Any, tokenizer: Any, pieces: list[int], adds_bos: bool, bos: bool) -> None:
    if not adds_bos:
        raw.set_tokenizer(changed(tokenizer, bos_token=None))
    texts = [TEXT, TEXT + TEXT[3:]]
    longer = tokenizer.encode(texts[1], add_special_tokens=False)
    start, padding = [0] * bos, [0] * (len(longer) - len(pieces))
    assert padding
    assert raw.to_tokens(texts, bos).tolist() == [start + pieces + padding, start + longer]
    assert raw.to_tokens(texts, bos, padding_side="left").tolist() == [padding + start + pieces, start + longer]
    assert raw.tokenizer.padding_side == "right"


def test_long_texts_are_cut_unless_told_otherwise(raw: Any) -> None:
    text = TEXT * 20
    assert raw.to_tokens(text).shape == (1, 24)
    whole = raw.to_tokens(text, truncate=False)
    assert whole.shape[1] > 24 and torch.equal(whole[:, :24], raw.to_tokens(text))


def test_empty_text_and_places(raw: Any) -> None:
    assert raw.to_tokens("").tolist() == [[0]]
    empty = raw.to_tokens("", prepend_bos=False)
    assert empty.shape == (1, 0) and empty.dtype == torch.long
    raw.cfg.device = "meta"
    assert raw.to_tokens(TEXT).device.type == "meta"
    assert raw.to_tokens(TEXT, move_to_device=False).device.type == "cpu"


# --- tokens to text --------------------------------------------------------------------------------------------------


def test_to_string(raw: Any, pieces: list[int]) -> None:
    assert raw.to_string(pieces) == raw.to_string(torch.tensor(pieces)) == raw.to_string(np.array(pieces)) == TEXT
    assert raw.to_string([pieces, pieces]) == [TEXT, TEXT]
    assert raw.to_string(torch.tensor(0)) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"rank 0, 1 or 2, not of shape \(1, 1, 2\)"):
        raw.to_string(torch.zeros(1, 1, 2).long())


def test_to_str_tokens(raw: Any, pieces: list[int]) -> None:
    words = raw.to_str_tokens(TEXT, prepend_bos=False)
    assert "".join(words) == TEXT and len(words) == len(pieces)
    assert raw.to_str_tokens(TEXT) == ["<|endoftext|>", *words]
    for tokens in (torch.tensor(pieces), torch.tensor([pieces]), np.array(pieces)):
        assert raw.to_str_tokens(tokens) == words
    assert raw.to_str_tokens([TEXT, torch.tensor(pieces)], prepend_bos=False) == [words, words]
    assert raw.to_str_tokens(torch.tensor(pieces[0])) == words[:1]
    assert raw.to_str_tokens([]) == []
    with pytest.raises(AssertionError, match="tokens of one text"):
        raw.to_str_tokens(torch.zeros(2, 3).long())
    for wrong in (3, (1, 2), None):
        with pytest.raises(ValueError, match="takes a text, a list, or a tensor"):
            raw.to_str_tokens(wrong)


# --- single tokens ---------------------------------------------------------------------------------------------------


def test_single_tokens(raw: Any, pieces: list[int]) -> None:
    piece = raw.to_str_tokens(TEXT, prepend_bos=False)[1]
    assert raw.to_single_token(piece) == pieces[1] and raw.to_single_str_token(pieces[1]) == piece
    with pytest.raises(AssertionError, match=rf"'{TEXT}' is not a single token: it is \["):
        raw.to_single_token(TEXT)
    with pytest.raises(AssertionError, match="not a single token"):
        raw.to_single_token("")
    for wrong in (torch.tensor(1), "1", 1.0):
        with pytest.raises(AssertionError, match="takes an int"):
            raw.to_single_str_token(wrong)


def test_token_positions(raw: Any) -> None:
    text = "a b a"
    a, tokens = raw.to_single_token("a"), raw.to_tokens(text)
    found = (tokens[0] == a).nonzero().flatten().tolist()
    assert raw.get_token_position("a", text) == raw.get_token_position(a, tokens) == found[0] == 1
    assert raw.get_token_position(torch.tensor(a), tokens[0]) == 1
    assert raw.get_token_position("a", text, prepend_bos=False) == 0
    assert raw.get_token_position(5, torch.tensor([5, 6, 5]), mode="last") == 2
    with pytest.raises(AssertionError, match="'z' does not occur"):
        raw.get_token_position("z", text)
    with pytest.raises(AssertionError, match=r"one text, \[1, pos\], not \(2, 3\)"):
        raw.get_token_position(5, torch.full((2, 3), 5))
    with pytest.raises(ValueError, match="mode must be"):
        raw.get_token_position("a", text, mode="middle")


@pytest.mark.parametrize("processed", [False, True])
def test_residual_directions(raw: Any, lens: Any, processed: bool) -> None:
    model = lens if processed else raw
    a = model.to_single_token("a")
    for one in ("a", a, torch.tensor(a), torch.tensor([a]), torch.tensor([[a]])):
        direction = model.tokens_to_residual_directions(one)
        assert direction.shape == (20,) and torch.equal(direction, model.W_U[:, a])
    several = model.tokens_to_residual_directions(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert several.shape == (2, 3, 20) and torch.equal(several[1, 2], model.W_U[:, 6])
    with pytest.raises(ValueError, match="a token is a string, an int or a tensor, not list"):
        model.tokens_to_residual_directions([1, 2])


def test_as_batch() -> None:
    assert as_batch(torch.tensor([1, 2])).shape == (1, 2)
    tokens = torch.tensor([[1, 2]])
    assert as_batch(tokens) is tokens


def test_a_default_without_bos(new_lens: Callable, pieces: list[int]) -> None:
    model = new_lens(default_prepend_bos=False, default_padding_side="left")
    assert model.to_tokens(TEXT).tolist() == [pieces] and model.tokenizer.padding_side == "left"
