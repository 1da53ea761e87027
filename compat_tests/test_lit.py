"""Is LIT shown the same of a model, and the same datasets, as by TransformerLens 3.9.0?

LIT itself is not needed: its types are replaced by pairs of a name and arguments, on both sides.
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens.lit as their_lit
from transformer_lens.lit import constants as their_constants
from transformer_lens.lit import dataset as their_dataset
from transformer_lens.lit import model as their_model
from transformer_lens.lit import utils as their_utils

from compat_tests.conftest import Pairs
from compat_tests.rough_models import SUBJECT
from lensbridge.lit import _nlp

lit = import_module(f"{SUBJECT}.lit")
constants, dataset, utils = (import_module(f"{SUBJECT}.lit.{name}") for name in ("constants", "dataset", "utils"))

TEXT = "When Mary and John went to the store, John gave a drink to"


class Types:
    """Stands for ``lit_nlp.api.types``."""

    def __getattr__(self, name: str) -> Any:
        return lambda **arguments: (name, arguments)


@pytest.fixture(autouse=True)
def with_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nlp, "_types", Types())
    for module in (their_model, their_dataset):
        monkeypatch.setattr(module, "_LIT_AVAILABLE", True)
        monkeypatch.setattr(module, "lit_types", Types())


CONFIGS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "prepend_bos": False, "max_seq_length": 6, "output_all_layers": True},
    {"embedding_layers": [1], "compute_gradients": False, "output_attention": False},
    {"compute_gradients": False, "output_embeddings": False},
    {"output_embeddings": False},
]


def wrapped(pair: Any, fields: dict[str, Any]) -> tuple[Any, Any]:
    ours = lit.HookedTransformerLIT(pair.ours, lit.HookedTransformerLITConfig(**fields))
    return ours, their_lit.HookedTransformerLIT(pair.theirs, their_lit.HookedTransformerLITConfig(**fields))


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert np.abs(found - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-3)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for mine, yours in zip(found, expected, strict=True):
            assert_close(mine, yours)
    else:
        assert found == expected


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("processing", ["default", "raw"])
def test_predictions(pairs: Pairs, fields: dict[str, Any], processing: str) -> None:
    ours, theirs = wrapped(pairs.get(processing=processing), fields)
    (found,), (expected,) = (list(model.predict([{"text": TEXT}])) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name])
    if fields.get("compute_gradients", True):
        assert np.abs(found["grad_l2"]).max() > 0


@pytest.mark.parametrize("fields", CONFIGS)
def test_specs(pairs: Pairs, fields: dict[str, Any]) -> None:
    ours, theirs = wrapped(pairs.get(), fields)
    assert ours.input_spec() == theirs.input_spec()
    assert ours.output_spec() == theirs.output_spec()
    assert ours.init_spec() == theirs.init_spec()
    assert ours.description() == theirs.description()
    assert ours.max_minibatch_size() == theirs.max_minibatch_size()
    assert ours.supports_concurrent_predictions == theirs.supports_concurrent_predictions


def test_the_embedding_table(pairs: Pairs) -> None:
    ours, theirs = wrapped(pairs.get(), {})
    found, expected = ours.get_embedding_table(), theirs.get_embedding_table()
    assert found[0] == expected[0]
    assert_close(found[1], expected[1])


def test_what_is_no_model_is_refused() -> None:
    for side in (lit, their_lit):
        with pytest.raises(TypeError, match="HookedTransformer"):
            side.HookedTransformerLIT(torch.nn.Linear(1, 1))


# --- datasets ---------------------------------------------------------------------------------------------------------

DATASETS: dict[str, Any] = {
    "texts": lambda side: side.SimpleTextDataset.from_strings(["a", "b c"]),
    "named texts": lambda side: side.SimpleTextDataset([{"text": "x", "more": 1}], name="mine"),
    "nothing": lambda side: side.SimpleTextDataset(),
    "pairs": lambda side: side.PromptCompletionDataset.from_pairs([("2 + 2 =", " 4"), ("The", " cat")]),
    "prompts": lambda side: side.PromptCompletionDataset([{"prompt": "x", "more": 1}]),
    "IOI": lambda side: side.IOIDataset.generate(20, seed=3),
    "IOI, given": lambda side: side.IOIDataset([{"text": "x"}], name="mine"),
    "induction": lambda side: side.InductionDataset.generate_simple(20, seed=3),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets(name: str) -> None:
    ours, theirs = DATASETS[name](lit), DATASETS[name](their_lit)
    assert ours.examples == theirs.examples == list(ours)
    assert len(ours) == len(theirs)
    assert ours.description() == theirs.description()
    assert ours.spec() == theirs.spec()


@pytest.mark.ours_only
@pytest.mark.parametrize("name", DATASETS)
def test_wrapped_datasets_are_what_they_were(name: str) -> None:
    """3.9.0 can wrap only if LIT was there when it was imported."""
    copy, theirs = lit.wrap_for_lit(DATASETS[name](lit)), DATASETS[name](their_lit)
    assert (copy.examples, copy.spec(), copy.description()) == (theirs.examples, theirs.spec(), theirs.description())


@pytest.mark.parametrize("most", [None, 3])
def test_a_dataset_from_a_file(tmp_path: Path, most: int | None) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n  two \nthree\n", encoding="utf-8")
    ours, theirs = (side.SimpleTextDataset.from_file(path, max_examples=most) for side in (lit, their_lit))
    assert ours.examples == theirs.examples
    assert ours.description() == theirs.description()


def test_examples_without_their_field_are_refused() -> None:
    for side in (lit, their_lit):
        with pytest.raises(ValueError, match="0"):
            side.SimpleTextDataset([{"prompt": "x"}])
        with pytest.raises(ValueError, match="prompt"):
            side.PromptCompletionDataset([{"text": "x"}])


# --- small functions --------------------------------------------------------------------------------------------------


def test_parts_of_a_cache(pairs: Pairs) -> None:
    results: list[list[Any]] = []
    for side, model in zip((utils, their_utils), pairs.get().both, strict=True):
        tokens, ids = side.get_tokens_from_model(model, TEXT, max_length=7)
        logits, cache = model.run_with_cache(ids[None])
        results.append([tokens, ids.tolist(), side.clean_token_strings(tokens), side.get_model_info(model)])
        results[-1] += [
            side.extract_attention_from_cache(cache, 1),
            side.extract_attention_from_cache(cache, 0, head=1),
        ]
        results[-1] += [side.extract_embeddings_from_cache(cache, 1, part) for part in ("all", "first", "last", "mean")]
        results[-1] += [side.get_top_k_predictions(logits, model.tokenizer, k=4, position=2)]
        results[-1] += [sorted(side.filter_cache_by_pattern(cache, "hook_pattern"))]
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


def test_small_functions() -> None:
    examples = [{"text": str(i)} for i in range(5)]
    outputs = {"a": np.arange(3), "b": torch.arange(3), "c": [1, 2, 3], "d": 4}
    for side in (utils, their_utils):
        assert [len(batch) for batch in side.batch_examples(examples, 2)] == [2, 2, 1]
        assert side.unbatch_outputs(outputs)[1] == {"a": 1, "b": 1, "c": 2, "d": 4} and side.unbatch_outputs({}) == []
        assert side.validate_input_example({"a": 1}, ["a"]) and not side.validate_input_example({"a": 1}, ["a", "b"])
        assert side.get_hook_name_for_layer("blocks.{layer}.x{y}", 2, y=3) == "blocks.2.x3"
        assert [side.clean_token_string(t) for t in ("\u0120a", "\u2581b", "##c", "d")] == [
            "\u2581a",
            "\u2581b",
            "c",
            "d",
        ]
        assert side.tensor_to_numpy(None) is side.numpy_to_tensor(None) is None
        assert side.tensor_to_numpy(outputs["a"]) is outputs["a"]
        assert side.tensor_to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
        assert side.numpy_to_tensor(np.ones(2), dtype=torch.float16, device="cpu").dtype == torch.float16
        with pytest.raises(TypeError):
            side.tensor_to_numpy([1])


@pytest.mark.parametrize("name", ["INPUT_FIELDS", "OUTPUT_FIELDS", "DEFAULTS", "HOOK_POINTS", "LIT_TYPE_MAPPING"])
def test_same_constants(name: str) -> None:
    ours, theirs = getattr(constants, name), getattr(their_constants, name)
    if dataclasses.is_dataclass(theirs):
        ours, theirs = dataclasses.asdict(ours), dataclasses.asdict(theirs)  # type: ignore[call-overload]
    assert ours == theirs


def test_same_names_with_the_same_parameters() -> None:
    assert sorted(lit.__all__) == sorted(their_lit.__all__)
    assert [f.name for f in dataclasses.fields(constants.ERRORS)] == [
        f.name for f in dataclasses.fields(their_constants.ERRORS)
    ]
    pairs = [(getattr(lit, name), getattr(their_lit, name)) for name in their_lit.__all__]
    pairs += [(getattr(utils, n), f) for n, f in inspect.getmembers(their_utils, inspect.isfunction)]
    pairs += [(dataset.DatasetConfig, their_dataset.DatasetConfig)]
    for ours, theirs in pairs:
        if not callable(theirs):
            continue
        functions = [theirs] if not inspect.isclass(theirs) else []
        methods = vars(theirs).items() if inspect.isclass(theirs) else []
        names = [name for name, value in methods if callable(getattr(theirs, name)) and not name.startswith("_")]
        for mine, yours in [(ours, theirs)] * bool(functions) + [(getattr(ours, n), getattr(theirs, n)) for n in names]:
            wanted = [(p.name, p.default) for p in inspect.signature(yours).parameters.values()]
            found = [(p.name, p.default) for p in inspect.signature(mine).parameters.values()]
            if getattr(yours, "__name__", "") == "serve":
                # The page's title is our own.
                wanted, found = ([name for name, _ in side] for side in (wanted, found))  # type: ignore[assignment]
            assert found[: len(wanted)] == wanted, yours
