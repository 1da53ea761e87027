"""Where do examples of training text come from, with and without a network?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lensbridge import sample_data
from lensbridge.errors import DatasetNotFoundError

TEXTS = [{"text": "The cat sat"}, {"text": "on the mat and then the dog saw Mary give John a drink. " * 4}]


def test_a_text_of_an_assigned_data_set(lens: Any) -> None:
    lens.dataset = TEXTS
    np.random.seed(0)
    found = [lens.sample_datapoint() for _ in range(20)]
    assert set(found) == {row["text"] for row in TEXTS}
    np.random.seed(0)
    assert [lens.sample_datapoint() for _ in range(20)] == found


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_its_tokens_are_cut_at_the_context(lens: Any, prepend_bos: bool) -> None:
    lens.dataset = TEXTS[:1]
    tokens = lens.sample_datapoint(tokenize=True, prepend_bos=prepend_bos)
    assert torch.equal(tokens, lens.to_tokens(TEXTS[0]["text"], prepend_bos=prepend_bos))
    lens.dataset = TEXTS[1:]
    assert lens.sample_datapoint(tokenize=True).shape == (1, lens.cfg.n_ctx)


def test_the_data_set_is_loaded_by_architecture_when_it_is_first_needed(
    lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def get(name: str, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((name, kwargs))
        return TEXTS[:1]

    monkeypatch.setattr(sample_data, "get_dataset", get)
    assert lens.dataset is None
    assert [lens.sample_datapoint() for _ in range(2)] == [TEXTS[0]["text"]] * 2
    assert asked == [("openwebtext", {})]
    assert lens.load_sample_training_dataset(cache_dir="here") is lens.dataset
    assert asked[1:] == [("openwebtext", {"cache_dir": "here"})]


def test_another_architecture_is_told_what_to_do(lens: Any) -> None:
    lens.cfg.original_architecture = "Gemma3ForCausalLM"
    with pytest.raises(ValueError, match="Gemma3ForCausalLM: assign one to model.dataset"):
        lens.sample_datapoint()


def test_offline_the_error_says_what_to_do(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(name: str, **kwargs: Any) -> Any:
        raise ConnectionError("no hub")

    monkeypatch.setattr(sample_data, "get_dataset", get)
    with pytest.raises(DatasetNotFoundError, match="assign data of your own to model.dataset.*no hub") as caught:
        lens.sample_datapoint()
    assert isinstance(caught.value, ConnectionError)
    assert lens.dataset is None
