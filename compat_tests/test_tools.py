"""Do the registry and the analyses answer as TransformerLens 3.9.0's?"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from transformer_lens.tools import analysis as their_analysis
from transformer_lens.tools.model_registry import api as their_api

from compat_tests.comparison import close
from compat_tests.conftest import Pairs
from compat_tests.rough_models import SUBJECT

analysis = import_module(f"{SUBJECT}.tools.analysis")
api = import_module(f"{SUBJECT}.tools.model_registry.api")

TEXT = "When Mary and John went to the store"


@pytest.mark.ours_only
def test_architectures_are_those_of_the_other_registry() -> None:
    theirs = {entry.model_id: entry.architecture_id for entry in their_api.get_supported_models()}
    ours = [model for name in api._architectures() for model in api._architectures()[name]]
    shared = [model for model in ours if model in theirs]
    assert len(shared) > 150
    assert [model for model in shared if api.get_model_architecture(model) != theirs[model]] == []


@pytest.mark.parametrize("name", ["get_model_architecture", "is_model_supported", "get_model_info"])
def test_same_answers_about_a_model(name: str) -> None:
    for model in ("EleutherAI/pythia-70m", "no/such-model"):
        results: list[Any] = []
        for side in (api, their_api):
            try:
                found = getattr(side, name)(model)
                results.append((found.architecture_id, found.model_id) if name == "get_model_info" else found)
            except Exception as error:
                results.append(type(error).__name__)
        assert results[0] == results[1]


def test_same_names_with_the_same_parameters() -> None:
    pairs = [(getattr(api, name), f) for name, f in inspect.getmembers(their_api, inspect.isfunction) if name[0] != "_"]
    pairs += [
        (getattr(analysis, name), getattr(their_analysis, name))
        for name in import_module("lensbridge.tools.analysis").__all__
    ]
    for ours, theirs in pairs:
        wanted = [(p.name, p.default, p.kind) for p in inspect.signature(theirs).parameters.values()]
        assert [(p.name, p.default, p.kind) for p in inspect.signature(ours).parameters.values()] == wanted, theirs


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize("pos", [-1, None, 2, (1, 4)])
@pytest.mark.parametrize("incorrect", [None, " John"])
def test_direct_logit_attribution(pairs: Pairs, unit: str, pos: Any, incorrect: str | None) -> None:
    pair = pairs.get()
    ours, theirs = (
        side.direct_logit_attribution(model, TEXT, " Mary", incorrect, unit=unit, pos=pos)
        for side, model in zip((analysis, their_analysis), pair.both, strict=True)
    )
    assert ours.labels == theirs.labels and ours.unit == theirs.unit
    close("attribution", ours.attribution, theirs.attribution)
    mine, yours = ours.top(3), theirs.top(3)
    assert [name for name, _ in mine] == [name for name, _ in yours]
    close("top", torch.tensor([v for _, v in mine]), torch.tensor([v for _, v in yours]))


def test_direct_logit_attribution_of_a_cache_without_batch(pairs: Pairs) -> None:
    results = []
    for side, model in zip((analysis, their_analysis), pairs.get().both, strict=True):
        _, cache = model.run_with_cache(TEXT, remove_batch_dim=True)
        results.append(side.direct_logit_attribution(model, answer_tokens=5, cache=cache).attribution)
    close("attribution", *results)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_path_patching(pairs: Pairs, component: str) -> None:
    pair, one, all_sources = pairs.get(), [], []
    clean, corrupted = pair.tokens(seed=1), pair.tokens(seed=2)
    for side, model in zip((analysis, their_analysis), pair.both, strict=True):
        caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
        arguments = (model, corrupted, *caches, lambda logits: logits[:, -1, 3].sum())
        one.append(side.get_act_patch_direct_path(*arguments, 0, 1, component, verbose=False))
        if component == "q":
            found = side.get_act_patch_direct_path_all_sources(*arguments, component, verbose=False)
            all_sources.append(found)
            assert torch.equal(found[0, 1], one[-1])
    assert one[0].any()
    close("one source", *one)
    if all_sources:
        close("all sources", *all_sources)
