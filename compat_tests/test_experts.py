"""Are mixtures of experts 3.9.0's where the comparison of families does not look: called by themselves, without tokens,
in half precision?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compat_tests.comparison import caches_close, close
from compat_tests.rough_families import FAMILIES, reference, rough_model
from compat_tests.rough_models import DEFAULT_PROCESSING, NO_PROCESSING, load_tokenizer, random_tokens, save_tokenizer
from compat_tests.test_families import WITHOUT, Two
from lensbridge import HookedTransformer

PROCESSINGS = {"raw": NO_PROCESSING, "default": DEFAULT_PROCESSING}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=[(f, p) for f in ("mixtral", "olmoe", "gpt_oss") for p in PROCESSINGS])
def two(request: pytest.FixtureRequest, tokenizer_dir: Path) -> Two:
    family, processing = request.param
    flags = PROCESSINGS[processing]
    hf = rough_model(FAMILIES[family])
    tokenizer = load_tokenizer(tokenizer_dir)
    theirs = reference(hf, FAMILIES[family], tokenizer, **(flags | WITHOUT.get(family, {})))
    return Two(HookedTransformer.from_pretrained(family, hf_model=hf, tokenizer=tokenizer, **flags), theirs, hf)


def normed() -> torch.Tensor:
    """Something that a norm could have returned, [batch, pos, d_model]."""
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))


def test_components_called_by_themselves(two: Two) -> None:
    for layer in range(2):
        mine, theirs = (model.blocks[layer].mlp for model in (two.ours, two.theirs))
        close("mlp", mine(normed()), theirs(normed()))
        close("router", mine.W_gate(normed()), theirs.W_gate(normed()))
        for one, other in zip(mine.experts, theirs.experts, strict=True):
            close("expert", one(normed()[0]), other(normed()[0]))
            for name in ("W_gate", "W_in", "W_out"):
                projections = [getattr(expert, name) for expert in (one, other)]
                close(name, *(projection.weight for projection in projections))
                assert (projections[0].bias is None) == (projections[1].bias is None)


def test_hooks_fire_in_components(two: Two) -> None:
    seen: list[list[str]] = [[], []]
    for found, model in zip(seen, (two.ours, two.theirs), strict=True):

        def note(value: torch.Tensor, hook: Any, found: list = found) -> None:
            found.append(hook.name)

        with model.hooks(fwd_hooks=[(lambda name: True, note)]):
            model.blocks[0].mlp(normed())
            model.blocks[0].mlp.experts[2](normed()[0])
    assert seen[0] == seen[1] != []


def test_experts_without_tokens(two: Two) -> None:
    """Mixtral's show empty values, GPT-OSS's nothing."""
    one = random_tokens(1, 1)
    mine, theirs = (model.run_with_cache(one)[1] for model in (two.ours, two.theirs))
    caches_close(mine, theirs)
    posts = [name for name in theirs if name.endswith("hook_post")]
    idle = [name for name in posts if not len(theirs[name])]
    assert len(idle) == 4 or len(posts) == 4


def test_a_weight_is_the_models_own(two: Two) -> None:
    if two.ours.interior.weights.processing.any:
        pytest.skip("processed weights are read-only")
    before = two.ours(random_tokens())
    for weight in (two.ours.blocks[0].mlp.experts[1].W_out.weight, two.ours.blocks[1].mlp.W_gate.weight):
        kept = weight.detach().clone()
        weight.data[:3] *= -2
        assert not torch.equal(two.ours(random_tokens()), before)
        weight.data.copy_(kept)
        assert torch.equal(two.ours(random_tokens()), before)


def test_half_precision(two: Two) -> None:
    """Against HuggingFace: 3.9.0's router is of another dtype than Mixtral's experts, and fails."""
    hf = copy.deepcopy(two.hf).to(torch.bfloat16)
    model = HookedTransformer.from_pretrained_no_processing(
        two.ours.cfg.model_name, hf_model=hf, tokenizer=two.ours.tokenizer
    )
    with torch.no_grad():
        expected = hf(random_tokens()).logits
        logits, cache = model.run_with_cache(random_tokens())
    assert torch.equal(logits, expected) and torch.equal(model(random_tokens()), expected)
    assert cache["blocks.0.mlp.hook_expert_weights"].dtype == torch.float32
    assert cache["blocks.0.mlp.experts.0.hook_post"].dtype == torch.bfloat16
    for name in ("hook_expert_weights", "hook_expert_indices", "experts.1.hook_gate", "experts.1.hook_post"):
        with model.hooks(fwd_hooks=[(f"blocks.0.mlp.{name}", lambda value, hook: value.flip(0))]):
            edited = model(random_tokens())
        assert edited.dtype == torch.bfloat16 and not torch.equal(edited, expected)


def test_value_biases_are_not_folded_beside_a_sink(tokenizer_dir: Path) -> None:
    """3.9.0 folds them, and computes something else; see docs/differences.md."""
    hf = rough_model(FAMILIES["gpt_oss"])
    tokenizer = load_tokenizer(tokenizer_dir)
    ours = HookedTransformer.from_pretrained("gpt_oss", hf_model=hf, tokenizer=tokenizer)
    theirs = reference(hf, FAMILIES["gpt_oss"], tokenizer)
    with torch.no_grad():
        expected, mine, other = (model.log_softmax(-1) for model in (
            hf(random_tokens()).logits, ours(random_tokens()), theirs(random_tokens())
        ))  # fmt: skip
    assert torch.allclose(mine, expected, atol=1e-5)
    assert (other - expected).abs().max() > 0.1
    assert not ours.interior.weights.processing.fold_value_biases
