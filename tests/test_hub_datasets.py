"""Is a data set from the hub asked for as given, and is its absence explained?"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lensbridge import hub_datasets
from lensbridge.errors import DatasetNotFoundError


class Datasets:
    """In the place of HuggingFace's package."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[Any] = []

    def load_dataset(self, *args: Any, **kwargs: Any) -> str:
        self.asked.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return "rows"


def test_arguments_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Datasets()
    monkeypatch.setitem(sys.modules, "datasets", package)  # type: ignore[arg-type]
    assert hub_datasets.load_dataset("wikitext", "v1", split="train") == "rows"
    assert package.asked == [(("wikitext", "v1"), {"split": "train"})]


@pytest.mark.parametrize("error", [ConnectionError("offline"), FileNotFoundError("offline")])
def test_absence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Datasets(error))  # type: ignore[arg-type]
    with pytest.raises(DatasetNotFoundError, match="'wikitext v1'.*HF_DATASETS_CACHE.*own.*offline") as caught:
        hub_datasets.load_dataset("wikitext", "v1")
    assert isinstance(caught.value, type(error))
    assert caught.value.__cause__ is error


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Datasets(ValueError("unknown split")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^unknown split$"):
        hub_datasets.load_dataset("wikitext")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        hub_datasets.load_dataset("wikitext")
