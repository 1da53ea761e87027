"""Is every activation of the dtype and shape that it has in 3.9.0, in models of less than single precision?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compat_tests.conftest import Pairs
from compat_tests.rough_models import PROCESSINGS, SHAPES, ours, random_tokens, rough_gpt2, tl_reference
from compat_tests.test_points import FLAGS

TOKENS = random_tokens(2, 9, SHAPES["two"].vocab, 0)
#: How far two models of this precision are apart that round in different places; float32's is 1e-4 everywhere else.
ROUNDING = {torch.bfloat16: 0.15, torch.float16: 0.02}


def half_models(pairs: Pairs, dtype: torch.dtype, processing: str) -> tuple[Any, Any]:
    hf = rough_gpt2(SHAPES["two"]).to(dtype)
    flags = PROCESSINGS[processing] | {"dtype": dtype}
    return ours(hf, pairs.tokenizer(), **flags), tl_reference(hf, pairs.tokenizer(), **flags)


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_point(pairs: Pairs, dtype: torch.dtype, processing: str) -> None:
    mine, theirs = half_models(pairs, dtype, processing)
    seen = []
    for model in (mine, theirs):
        for flag in FLAGS:
            getattr(model, f"set_{flag}")(True)
        logits, cache = model.run_with_cache(TOKENS)
        seen.append({name: (value.dtype, value.shape) for name, value in [*cache.items(), ("logits", logits)]})
    assert seen[0] == seen[1]
    assert {kind for kind, _ in seen[0].values()} == {dtype, torch.float32}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_outputs(pairs: Pairs, dtype: torch.dtype) -> None:
    mine, theirs = half_models(pairs, dtype, "raw")
    logits, expected = mine(TOKENS), theirs(TOKENS)
    assert logits.dtype == expected.dtype == dtype
    assert (logits - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    losses = [model(TOKENS, return_type="loss") for model in (mine, theirs)]
    assert losses[0].dtype == losses[1].dtype
    assert torch.isclose(losses[0].float(), losses[1].float(), rtol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_what_hooks_are_given(pairs: Pairs, dtype: torch.dtype) -> None:
    """Hooks that may edit go another way through the engine than caches."""
    kinds: list[dict[str, torch.dtype]] = [{}, {}]
    for index, model in enumerate(half_models(pairs, dtype, "default")):

        def note(x: torch.Tensor, hook: Any, index: int = index) -> None:
            kinds[index][hook.name] = x.dtype

        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, note)])
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_weights(pairs: Pairs, dtype: torch.dtype) -> None:
    mine, theirs = half_models(pairs, dtype, "default")
    for name in ("W_E", "W_pos", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "W_in", "b_in", "W_out", "b_out"):
        assert getattr(mine, name).dtype == getattr(theirs, name).dtype == dtype, name
    assert mine.cfg.dtype == theirs.cfg.dtype


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_carries_a_graph(pairs: Pairs, mode: Any) -> None:
    """What is kept in a cache never does; logits do unless autograd is off."""
    pair = pairs.get()
    found = []
    for model in pair.both:
        with mode():
            logits, cache = model.run_with_cache(pair.tokens())
            found.append((logits.requires_grad, {value.requires_grad for value in cache.values()}))
    assert found[0] == found[1] == (mode is torch.enable_grad, {False})


def test_freezing_and_modes(pairs: Pairs) -> None:
    """What is set on the model holds for all that runs, and the names that an optimiser sees are unique."""
    hf = rough_gpt2(SHAPES["two"])
    for model in (ours(hf, pairs.tokenizer()), tl_reference(hf, pairs.tokenizer())):
        assert model.requires_grad_(False) is model
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(TOKENS).requires_grad
        model.requires_grad_(True)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model(TOKENS).requires_grad
        names = [name for name, _ in model.named_parameters()]
        assert len(names) == len(set(names)) == len(list(model.parameters()))
        assert model.eval() is model and not model.training
        assert model.train() is model and model.training
        model.eval()
