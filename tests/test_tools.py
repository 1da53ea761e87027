"""Does the model registry answer from its tables, and do the analyses add up?"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch

from lensbridge import HookedTransformer
from lensbridge.architectures import BY_CLASS
from lensbridge.errors import LensbridgeError, UnsupportedModelError
from lensbridge.model_names import table
from lensbridge.tools.analysis import direct_logit_attribution, get_act_patch_direct_path
from lensbridge.tools.model_registry import (
    HF_SUPPORTED_ARCHITECTURES,
    ArchitectureGap,
    ModelEntry,
    ModelNotFoundError,
    ModelRegistryError,
    api,
)

# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_model_of_the_architecture_table_has_a_name() -> None:
    asset = resources.files("lensbridge") / "assets" / "model_architectures.json"
    architectures = json.loads(asset.read_text(encoding="utf8"))["architectures"]
    models = [model for models in architectures.values() for model in models]
    assert len(models) == len(set(models)) > 200
    assert set(models) <= set(table()["names"])


def test_what_is_supported_has_a_record() -> None:
    models = api.get_supported_models()
    assert {entry.architecture_id for entry in models} <= set(BY_CLASS) == HF_SUPPORTED_ARCHITECTURES
    assert api.get_supported_architectures() == sorted(BY_CLASS)
    for entry in models[::20]:
        assert api.is_model_supported(entry.model_id)
        assert api.get_model_info(entry.model_id) == entry
    gpt2 = api.get_supported_models(architecture="GPT2LMHeadModel")
    assert [entry.model_id for entry in gpt2] == api.get_architecture_models("GPT2LMHeadModel")
    assert "gpt2" in api.get_architecture_models("GPT2LMHeadModel")
    assert api.get_supported_models(verified_only=True) == [] == api.get_architecture_models("NoSuchModel")


def test_aliases_are_understood() -> None:
    assert api.is_model_supported("gpt2-small") and api.is_model_supported("GPT2-Small")
    assert api.get_model_info("gpt2-small") == ModelEntry("GPT2LMHeadModel", "gpt2")


def test_what_is_not_supported_is_told_apart() -> None:
    assert api.get_model_architecture("t5-small") == "T5ForConditionalGeneration"
    assert api.get_model_architecture("no/such-model") is None
    assert not api.is_model_supported("no/such-model") and not api.is_architecture_supported("NoSuchModel")
    with pytest.raises(ModelNotFoundError, match="Did you mean 'EleutherAI/pythia-70m") as caught:
        api.get_model_info("EleutherAI/pythia-75m")
    assert isinstance(caught.value, ModelRegistryError) and isinstance(caught.value, LensbridgeError)
    assert caught.value.suggestion == api.suggest_similar_model("EleutherAI/pythia-75m")
    assert api.suggest_similar_model("gpt2") is None
    assert api.suggest_similar_model("zzz") is None
    with pytest.raises(ModelNotFoundError, match="'zzz' is not in the registry$"):
        api.get_model_info("zzz")


def test_a_model_of_an_unknown_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BY_CLASS, "GPT2LMHeadModel")
    assert not api.is_model_supported("gpt2") and api.get_model_architecture("gpt2") == "GPT2LMHeadModel"
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        api.get_model_info("gpt2")
    gaps = {gap.architecture_id: gap for gap in api.get_unsupported_architectures()}
    assert gaps["GPT2LMHeadModel"].total_models > 10 == len(gaps["GPT2LMHeadModel"].sample_models)


def test_gaps_and_statistics() -> None:
    gaps = api.get_unsupported_architectures()
    counts = [gap.total_models for gap in gaps]
    assert counts == sorted(counts, reverse=True)
    assert api.get_unsupported_architectures(top_n=1) == gaps[:1]
    assert api.get_unsupported_architectures(min_models=3) == [gap for gap in gaps if gap.total_models >= 3]
    everything = {stats.architecture_id: stats for stats in api.get_all_architectures_with_stats()}
    assert set(everything) == set(BY_CLASS) | {gap.architecture_id for gap in gaps}
    assert everything["GPT2LMHeadModel"].is_supported and len(everything["GPT2LMHeadModel"].example_models) == 5
    stats = api.get_registry_stats()
    assert stats["total_supported_models"] == len(api.get_supported_models())
    assert stats["total_unsupported_models"] == sum(counts)
    before = api.get_supported_models()
    api.clear_cache()
    assert api.get_supported_models() == before


def test_entries_as_dicts() -> None:
    entry, gap = ModelEntry("A", "b/c", 1), ArchitectureGap("A", 3, ["x"])
    assert ModelEntry.from_dict(entry.to_dict() | {"phase1_score": 100}) == entry
    assert ArchitectureGap.from_dict(gap.to_dict() | {"relevancy_score": 1}) == gap


# --- the analyses -----------------------------------------------------------------------------------------------------

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("toy")


@pytest.mark.parametrize("unit", ["component", "head"])
def test_the_parts_of_a_logit_add_up_to_it(model: HookedTransformer, unit: str) -> None:
    result = direct_logit_attribution(model, TEXT, " Mary", unit=unit)
    logit = model(TEXT)[0, -1, model.to_single_token(" Mary")] - model.b_U[model.to_single_token(" Mary")]
    assert len(result.labels) == len(result.attribution)
    assert result.attribution.sum().item() == pytest.approx(logit.item(), abs=1e-3)


def test_the_last_layer_is_the_whole(model: HookedTransformer) -> None:
    result = direct_logit_attribution(model, TEXT, " Mary", " John", unit="layer")
    logits = model(TEXT)[0, -1] - model.b_U
    lead = logits[model.to_single_token(" Mary")] - logits[model.to_single_token(" John")]
    assert result.attribution[-1].item() == pytest.approx(lead.item(), abs=1e-3)
    name, value = result.top(1)[0]
    assert value == pytest.approx(result.attribution.max().item()) and name in result.labels
    assert len(result.top(1000)) == len(result.labels)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"input": TEXT}, "answer_tokens"), ({"answer_tokens": 1}, "input"),
    ({"input": TEXT, "answer_tokens": 1, "unit": "neuron"}, "unit"),
])  # fmt: skip
def test_what_attribution_needs(model: HookedTransformer, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        direct_logit_attribution(model, **arguments)


def test_direct_paths_are_exact_for_queries(model: HookedTransformer) -> None:
    """Queries of a head in the next layer see the whole difference, if the norm keeps its scale."""
    clean, corrupted = model.to_tokens(TEXT), model.to_tokens(TEXT.replace("John gave", "Mary gave"))
    _, clean_cache = model.run_with_cache(clean)
    logits, cache = model.run_with_cache(corrupted)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 5]

    found = get_act_patch_direct_path(model, corrupted, clean_cache, cache, metric, 2, 1, "q", verbose=False)
    assert not found[:3].any() and found[3].any()
    z = "blocks.2.attn.hook_z"
    written = (clean_cache[z] - cache[z])[:, :, 1] @ model.W_O[2, 1]
    change = (written / cache["blocks.3.ln1.hook_scale"]) @ model.W_Q[3, 0]

    def replace(q: torch.Tensor, hook: Any) -> torch.Tensor:
        q[:, :, 0] += change
        return q

    patched = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.3.attn.hook_q", replace)])
    assert found[3, 0].item() == pytest.approx(metric(patched).item(), abs=1e-5)
    assert found[3, 0].item() != pytest.approx(metric(logits).item(), abs=1e-7)


def test_unfolded_norms_are_warned_of() -> None:
    raw = HookedTransformer.from_pretrained_no_processing("toy")
    tokens = raw.to_tokens("Mary")
    _, cache = raw.run_with_cache(tokens)
    with pytest.warns(UserWarning, match="fold_ln"):
        get_act_patch_direct_path(raw, tokens, cache, cache, lambda logits: logits.sum(), 3, 0, verbose=False)
