"""Do the traps that families set stay unsprung? Each by its name, on families that have it.

`test_every_family.py` checks what must hold of all families alike; here is what some of them do that a reader of
HuggingFace's code would not expect, and a point must not be led astray by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.checking import hooked
from lensbridge.checking.capture import capturing
from lensbridge.checking.families import recorded
from lensbridge.errors import UnknownPointError
from lensbridge.tiny import tiny_config, tiny_family, tiny_model, tiny_tokens

KEYS = recorded()
TOKENS = tiny_tokens(2, 12)


def served(*keys: str) -> list[str]:
    """Those families among these that have a record."""
    return [key for key in keys if key in KEYS]


@lru_cache(maxsize=8)
def model_of(key: str) -> Any:
    """The hooked tiny model of a family, without processing."""
    return hooked(tiny_family(key))


def cached(model: Any, hooks: Any = (), **arguments: Any) -> dict[str, Tensor]:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return dict(model.run_with_cache(TOKENS, return_cache_object=False, **arguments)[1])


def logits(model: Any, hooks: Any = ()) -> Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(TOKENS)


def adding(amount: float) -> Callable[..., None]:
    """A hook that adds in place, not the same everywhere, and returns nothing."""

    def add(value: Tensor, hook: Any) -> None:
        value[..., ::3] += amount

    return add


# --- what was cached does not change later ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", served("llama", "gpt2", "gptj", "olmo2", "opt", "falcon", "falcon@new_decoder"))
def test_what_was_cached_keeps_its_value_when_a_later_hook_writes_in_place(key: str) -> None:
    """What ends a block begins the next, and the stream between attention and MLP is the skip connection's tensor."""
    model = model_of(key)
    clean = cached(model)
    names = [name for name in model.interior.points() if name in clean]
    for short in ("hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "hook_attn_out", "ln2.hook_normalized"):
        name = f"blocks.1.{short}"
        if name not in clean:
            continue
        edited = cached(model, [(name, adding(1.0))])
        for earlier in names[: names.index(name)]:
            assert torch.allclose(edited[earlier], clean[earlier], atol=1e-5), f"{earlier}, after an edit of {name}"
        assert not torch.equal(edited["blocks.1.hook_resid_post"], clean["blocks.1.hook_resid_post"])


@pytest.mark.parametrize("key", served("falcon", "falcon@new_decoder"))
def test_falcon_adds_attention_into_the_mlps_output_in_place(key: str) -> None:
    """What is cached there, and what a hook is shown, is the MLP's output all the same."""
    model = model_of(key)
    with torch.no_grad(), capturing(model.hf_model) as plain:
        model.hf_model(TOKENS)
    seen: dict[str, Tensor] = {}
    cache = cached(model, [("blocks.0.hook_mlp_out", lambda value, hook: seen.update(value=value))])
    layer = model.interior.architecture.layer(0)
    expected = plain.output(f"{layer}.mlp")
    assert torch.equal(seen["value"], expected)
    assert torch.equal(cache["blocks.0.hook_mlp_out"], expected)
    assert torch.equal(cached(model, names_filter="blocks.0.hook_mlp_out")["blocks.0.hook_mlp_out"], expected)
    live = model.hf_model.get_submodule(f"{layer}.mlp")
    kept: list[Tensor] = []
    handle = live.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        logits(model)
    finally:
        handle.remove()
    assert not torch.equal(kept[0], expected), "falcon no longer adds in place: this trap is gone"


# --- how modules are called, and what they return ---------------------------------------------------------------------


@pytest.mark.parametrize("key", served("gptj", "gpt_neo", "bloom", "codegen", "mpt", "falcon"))
def test_layers_that_return_tuples(key: str) -> None:
    model = model_of(key)
    outputs: list[Any] = []
    layer = model.hf_model.get_submodule(model.interior.architecture.layer(0))
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        clean = logits(model)
    finally:
        handle.remove()
    assert isinstance(outputs[0], (tuple, list)), f"{key}'s layers return a tensor now: this trap is gone"
    after = logits(model, [("blocks.0.hook_resid_post", adding(0.5))])
    assert torch.allclose(after, logits(model, [("blocks.1.hook_resid_pre", adding(0.5))]), atol=1e-5)
    assert not torch.allclose(after, clean, atol=1e-3)


@pytest.mark.parametrize("key", served("bert", "roberta", "electra"))
def test_a_child_module_that_is_called_output(key: str) -> None:
    """nnsight's own ``output`` is in its way, and serves it under another name."""
    model = model_of(key)
    path = model.interior.architecture.layer(0)
    layer = model.hf_model.get_submodule(path)
    assert "output" in dict(layer.named_children())
    with torch.no_grad(), capturing(model.hf_model) as plain:
        model.hf_model(TOKENS)
    cache = cached(model)
    assert torch.equal(cache["blocks.0.hook_normalized_resid_post"], plain.output(path))
    assert torch.equal(cache["blocks.0.hook_mlp_out"], plain.output(f"{path}.output.dense"))
    edited = cached(model, [("blocks.0.hook_mlp_out", adding(0.5))])
    added = edited["blocks.0.hook_resid_post"] - cache["blocks.0.hook_resid_post"]
    assert torch.allclose(added[..., ::3], torch.full_like(added[..., ::3], 0.5), atol=1e-5)


# --- masks, windows and sinks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", served("llama", "gpt2", "gpt_neo", "gptj", "bloom", "gemma2", "mpt", "codegen"))
def test_masks_are_finite_in_huggingface_and_infinite_here_both_ways(key: str) -> None:
    """Scores masked by HF's smallest number read as -inf, and a hook may write either."""
    model, name = model_of(key), "blocks.0.attn.hook_attn_scores"
    scores = cached(model)[name]
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    assert scores[:, :, later].isneginf().all()
    assert scores[~scores.isneginf()].abs().max() < 1e4

    def masking(number: float) -> Callable[..., None]:
        def mask(value: Tensor, hook: Any) -> None:
            value[:, 0, 3:, 2] = number

        return mask

    infinite, finite = (logits(model, [(name, masking(n))]) for n in (-torch.inf, torch.finfo(torch.float32).min))
    assert torch.equal(infinite, finite)
    assert infinite.isfinite().all()
    # Written back as it was read: -inf for HF's finite number changes nothing.
    assert torch.equal(logits(model, [(name, lambda value, hook: value + 0)]), logits(model))


@pytest.mark.parametrize("key", served("gpt_oss", "mimo_v2_flash", "flint"))
def test_sinks_take_a_part_of_each_row(key: str) -> None:
    model = model_of(key)
    cache = cached(model)
    for layer, block in enumerate(model.interior.architecture.blocks):
        if block.sinks is None:
            continue
        scores, pattern = (cache[f"blocks.{layer}.attn.hook_{name}"] for name in ("attn_scores", "pattern"))
        assert scores.shape[-1] == pattern.shape[-1] == 12
        total = pattern.sum(-1)
        assert (total < 1 + 1e-6).all() and (total > 0).all()
        # The sink's logit is the same in every row of a head.
        sinks = scores.logsumexp(-1) + torch.log1p(-total) - torch.log(total)
        for head in range(sinks.shape[1]):
            sink = sinks[:, head][total[:, head] < 0.9]
            assert sink.numel() and torch.allclose(sink, sink[:1].expand_as(sink), atol=1e-4)
    assert any(block.sinks is not None for block in model.interior.architecture.blocks)
    # Values' biases would have to be moved by the sum of a row, which is no constant.
    with torch.no_grad():
        expected = model.hf_model(TOKENS).logits.log_softmax(-1)
        model.process_weights_()
        try:
            assert torch.allclose(model(TOKENS).log_softmax(-1), expected, atol=1e-5)
        finally:
            model.set_processing(type(model.interior.weights.processing)())


@pytest.mark.parametrize("key", served("mistral", "gemma2", "gemma3_text", "olmo3", "gpt_neo", "qwen2@sliding"))
def test_sliding_windows(key: str) -> None:
    """Local layers see no further back than the window, others everything; the config says which is which."""
    model = model_of(key)
    cache, cfg = cached(model), model.cfg
    assert cfg.use_local_attn and cfg.window_size < 12
    distance = torch.arange(12)[:, None] - torch.arange(12)
    kinds = cfg.attn_types or ["local"] * cfg.n_layers
    assert len(kinds) == cfg.n_layers
    for layer, kind in enumerate(kinds):
        seen = distance >= 0
        if kind == "local":
            seen &= distance < cfg.window_size
        scores, pattern = (cache[f"blocks.{layer}.attn.hook_{name}"] for name in ("attn_scores", "pattern"))
        assert torch.equal(scores.isfinite(), seen.expand_as(scores)), f"layer {layer} is {kind}"
        assert torch.equal(pattern > 0, seen.expand_as(pattern)), f"layer {layer} is {kind}"


# --- layers that differ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", served("laguna", "gemma4_text", "mimo_v2_flash"))
def test_head_counts_or_sizes_of_each_layer(key: str) -> None:
    """The config has one number; the shapes are each layer's own."""
    model = model_of(key)
    cache, sizes = cached(model), set()
    for layer in range(model.cfg.n_layers):
        heads = model.interior.weights.parameters.heads(layer)
        z, pattern = cache[f"blocks.{layer}.attn.hook_z"], cache[f"blocks.{layer}.attn.hook_pattern"]
        assert z.shape == (2, 12, heads.queries, heads.value_size)
        assert pattern.shape == (2, heads.queries, 12, 12)
        sizes.add((heads, z.shape))
    assert len(sizes) > 1


@pytest.mark.parametrize("key", served("smollm3", "cohere2", "exaone4"))
def test_layers_without_rotation(key: str) -> None:
    """In some layers queries meet keys as they are, and there is nothing rotated to be shown."""
    model = model_of(key)
    cache, rotated = cached(model), []
    for layer in range(model.cfg.n_layers):
        prefix = f"blocks.{layer}.attn"
        q, k = (unrotated(model, cache, prefix, letter) for letter in "qk")
        heads = q.shape[2] // k.shape[2]
        products = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(heads, dim=2)) / model.cfg.attn_scale
        scores = cache[f"{prefix}.hook_attn_scores"]
        as_they_are = torch.allclose(scores, products.masked_fill(scores.isneginf(), -torch.inf), atol=1e-4)
        rotated.append(f"{prefix}.hook_rot_q" in cache)
        assert as_they_are != rotated[-1], f"layer {layer}"
        if not rotated[-1]:
            with pytest.raises(UnknownPointError, match="queries and keys are not rotated"):
                logits(model, [(f"{prefix}.hook_rot_q", adding(1.0))])
    assert any(rotated) and not all(rotated), rotated


