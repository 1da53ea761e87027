"""Do the evaluations give 3.9.0's numbers, on the same models, sentences and questions?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from datasets import Dataset as Table
from transformer_lens import evals as theirs

from compat_tests.comparison import TOLERANCE, close
from compat_tests.conftest import Pair, Pairs
from compat_tests.rough_models import (
    CORPUS,
    NO_PROCESSING,
    PROCESSINGS,
    SUBJECT,
    Shape,
    load_tokenizer,
    rough_gpt2,
    tl_reference,
)
from compat_tests.rough_models import (
    ours as our_model,
)

ours = import_module(f"{SUBJECT}.evals")
MODULES = (ours, theirs)


@pytest.fixture(params=PROCESSINGS)
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> Pair:
    return pairs.get(processing=request.param)


@pytest.fixture(scope="module")
def large(all_pairs: Pairs) -> Pair:
    """A model whose vocabulary and context are large enough for the defaults that 3.9.0 writes into its tests."""
    shape = Shape(n_layers=1, n_heads=2, d_model=8, n_ctx=128, vocab=20500)
    hf, directory = rough_gpt2(shape), all_pairs.tokenizer_dirs["gpt2"]
    models = [load(hf, load_tokenizer(directory), **NO_PROCESSING) for load in (our_model, tl_reference)]
    return Pair(*models, hf, shape)


def test_constants() -> None:
    for name in ("MMLU_SUBJECTS", "MMLU_ANSWER_LETTERS", "DATASET_NAMES"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert [loader.__name__ for loader in ours.DATASET_LOADERS] == [
        loader.__name__ for loader in theirs.DATASET_LOADERS
    ]


def test_sanity_check(large: Pair) -> None:
    close("sanity_check", *(module.sanity_check(model) for module, model in zip(MODULES, large.both, strict=True)))


def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {"tokens": torch.randint(3, 320, (2, 12), generator=generator)}


@pytest.mark.parametrize("truncate", [0, 2, 100])
def test_evaluate_on_dataset(pair: Pair, truncate: int) -> None:
    mine, other = (
        module.evaluate_on_dataset(model, batches(6), truncate=truncate, device="cpu")
        for module, model in zip(MODULES, pair.both, strict=True)
    )
    assert mine == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"prepend_bos": False}, {"batch_size": 2, "subseq_len": 20}])
def test_induction_loss(large: Pair, options: dict[str, Any]) -> None:
    found = []
    for module, model in zip(MODULES, large.both, strict=True):
        torch.manual_seed(4)
        found.append(module.induction_loss(model, **{"subseq_len": 60, "device": "cpu"} | options))
    close("induction_loss", *found)


COLUMNS = {"codeparrot/codeparrot-valid-v2-near-dedup": "content"}


def serve(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    """Put texts of our own in the hub's place, for both."""

    def load(*args: Any, **kwargs: Any) -> Table:
        asked.append((args, kwargs))
        return Table.from_dict({COLUMNS.get(args[0], "text"): CORPUS * 30})

    for module in MODULES:
        monkeypatch.setattr(module, "load_dataset", load)
    cut = ours.tokenize_and_concatenate if SUBJECT == "lensbridge" else theirs.utils.tokenize_and_concatenate
    short = {"max_length": 16, "num_proc": None}
    if SUBJECT == "lensbridge":
        monkeypatch.setattr(ours, "tokenize_and_concatenate", lambda *a, **k: cut(*a, **short, **k))
    original = theirs.utils.tokenize_and_concatenate
    monkeypatch.setattr(theirs.utils, "tokenize_and_concatenate", lambda *a, **k: original(*a, **short, **k))


