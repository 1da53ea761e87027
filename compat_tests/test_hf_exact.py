"""Are unprocessed logits bit for bit HuggingFace's, and is the HF object left as it was?

Everything here is about our own promise, so 3.9.0, which computes with its own code, does not take part.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from compat_tests.conftest import Pair, Pairs
from compat_tests.edits import noise
from compat_tests.rough_models import NO_PROCESSING, SHAPES, load_tokenizer, ours, rough_gpt2
from compat_tests.test_points import FLAGS

pytestmark = pytest.mark.ours_only

ATTENTIONS = ("eager", "sdpa")
#: Points whose values exist only inside eager attention.
INSIDE_ATTENTION = ("hook_attn_scores", "hook_pattern")


def alone(pair: Pair, attention: str) -> GPT2LMHeadModel:
    """An HF model with the same weights that lensbridge has never seen."""
    return rough_gpt2(pair.shape, attention)


def read(value: torch.Tensor, hook: Any) -> None:
    value.sum()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 15), (3, 9)], ids=str)
def test_no_hooks(pairs: Pairs, shape: str, attention: str, size: tuple[int, int]) -> None:
    pair = pairs.get(shape, "raw", attention=attention)
    tokens = pair.tokens(*size)
    assert torch.equal(pair.ours(tokens), alone(pair, attention)(tokens).logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_hooks_outside_attention(pairs: Pairs, shape: str, attention: str) -> None:
    """No point that needs eager attention is listened to, so whatever implementation the model has goes on running."""
    pair = pairs.get(shape, "raw", attention=attention)
    tokens = pair.tokens()
    expected = alone(pair, attention)(tokens).logits
    hooks = [(lambda name: not name.endswith(INSIDE_ATTENTION), read)]
    assert torch.equal(pair.ours.run_with_hooks(tokens, fwd_hooks=hooks), expected)
    logits, _ = pair.ours.run_with_cache(tokens, names_filter=lambda name: not name.endswith(INSIDE_ATTENTION))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_hooks_on_every_point(pairs: Pairs, shape: str, attention: str) -> None:
    """Scores and pattern exist only in eager attention, so this run is exact with respect to that."""
    pair = pairs.get(shape, "raw", attention=attention)
    tokens = pair.tokens()
    expected = alone(pair, "eager")(tokens).logits
    assert torch.equal(pair.ours.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, read)]), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_cache(pairs: Pairs, shape: str, attention: str) -> None:
    pair = pairs.get(shape, "raw", attention=attention)
    tokens = pair.tokens()
    logits, cache = pair.ours.run_with_cache(tokens)
    model = alone(pair, "eager")
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert torch.equal(logits, output.logits)
    assert torch.equal(cache["unembed.hook_out"], output.logits)
    for layer in range(pair.shape.n_layers):
        assert torch.equal(cache["resid_pre", layer], output.hidden_states[layer])
        assert torch.equal(cache["pattern", layer], output.attentions[layer])
    assert torch.equal(cache["unembed.hook_in"], output.hidden_states[-1])


@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_resid_mid", "blocks.0.attn.hook_pattern"])
def test_each_reading_hook_alone(pairs: Pairs, name: str) -> None:
    pair = pairs.get("two", "raw")
    tokens = pair.tokens()
    assert torch.equal(pair.ours.run_with_hooks(tokens, fwd_hooks=[(name, read)]), alone(pair, "eager")(tokens).logits)


@pytest.mark.parametrize("flags", [*((flag,) for flag in FLAGS), FLAGS], ids="+".join)
def test_flags_without_hooks(pairs: Pairs, flags: tuple[str, ...]) -> None:
    """A flag makes points available; it does not change the computation."""
    pair = pairs.get("two", "raw", flags)
    tokens = pair.tokens()
    expected = alone(pair, "eager")(tokens).logits
    assert torch.equal(pair.ours(tokens), expected)
    assert torch.equal(pair.ours.run_with_cache(tokens)[0], expected)


def test_an_attention_mask(pairs: Pairs) -> None:
    """At real positions; at masked ones HF adds a position embedding where TransformerLens sets it to zero."""
    pair = pairs.get("two", "raw")
    tokens = pair.tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = alone(pair, "eager")(tokens, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(pair.ours(tokens, attention_mask=mask)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("processing", ["default", "refactored"])
def test_processing_keeps_log_probabilities(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    tokens = pair.tokens()
    expected = alone(pair, "eager")(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(pair.ours(tokens).log_softmax(-1), expected, rtol=0, atol=1e-5)


def snapshot(model: GPT2LMHeadModel) -> dict[str, Any]:
    """What must be the same after lensbridge has used a model."""
    return {
        "class": type(model),
        "module classes": {name: type(module) for name, module in model.named_modules()},
        "forwards": {name: type(module).forward for name, module in model.named_modules()},
        "own forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "training": {name: module.training for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
    }


def use_everything(model: Any, tokens: torch.Tensor) -> None:
    model(tokens, return_type="loss").backward()
    model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, noise)])
    model(tokens, stop_at_layer=1)
    model(torch.randn(1, 4, 20), start_at_layer=1)
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: 1 / 0)])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("processing", ["raw", "default", "refactored"])
def test_the_huggingface_object_is_unchanged(all_pairs: Pairs, attention: str, processing: str) -> None:
    from compat_tests.rough_models import PROCESSINGS

    hf = rough_gpt2(SHAPES["two"], attention)
    weights = copy.deepcopy(hf.state_dict())
    before = snapshot(hf)
    tokens = torch.arange(3, 12)[None]
    expected = hf(tokens).logits
    model = ours(hf, load_tokenizer(all_pairs.tokenizer_dirs["gpt2"]), **PROCESSINGS[processing])
    assert model.hf_model is hf
    use_everything(model, tokens)
    after = snapshot(hf)
    for part, value in before.items():
        assert after[part] == value, part
    assert hf.state_dict().keys() == weights.keys()
    assert all(torch.equal(hf.state_dict()[name], value) for name, value in weights.items())
    assert torch.equal(hf(tokens).logits, expected)


def test_the_huggingface_model_is_usable_between_runs(pairs: Pairs) -> None:
    pair = pairs.get("two", "default", attention="sdpa")
    tokens = pair.tokens()
    expected = alone(pair, "sdpa")(tokens).logits
    generated = alone(pair, "sdpa").generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(2):
        pair.ours.run_with_cache(tokens)
        assert torch.equal(pair.hf(tokens).logits, expected)
        assert torch.equal(pair.hf.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), generated)


def test_the_huggingface_model_is_usable_inside_a_hooks_context(pairs: Pairs) -> None:
    """Hooks belong to the lens, not to the HF module."""
    pair = pairs.get("two", "raw")
    tokens = pair.tokens()
    expected = alone(pair, "eager")(tokens).logits
    with pair.ours.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", noise)]):
        assert torch.equal(pair.hf(tokens).logits, expected)
        assert not torch.equal(pair.ours(tokens), expected)


def test_two_lenses_on_one_huggingface_model(all_pairs: Pairs) -> None:
    """A raw and a processed view of one set of weights, used in turns."""
    hf = rough_gpt2(SHAPES["two"])
    directory = all_pairs.tokenizer_dirs["gpt2"]
    raw = ours(hf, load_tokenizer(directory), **NO_PROCESSING)
    processed = ours(hf, load_tokenizer(directory))
    tokens = torch.arange(3, 12)[None]
    expected = hf(tokens).logits
    for _ in range(2):
        assert torch.equal(raw.run_with_cache(tokens)[0], expected)
        torch.testing.assert_close(
            processed.run_with_cache(tokens)[0], expected - expected.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4
        )
    with raw.hooks(fwd_hooks=[("hook_embed", noise)]):
        assert not torch.equal(raw(tokens), expected)
        torch.testing.assert_close(processed(tokens), expected - expected.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_changed_weights_are_seen_at_once(pairs: Pairs) -> None:
    """There is one copy of the weights: what is trained on the HF side is what the lens runs."""
    for processing in ("raw", "default", "refactored"):
        pair = pairs.get("two", processing)
        tokens = pair.tokens()
        weight = pair.hf.transformer.h[0].mlp.c_proj.weight
        before = pair.ours(tokens)
        with torch.no_grad():
            weight.mul_(2)
        changed = pair.ours(tokens)
        expected = pair.hf(tokens).logits.log_softmax(-1)
        with torch.no_grad():
            weight.div_(2)
        assert not torch.equal(changed, before)
        torch.testing.assert_close(changed.log_softmax(-1), expected, rtol=0, atol=1e-5)
        assert torch.equal(pair.ours(tokens), before)
