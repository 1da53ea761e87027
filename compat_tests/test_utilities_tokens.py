"""Do the helpers for tokens, files and data sets do what those of TransformerLens 3.9.0 do?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import utilities as theirs
from transformers import PreTrainedTokenizerFast

from compat_tests.agreement import agree, same
from lensbridge import utilities as ours

WORDS = ["<|endoftext|>", "<pad>", "<s>", *"abcdefgh", "ab", "cd", "Ġ"]


def build_tokenizer(padding_side: str = "right", **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="Ġ"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **special)


SPECIAL: list[dict[str, str]] = [
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"},
    {"eos_token": "<|endoftext|>", "pad_token": "<pad>"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(**SPECIAL[0])


@given(st.integers(0, 100_000), st.sampled_from(SPECIAL), st.sampled_from(["left", "right"]))
@settings(max_examples=150, deadline=None)
def test_mask_and_removal_of_bos(seed: int, special: dict[str, str], side: str) -> None:
    tokenizer = build_tokenizer(side, **special)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(4):
        body = torch.randint(0, 5, (int(torch.randint(0, 6, (1,), generator=generator)),), generator=generator)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        padding = [tokenizer.pad_token_id] * (6 - len(body))
        row = bos + body.tolist()
        rows.append(padding + row if side == "left" else row + padding)
    tokens = torch.tensor(rows)
    for given_side in (None, "left", "right"):
        for prepend_bos in (True, False):
            for module in (ours, theirs):
                assert module.get_attention_mask(None, tokens, prepend_bos).all()
            agree("get_attention_mask", tokenizer, tokens, prepend_bos, given_side)
        agree("get_tokens_with_bos_removed", tokenizer, tokens, given_side)


def test_bos_in_front() -> None:
    for text in ("abc", "", ["a", "b"], []):
        for bos in ("<s>", None):
            agree("get_input_with_manually_prepended_bos", bos, text)


@pytest.mark.parametrize("special", SPECIAL, ids=["same", "own", "no bos"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizer_with_bos(special: dict[str, str], side: str, tmp_path: Path) -> None:
    build_tokenizer(**special).save_pretrained(tmp_path)
    results = []
    for module in (ours, theirs):
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path, padding_side=side)
        result = module.get_tokenizer_with_bos(loaded)
        assert module.get_tokenizer_with_bos(result) is result
        assert (result is loaded) == ("bos_token" not in special)
        assert loaded("a b")["input_ids"] == [3, 4]
        results.append((result("a b")["input_ids"], result.padding_side, result.special_tokens_map))
    assert results[0] == results[1]


@pytest.mark.parametrize("max_length", [4, 5, 50])
@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("padded_with", ["<pad>", None])
@pytest.mark.parametrize("streaming", [True, False])
def test_tokenize_and_concatenate(max_length: int, add_bos_token: bool, padded_with: Any, streaming: bool) -> None:
    texts = ["a b c d e", "", "h g", "a", "c d e f g h a"]
    results = []
    for module in (ours, theirs):
        special = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
        tokenizer = build_tokenizer(**special, **({"pad_token": padded_with} if padded_with else {}))
        data: Any = datasets.Dataset.from_dict({"text": texts, "other": list(range(5))})
        if streaming:
            data = data.to_iterable_dataset()
        options = {"streaming": streaming, "max_length": max_length, "num_proc": None, "set_format": not streaming}
        rows = module.tokenize_and_concatenate(data, tokenizer, add_bos_token=add_bos_token, **options)
        results.append([row["tokens"] for row in rows])
    assert results[0]
    assert {type(row) for row in results[0]} == {np.ndarray if streaming else torch.Tensor}
    for mine, other in zip(*results, strict=True):
        same(mine, other)


def test_logits_to_df(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.randn(len(WORDS), requires_grad=True)
    for arguments in ({}, {"top_k": 3}, {"tokenizer": tokenizer}, {"tokenizer": tokenizer, "top_k": 2}):
        mine, other = ours.logits_to_df(logits, **arguments), theirs.logits_to_df(logits, **arguments)
        assert mine.equals(other)
        assert list(mine.columns) == list(other.columns)


def test_arguments_of_a_function() -> None:
    def function(a: int, b: int = 1) -> None: ...

    agree("select_compatible_kwargs", {"a": 1, "b": 2, "c": 3, "self": 4}, function)


@pytest.mark.parametrize(
    "config",
    [None, SimpleNamespace(), SimpleNamespace(rotary_pct=0.25), SimpleNamespace(rope_parameters=None)]
    + [SimpleNamespace(rope_parameters={"partial_rotary_factor": 0.4}), SimpleNamespace(rope_parameters={"x": 1})],
    ids=str,
)
def test_rotary_share(config: Any) -> None:
    agree("get_rotary_pct_from_config", config)


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.bin")
    (tmp_path / "c.json").write_text(json.dumps({"d": 3}))
    (tmp_path / "t.txt").write_text("text")

    def download(repo_id: str, filename: str, subfolder: str, cache_dir: str, revision: str | None = None) -> str:
        assert (repo_id, subfolder) == ("someone/something", ".")
        return str(tmp_path / filename)

    for package in ("lensbridge", "transformer_lens"):
        monkeypatch.setattr(f"{package}.utilities.hf_utils.hf_hub_download", download)
    for module in (ours, theirs):
        fetch = module.download_file_from_hf
        assert fetch("someone/something", "w.pth")["w"].tolist() == [0, 1, 2]
        assert fetch("someone/something", "w.bin", force_is_torch=True) == [1, 2]
        assert fetch("someone/something", "c.json", revision="main") == {"d": 3}
        assert fetch("someone/something", "t.txt") == str(tmp_path / "t.txt")
        assert capsys.readouterr().out == "File type not supported: txt\n"


@pytest.mark.parametrize(
    "name", ["openwebtext", "owt", "pile", "c4", "code", "python", "c4_code", "c4-code", "wiki", "x"]
)
def test_names_of_datasets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("transformer_lens.utilities.hf_utils.load_dataset", load)
    agree("get_dataset", name, data_dir="d")


def test_single_column() -> None:
    data = datasets.Dataset.from_dict({"a": [1, 2], "b": [3, 4], "c": [5, 6]})
    for kind in (data, data.to_iterable_dataset()):
        assert list(ours.keep_single_column(kind, "b")) == list(theirs.keep_single_column(kind, "b"))
