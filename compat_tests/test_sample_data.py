"""Does `sample_datapoint` draw 3.9.0's texts and tokens, and is the same data set asked for?"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from transformer_lens import utilities as their_utilities

from compat_tests.comparison import outcome, same_outcome, same_value
from compat_tests.conftest import Pairs
from compat_tests.rough_models import CORPUS, SUBJECT, TOKENIZER_KINDS

ROWS = [{"text": text} for text in (*CORPUS, "The cat", CORPUS[0] * 3)]


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("tokenizer", TOKENIZER_KINDS)
def test_texts_and_tokens(pairs: Pairs, tokenizer: str, prepend_bos: bool | None, monkeypatch: Any) -> None:
    pair = pairs.get(tokenizer=tokenizer)
    found = []
    for model in pair.both:
        monkeypatch.setattr(model, "dataset", ROWS)
        np.random.seed(3)
        texts = [model.sample_datapoint() for _ in range(8)]
        tokens = [model.sample_datapoint(tokenize=True, prepend_bos=prepend_bos) for _ in range(8)]
        found.append((tuple(texts), tuple(tokens)))
    same_value("sample_datapoint", *found)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "neel", "MistralForCausalLM"])
def test_the_data_set_of_an_architecture(pairs: Pairs, architecture: str, monkeypatch: Any) -> None:
    pair = pairs.get()
    asked: list[Any] = []

    def get(name: str, **kwargs: Any) -> list[Any]:
        asked.append((name, kwargs))
        return ROWS

    monkeypatch.setattr(their_utilities, "get_dataset", get)
    if SUBJECT == "lensbridge":
        monkeypatch.setattr(import_module("lensbridge.sample_data"), "get_dataset", get)
    results = []
    for model in pair.both:
        monkeypatch.setattr(model.cfg, "original_architecture", architecture)
        monkeypatch.setattr(model, "dataset", None)
        results.append(outcome(lambda m=model: m.load_sample_training_dataset(cache_dir="x")))
    same_outcome("load_sample_training_dataset", *results)
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]
    assert bool(asked) == (architecture != "MistralForCausalLM")