@pytest.mark.parametrize("name", ["wiki", "owt", "pile", "code"])
def test_loaders(pairs: Pairs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, asked = pairs.get(), []
    serve(monkeypatch, asked)
    rows = []
    for module, model in zip(MODULES, pair.both, strict=True):
        torch.manual_seed(2)
        loader = getattr(module, f"make_{name}_data_loader")(model.tokenizer, batch_size=3)
        rows.append(torch.stack([batch["tokens"] for batch in loader]))
    assert asked[0] == asked[1]
    assert rows[0].dim() == 3
    assert torch.equal(*rows)


def test_evaluate(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs.get()
    serve(monkeypatch, [])
    monkeypatch.setattr(theirs.evaluate_on_dataset.__wrapped__, "__defaults__", (100, "cpu"))
    found = []
    for module, model in zip(MODULES, pair.both, strict=True):
        torch.manual_seed(2)
        found.append(module.evaluate(model, truncate=3, batch_size=4))
    assert found[0] == pytest.approx(found[1], rel=TOLERANCE)
    assert list(found[0]) == list(found[1])


IOI: list[dict[str, Any]] = [
    {},
    {"symmetric": True},
    {"prepend_bos": False},
    {"names": ["Mary", "John", "Mary Jane", "Jo"], "nouns": {"THING": ["dog", "cat"], "LOCATION": ["mat"]}},
    {"templates": ["[A] met [B]. [B] gave the [OBJECT] to [A]", "[B] saw [A] on the [LOCATION], and [B] gave [A]"]},
]


@pytest.mark.parametrize("options", IOI, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("seeded", [True, False])
def test_ioi_sentences(pairs: Pairs, options: dict[str, Any], seeded: bool) -> None:
    pair = pairs.get()
    made = []
    for module, model in zip(MODULES, pair.both, strict=True):
        random.seed(5)
        made.append(module.IOIDataset(model.tokenizer, num_samples=30, seed=11 if seeded else None, **options))
    mine, other = made
    assert len(mine) == len(other) == 30
    assert mine.samples == other.samples
    for index in range(30):
        assert {key: value.tolist() for key, value in mine[index].items()} == {
            key: value.tolist() for key, value in other[index].items()
        }
    assert (mine.templates, mine.names, mine.nouns) == (other.templates, other.names, other.nouns)


@pytest.mark.parametrize("options", IOI[:4], ids=lambda options: "-".join(options))
def test_ioi_eval(large: Pair, options: dict[str, Any]) -> None:
    found = []
    for module, model in zip(MODULES, large.both, strict=True):
        data = module.IOIDataset(model.tokenizer, num_samples=21, seed=1, **options)
        found.append(module.ioi_eval(model, dataset=data, batch_size=4))
    assert found[0] == pytest.approx(found[1], rel=TOLERANCE)
    assert 0 < found[0]["Accuracy"] < 1


def test_ioi_eval_with_its_own_sentences(large: Pair) -> None:
    found = []
    for module, model in zip(MODULES, large.both, strict=True):
        random.seed(3)
        found.append(module.ioi_eval(model, num_samples=12, symmetric=True, tokenizer=model.tokenizer))
    assert found[0] == pytest.approx(found[1], rel=TOLERANCE)


QUESTIONS = [
    {"question": f"Which of {n}?", "choices": [str(n + k) for k in range(4)], "answer": n % 4, "subject": "x"}
    for n in range(9)
]


def test_mmlu(large: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return QUESTIONS[:5] if args[1] == "anatomy" else QUESTIONS

    found, data = [], []
    for module, model in zip(MODULES, large.both, strict=True):
        monkeypatch.setattr(module, "load_dataset", load)
        options = {"subjects": ["anatomy", "virology"], "split": "validation", "num_samples": 7}
        data.append(module.make_mmlu_data_loader(**options))
        found.append(module.mmlu_eval(model, **options))
    assert data[0] == data[1]
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]
    assert found[0] == found[1]
    assert found[0]["num_total"] == 12
    assert 0 < found[0]["num_correct"] < 12


def test_mmlu_errors(large: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, model in zip(MODULES, large.both, strict=True):
        with pytest.raises(ValueError, match="Invalid subject"):
            module.make_mmlu_data_loader(["anatomy", "astrology"])
        monkeypatch.setattr(module, "load_dataset", lambda *a, **k: [])
        with pytest.raises(ValueError, match="No MMLU data loaded"):
            module.mmlu_eval(model, subjects="anatomy")
