"""Is a family right, or refused by name, whatever its config sets of what its code reads?"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import transformers

from lensbridge import unaudited
from lensbridge.architectures import BY_CLASS
from lensbridge.checking import hooked
from lensbridge.checking.config_audit import LEFT_OUT, audit, summary
from lensbridge.checking.config_values import others
from lensbridge.checking.families import recorded, refusal
from lensbridge.config_reads import attributes_read, compared_with, reads_in
from lensbridge.tiny import tiny_config, tiny_family, tiny_model

KEYS = [key for key in recorded() if refusal(key) is None]
#: Families that 3.9.0 loads, and some with what the audit has found.
QUICK = (
    "gpt2 gpt_neo gptj gpt_neox opt bloom llama mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi phi3 stablelm "
    "olmo olmo2 gpt_bigcode falcon bert big_bird"
).split()
#: One check that sees what a record forgets, and one of what hooks are given.
FEW = ("identities", "HuggingFace's values")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word about options of processing that are left out."""
    monkeypatch.setattr(logging.root, "level", logging.ERROR)


def holes_of(tried: Any) -> list[str]:
    return [f"{each.attribute}={each.value!r}: {each.detail}" for each in tried if each.status == "fails"]


@pytest.mark.parametrize("key", QUICK)
def test_one_other_value_of_each_attribute(key: str) -> None:
    tried = list(audit(key, FEW, values=1))
    assert not holes_of(tried)
    known = {path for names in unaudited.table()["families"][key].values() for path in names.split()}
    assert {each.attribute for each in tried} <= known
    assert {each.status for each in tried} >= {"works", "unchanged"}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_other_value_of_each_attribute(key: str) -> None:
    tried = list(audit(key))
    assert not holes_of(tried)
    assert summary(key, tried) == unaudited.table()["families"][key], (
        f"run `python -m lensbridge.checking.config_audit {key}`"
    )


@pytest.mark.slow
def test_the_table_has_every_family() -> None:
    missing = set(KEYS) - set(unaudited.table()["families"])
    assert not missing, f"run `python -m lensbridge.checking.config_audit {' '.join(sorted(missing))}`"


def test_the_table_has_no_hole() -> None:
    families = unaudited.table()["families"]
    assert not any("fails" in found for found in families.values())
    assert set(QUICK) | set(LEFT_OUT) <= set(families) & set(KEYS)


def test_what_a_record_does_not_say_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    record = BY_CLASS["BigBirdForCausalLM"]
    monkeypatch.setitem(BY_CLASS, record.hf_class, dataclasses.replace(record, variants={}))
    (hole,) = holes_of(audit("big_bird", FEW, values=1))
    assert hole.startswith("rescale_embeddings=True: identities: embed.ln.hook_scale")


# --- what code reads --------------------------------------------------------------------------------------------------


def test_what_code_reads_and_compares() -> None:
    read = attributes_read(tiny_family("bert"))
    assert {"hidden_act", "is_decoder", "add_cross_attention", "sliding_window"} <= read
    assert read.isdisjoint({"_attn_implementation", "id2label", "quantization_config"})
    assert reads_in("lensbridge.no_module") == frozenset()
    assert "block_sparse" in compared_with("transformers.models.big_bird.modeling_big_bird", "attention_type")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("use_bias", True, [False]),
        ("hidden_act", "silu", ["relu", "gelu"]),
        ("kind", "a", ["b"]),
        ("layer_norm_eps", 1e-5, [0.05]),
        ("scale", 2.0, [3.0, 1.0]),
        ("scale", 0.0, [0.3]),
        ("head_dim", 16, [32, 8]),
        ("clip", None, ["a", "b"]),
        ("pad_token_id", None, ["a", "b", 3]),
        ("sliding_window", None, ["a", "b", 6]),
        ("flags", [1, 0], [[0, 1], [0, 0], [2, 0], [1, 1]]),
        ("kinds", ("a", "a"), [("b", "b")]),
    ],
)
def test_other_values(name: str, value: Any, expected: list[Any]) -> None:
    assert list(others(name, value, ["a", "b"])) == expected


# --- attributes that came later ---------------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ``attention_bias`` and ``attention_dropout`` of Llama were newer than the audit."""
    known = unaudited.known_attributes("LlamaForCausalLM")
    assert known is not None and {"attention_bias", "attention_dropout"} <= known
    older = known - {"attention_bias", "attention_dropout"}
    monkeypatch.setattr(unaudited, "known_attributes", lambda hf_class: older)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")


def test_an_attribute_that_came_later_is_named(later: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="root"):
        hooked(tiny_model(tiny_config("llama", attention_bias=True)), "llama")
    (said,) = [record.getMessage() for record in caplog.records if "hook points" in record.getMessage()]
    assert "LlamaForCausalLM sets attention_bias=True" in said
    assert "transformers 5.99.0" in said and "`lensbridge check`" in said


def test_nothing_is_said_of_what_does_not_matter(later: None) -> None:
    model = tiny_model(tiny_config("llama", attention_dropout=0.5))
    model.config.new_and_read_by_nobody = "set"
    model.config.quantization_config = {"bits": 4}
    assert unaudited.unaudited(model) == {}


def test_nothing_is_said_of_audited_versions_and_classes_without_a_record() -> None:
    assert unaudited.unaudited(tiny_model(tiny_config("llama", attention_bias=True))) == {}
    assert unaudited.known_attributes("NoSuchClass") is None


@pytest.mark.parametrize("key", ["llama", "gpt2", "dbrx", "gemma3", "bert"])
def test_nothing_is_said_of_the_same_code_in_another_version(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert unaudited.unaudited(tiny_family(key)) == {}