def unrotated(model: Any, cache: dict[str, Tensor], prefix: str, letter: str) -> Tensor:
    """Queries or keys, after their norm if they have one."""
    value, norm = cache[f"{prefix}.hook_{letter}"], f"{prefix}.{letter}_norm"
    if f"{norm}.hook_normalized" not in cache:
        return value
    return (cache[f"{norm}.hook_normalized"] * model.interior.weights.get(f"{norm}.w").detach()).view(value.shape)


@pytest.mark.parametrize("key", served("gpt2", "gemma", "gemma2", "opt", "bloom", "qwen2"))
def test_tied_embeddings(key: str) -> None:
    """One parameter is embedding and unembedding: an edit of the one view is an edit of the other."""
    config = tiny_config(key)
    config.tie_word_embeddings = True
    hf = tiny_model(config)
    model = hooked(hf)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), hf(TOKENS).logits)
        scale = model.W_E[7] / model.W_U[:, 7]
        assert torch.allclose(scale, scale[:1].expand_as(scale), rtol=1e-4)
        model.W_U.data[:, 7] = 0.0
        assert not model.W_E[7].any()
        assert not hf.get_input_embeddings().weight[7].any()
        assert torch.equal(model(TOKENS), hf(TOKENS).logits)
        assert not model(TOKENS)[..., 7].sub(model.b_U[7]).any()


