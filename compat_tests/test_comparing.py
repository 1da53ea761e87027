"""Does ``lensbridge compare`` ask the real TransformerLens 3.9.0, and judge by what it says?

Each comparison starts processes that import it, which takes its time: all but two are slow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compat_tests.rough_families import FAMILIES, rough_model
from lensbridge import cli
from lensbridge.comparing import command
from lensbridge.comparing.result import PROCESSED, RAW, REFERENCE
from lensbridge.engine.sites import PlainSite, Run

QUICK = ["--device", "cpu", "--quiet", "--rounds", "0"]


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the numbers of a comparison."""
    file = tmp_path / "numbers.json"
    code = cli.main(["compare", *arguments, "--json", str(file)])
    return code, json.loads(file.read_text(encoding="utf-8"))


def reference_rows(data: dict[str, Any], basis: str = RAW) -> dict[str, dict[str, Any]]:
    rows = [each for each in data["differences"] if each["against"] == REFERENCE and each["basis"] == basis]
    return {each["point"]: each for each in rows}


def promise(data: dict[str, Any], basis: str = RAW) -> dict[str, Any]:
    return next(each for each in data["promises"] if "TransformerLens" in each["name"] and basis in each["name"])


def test_the_bundled_model_is_next_to_3_9_0(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, data = run(tmp_path, "toy", *QUICK, "--prompt", "Mary and John", "--html", str(page))
    assert code == 0 and data["holds"] is True
    for basis in (RAW, PROCESSED):
        rows = reference_rows(data, basis)
        assert len(rows) == 99 and {"logits", "blocks.2.attn.hook_result", "blocks.1.hook_mlp_in"} < set(rows)
        assert all(row["status"] == "holds" and row["relative"] <= 1e-4 for row in rows.values())
        # Two programs on the same weights: something rounds otherwise, or one was compared with itself.
        assert any(row["relative"] > 0 for row in rows.values())
        assert promise(data, basis)["holds"] is True
    assert f"<h2>{REFERENCE}, with processing</h2>" in page.read_text(encoding="utf-8")


def test_a_point_that_is_not_3_9_0s_breaks_the_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the engine is wrong; 3.9.0 runs where that does not reach."""

    def record(self: PlainSite, run: Run) -> None:
        run.keep(self.names[0], run.read(self.place) * (1.01 if self.names[0].endswith("mlp.hook_post") else 1))

    monkeypatch.setattr(PlainSite, "record", record)
    code, data = run(tmp_path, "toy", *QUICK, "--no-processing", "--prompt", "Mary and John")
    rows = reference_rows(data)
    assert code == 1 and promise(data)["holds"] is False
    assert {name for name, row in rows.items() if row["status"] == "fails"} == {
        f"blocks.{layer}.mlp.hook_post" for layer in range(4)
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama grouped", "mixtral"])
def test_a_directory_of_another_family(family: str, tmp_path: Path) -> None:
    """By 3.9.0's own reading of local directories, without a tokenizer."""
    rough_model(FAMILIES[family]).save_pretrained(tmp_path / "model")
    code, data = run(tmp_path, str(tmp_path / "model"), *QUICK)
    assert code == 0 and promise(data)["holds"] is True and promise(data, PROCESSED)["holds"] is True
    assert reference_rows(data)["blocks.1.hook_k_input"]["status"] == "holds"


@pytest.mark.slow
def test_what_is_different_on_purpose_is_known(tmp_path: Path) -> None:
    rough_model(FAMILIES["bloom"]).save_pretrained(tmp_path / "model")
    code, data = run(tmp_path, str(tmp_path / "model"), *QUICK, "--no-processing")
    known = {name for name, row in reference_rows(data).items() if row["status"] == "known"}
    assert code == 0 and known == {f"blocks.{layer}.attn.hook_attn_scores" for layer in range(2)}
    assert "ALiBi" in reference_rows(data)["blocks.0.attn.hook_attn_scores"]["reason"]


@pytest.mark.slow
def test_where_3_9_0_departs_from_huggingface_it_is_no_measure(tmp_path: Path) -> None:
    """It folds value biases beside attention sinks, which changes what the model computes."""
    rough_model(FAMILIES["gpt_oss"]).save_pretrained(tmp_path / "model")
    code, data = run(tmp_path, str(tmp_path / "model"), *QUICK, "--processing")
    assert code == 0 and promise(data, PROCESSED)["holds"] is None
    assert "from HuggingFace's on this model" in promise(data, PROCESSED)["detail"]
    assert {row["status"] for row in reference_rows(data, PROCESSED).values()} == {"shown"}


@pytest.mark.slow
def test_a_family_that_3_9_0_knows_by_its_names_only(tmp_path: Path) -> None:
    rough_model(FAMILIES["gemma2"]).save_pretrained(tmp_path / "model")
    code, data = run(tmp_path, str(tmp_path / "model"), *QUICK, "--no-processing")
    assert code == 0 and promise(data)["holds"] is None and reference_rows(data) == {}
    assert "--reference-name" in promise(data)["detail"]
    # Its table has the real model's layers; these are other ones.
    code, data = run(tmp_path, str(tmp_path / "model"), *QUICK, "--no-processing", "--reference-name", "gemma-2-2b")
    assert (
        code == 0 and "could not run" in promise(data)["detail"] and "--reference-name" not in promise(data)["detail"]
    )


@pytest.mark.slow
def test_what_3_9_0_has_no_model_of(tmp_path: Path) -> None:
    from lensbridge.tiny import tiny_family

    tiny_family("arcee").save_pretrained(tmp_path / "model")
    code, data = run(tmp_path, str(tmp_path / "model"), *QUICK, "--no-processing")
    assert code == 0 and "3.9.0 could not run this model" in promise(data)["detail"]


@pytest.mark.slow
def test_short_formats_are_shown_and_not_judged(tmp_path: Path) -> None:
    code, data = run(tmp_path, "toy", *QUICK, "--no-processing", "--dtype", "bfloat16", "--prompt", "Mary and John")
    assert code == 0 and "bfloat16" in promise(data)["detail"]
    assert {row["status"] for row in reference_rows(data).values()} == {"shown"}


@pytest.mark.slow
def test_a_model_of_gpt2s_size(tmp_path: Path) -> None:
    """Random weights in the shape of GPT-2 small: every promise, time and memory."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(architectures=["GPT2LMHeadModel"])).save_pretrained(tmp_path / "model")
    code, data = run(tmp_path, str(tmp_path / "model"), "--device", "cpu", "--quiet", "--rounds", "3")
    assert code == 0 and data["setting"]["n_layers"] == 12
    assert all(each["holds"] is True for each in data["promises"]), data["promises"]
    assert [cost["tool"] for cost in data["costs"]] == ["HuggingFace", "lensbridge", REFERENCE]
    assert set(data["costs"][2]["milliseconds"]) == {"forward", "one hook", "cache of everything"}
    costs = {cost["tool"]: cost["mebibytes"] for cost in data["costs"]}
    assert costs["lensbridge"]["parameters"] == costs["HuggingFace"]["parameters"]
    assert costs[REFERENCE]["peak"] > costs["lensbridge"]["peak"], "it holds the weights twice while it loads"


def test_the_processes_are_asked_with_the_models_own_settings() -> None:
    from lensbridge import HookedTransformer

    model = HookedTransformer.from_pretrained_no_processing("toy", device="cpu", dtype=torch.float16)
    loading = command._loading(model, "toy", None)
    assert (loading.dtype, loading.device, loading.attention) == ("float16", "cpu", "eager")
    assert loading.reference_name is None and Path(loading.directory, "config.json").exists()
