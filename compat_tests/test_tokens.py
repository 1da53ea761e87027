"""Do the token methods answer as 3.9.0's do, for every kind of tokenizer and every argument?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compat_tests.comparison import close, outcome, same_outcome
from compat_tests.conftest import Pairs
from compat_tests.rough_models import CORPUS, TOKENIZER_KINDS

TEXTS: list[Any] = [
    "The cat sat on the mat",
    "",
    " ",
    "<|endoftext|>",
    "<|endoftext|>Hello",
    "Mary\nJohn",
    ["The cat", "John gave a drink to Mary"],
    ["", "Hello"],
    [CORPUS[0] * 3, "short"],
    CORPUS[1] * 3,
]


def compare(pair: Any, name: str, call: Callable[[Any], Any]) -> None:
    mine, theirs = (outcome(lambda m=model: call(m)) for model in pair.both)
    same_outcome(name, mine, theirs)


@pytest.mark.parametrize("padding_side", ["left", "right", None])
@pytest.mark.parametrize("prepend_bos", [True, False, None])
@pytest.mark.parametrize("tokenizer", TOKENIZER_KINDS)
def test_to_tokens(pairs: Pairs, tokenizer: str, prepend_bos: bool | None, padding_side: Any) -> None:
    pair = pairs.get(tokenizer=tokenizer)
    for text, truncate in itertools.product(TEXTS, (True, False)):
        arguments = {"prepend_bos": prepend_bos, "padding_side": padding_side, "truncate": truncate}
        compare(pair, f"to_tokens({text!r})", lambda m, t=text, a=arguments: m.to_tokens(t, **a))


@pytest.mark.parametrize("tokenizer", TOKENIZER_KINDS)
def test_special_tokens_after_loading(pairs: Pairs, tokenizer: str) -> None:
    pair = pairs.get(tokenizer=tokenizer)
    mine, theirs = (
        (
            model.tokenizer.bos_token,
            model.tokenizer.eos_token,
            model.tokenizer.pad_token,
            model.tokenizer.padding_side,
            model.cfg.tokenizer_prepends_bos,
            model.cfg.default_prepend_bos,
            model.cfg.d_vocab,
        )
        for model in pair.both
    )
    assert mine == theirs


@pytest.mark.parametrize("prepend_bos", [True, False, None])
@pytest.mark.parametrize("tokenizer", TOKENIZER_KINDS)
def test_to_str_tokens(pairs: Pairs, tokenizer: str, prepend_bos: bool | None) -> None:
    pair = pairs.get(tokenizer=tokenizer)
    for text in TEXTS:
        arguments = {"prepend_bos": prepend_bos}
        compare(pair, f"to_str_tokens({text!r})", lambda m, t=text, a=arguments: m.to_str_tokens(t, **a))


STR_TOKEN_INPUTS = [
    torch.tensor([5, 9, 300]),
    torch.tensor([[5, 9, 300]]),
    torch.tensor([5]),
    torch.tensor(5),
    torch.tensor([[5, 9], [7, 8]]),
    np.array([5, 9, 300]),
    np.array([[5, 9, 300]]),
    np.array(5),
    np.array([[5, 9], [7, 8]]),
    [torch.tensor([5, 9]), "Hello"],
    5,
    (5, 9),
    [],
]


@pytest.mark.parametrize("given", STR_TOKEN_INPUTS, ids=repr)
def test_to_str_tokens_of_tokens(pairs: Pairs, given: Any) -> None:
    compare(pairs.get(), "to_str_tokens", lambda model: model.to_str_tokens(given))


STRING_INPUTS = [
    torch.tensor([5, 9, 300]),
    torch.tensor([[5, 9, 300], [7, 8, 0]]),
    torch.tensor(70),
    [5, 9, 300],
    [[5, 9], [7, 8]],
    np.array([5, 9, 300]),
    np.array([[5, 9], [7, 8]]),
    torch.zeros(1, 2, 2, dtype=torch.int64),
]


@pytest.mark.parametrize("given", STRING_INPUTS, ids=repr)
def test_to_string(pairs: Pairs, given: Any) -> None:
    compare(pairs.get(), "to_string", lambda model: model.to_string(given))


@pytest.mark.parametrize("text", ["The", " cat", "a", "The cat", "", "<|endoftext|>", " "])
@pytest.mark.parametrize("tokenizer", TOKENIZER_KINDS)
def test_to_single_token(pairs: Pairs, tokenizer: str, text: str) -> None:
    compare(pairs.get(tokenizer=tokenizer), f"to_single_token({text!r})", lambda model: model.to_single_token(text))


@pytest.mark.parametrize("given", [5, 0, 300, torch.tensor(5), "5", 5.0], ids=repr)
def test_to_single_str_token(pairs: Pairs, given: Any) -> None:
    compare(pairs.get(), f"to_single_str_token({given!r})", lambda model: model.to_single_str_token(given))


@pytest.mark.parametrize("mode", ["first", "last", "middle"])
@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_get_token_position(pairs: Pairs, prepend_bos: bool | None, mode: str) -> None:
    pair = pairs.get()
    text = "the cat and the dog and the mat"
    tokens = pair.theirs.to_tokens(text)
    pieces = pair.theirs.to_str_tokens(text)
    wanted: list[Any] = [*dict.fromkeys(pieces), "zebra", "Q", 0, 319, int(tokens[0, -1]), tokens[0, 1]]
    if mode == "middle":
        wanted = [" cat"]  # with a second mistake in the call, which one is reported is anyone's choice
    for token, given in itertools.product(wanted, (text, tokens, tokens[0], tokens.repeat(2, 1))):
        if mode == "middle" and given is not tokens:
            continue
        arguments = {"mode": mode, "prepend_bos": prepend_bos}
        compare(
            pair,
            f"get_token_position({token!r})",
            lambda m, t=token, g=given, a=arguments: m.get_token_position(t, g, **a),
        )


@pytest.mark.parametrize(
    "given",
    [5, "The", torch.tensor(5), torch.tensor([5]), torch.tensor([[5]]), torch.tensor([5, 6]), torch.zeros(2, 3).long()],
    ids=repr,
)
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_tokens_to_residual_directions(pairs: Pairs, given: Any, processing: str) -> None:
    pair = pairs.get("two", processing)
    compare(pair, "tokens_to_residual_directions", lambda model: model.tokens_to_residual_directions(given))


def test_residual_direction_of_several_tokens_in_a_string(pairs: Pairs) -> None:
    pair = pairs.get()
    for given in ("The cat sat", 2.5, [5, 6]):
        compare(pair, "tokens_to_residual_directions", lambda m, g=given: m.tokens_to_residual_directions(g))


def test_text_that_starts_with_bos_gets_two(model: Any) -> None:
    tokens = model.to_tokens("<|endoftext|>Hello", prepend_bos=True)
    assert tokens[0, :2].tolist() == [0, 0]


def test_methods_leave_the_defaults_alone(model: Any) -> None:
    model.to_tokens(["The cat", "a"], prepend_bos=False, padding_side="left")
    model.to_str_tokens("The cat", prepend_bos=False)
    assert model.cfg.default_prepend_bos is True
    assert model.tokenizer.padding_side == "right"


def test_set_tokenizer(pairs: Pairs) -> None:
    """A tokenizer can be exchanged afterwards, with a default padding side."""
    pair = pairs.get("relu")
    for model in pair.both:
        model.set_tokenizer(pairs.tokenizer("own pad"), default_padding_side="left")
    for attribute in ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side"):
        assert getattr(pair.ours.tokenizer, attribute) == getattr(pair.theirs.tokenizer, attribute)
    compare(pair, "to_tokens", lambda model: model.to_tokens(["The cat", "John gave a drink"]))
    for model in pair.both:
        model.set_tokenizer(pairs.tokenizer(), default_padding_side="right")
    compare(pair, "to_tokens", lambda model: model.to_tokens(["The cat", "John gave a drink"]))


@pytest.mark.parametrize("wrong", [("a name", None), (None, "up")], ids=str)
def test_set_tokenizer_refuses(pairs: Pairs, wrong: tuple[Any, Any]) -> None:
    pair = pairs.get()
    tokenizer, side = wrong
    for model in pair.both:
        with pytest.raises(AssertionError):
            model.set_tokenizer(tokenizer or pairs.tokenizer(), default_padding_side=side)


def test_strings_and_their_tokens_give_the_same_logits(pairs: Pairs) -> None:
    pair = pairs.get()
    for model in pair.both:
        assert torch.equal(model("The cat sat"), model(model.to_tokens("The cat sat")))
    close("logits", pair.ours(TEXTS[6]), pair.theirs(TEXTS[6]))


def test_without_a_tokenizer_text_is_refused(pairs: Pairs) -> None:
    pair = pairs.get("one")
    for model in pair.both:
        kept = model.tokenizer
        model.tokenizer = None
        try:
            for call in (model, model.to_tokens, model.to_string, model.to_str_tokens, model.to_single_token):
                with pytest.raises(AssertionError):
                    call("The cat")
            assert model(pair.tokens()).shape == (2, 9, 320)
        finally:
            model.tokenizer = kept