# --- implementations of attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", served("gptj", "gpt_neo", "bloom", "codegen", "mpt", "gpt_neox_japanese"))
def test_models_whose_attention_ignores_the_implementation(key: str) -> None:
    """To ask for another one changes nothing, neither in the logits nor at scores and pattern."""
    model = hooked(tiny_family(key))
    clean, before = cached(model), logits(model)
    model.hf_model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), before)
    found = cached(model)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    doubled = cached(model, [("blocks.0.attn.hook_attn_scores", lambda value, hook: value * 2)])
    expected = (2 * clean["blocks.0.attn.hook_attn_scores"]).softmax(-1)
    assert torch.allclose(doubled["blocks.0.attn.hook_pattern"], expected, atol=1e-6)


@pytest.mark.parametrize("key", served("llama", "gpt2", "gemma3_text", "olmo2", "opt", "gpt_neox"))
def test_sdpa_models_switch_to_eager_for_one_run_and_back(key: str) -> None:
    """Also where a hook raises; and runs that do not touch scores or pattern do not switch."""
    hf = tiny_model(tiny_config(key), attn_implementation="sdpa")
    model = hooked(hf)
    with torch.no_grad():
        expected = hf(TOKENS).logits
    during: list[str] = []

    def note(value: Tensor, hook: Any) -> None:
        during.append(hf.config._attn_implementation)

    assert torch.equal(logits(model, [("blocks.0.attn.hook_z", note)]), expected)
    eager = logits(model, [("blocks.0.attn.hook_pattern", note)])
    assert during == ["sdpa", "eager"]
    assert torch.allclose(eager, expected, atol=1e-4)
    assert hf.config._attn_implementation == "sdpa"

    def failing(value: Tensor, hook: Any) -> None:
        raise KeyError("a mistake in a hook")

    with pytest.raises(KeyError):
        logits(model, [("blocks.0.attn.hook_attn_scores", failing)])
    assert hf.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), expected)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", served("llama", "gpt2", "gemma2", "olmo2", "opt", "bloom", "qwen3"))
def test_bfloat16(key: str) -> None:
    """Logits are HF's bit by bit, and values have HF's dtype but for norms, which are computed in float32."""
    hf = tiny_family(key).bfloat16()
    model = hooked(hf)
    with torch.no_grad():
        expected = hf(TOKENS).logits
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits(model), expected)
    cache = cached(model)
    wide = {name for name, value in cache.items() if value.dtype != torch.bfloat16}
    assert all(name.endswith(("hook_scale", "hook_normalized", "attn_scores", "pattern")) for name in wide), wide
    edited = logits(model, [("blocks.0.hook_mlp_out", adding(0.5))])
    assert edited.dtype == torch.bfloat16 and not torch.equal(edited, expected)
