"""Does what sets some families apart from GPT-2 reach the facade?

What must hold of every family is in `test_every_family.py`; here is what only some have: positions counted from
elsewhere, no key-value cache, several rows of tokens to a text, embeddings that are no plain sum, values that a forward
changes later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MusicgenForCausalLM

from lensbridge import HookedTransformer
from lensbridge.architectures.bert import BIG_BIRD
from lensbridge.cache import TransformerLensKeyValueCache
from lensbridge.checking import hooked
from lensbridge.errors import UnsupportedModelError
from lensbridge.processing import Processing
from lensbridge.tiny import tiny_config, tiny_family, tiny_model

TOKENS = torch.arange(20, 38).reshape(2, 9)


def lens_of(key: str) -> Any:
    return hooked(tiny_family(key), key)


def test_positions_behind_the_padding_row_are_told_to_the_model() -> None:
    model = lens_of("roberta")
    with torch.no_grad():
        expected = model.hf_model(TOKENS).logits
        masked = model(TOKENS, attention_mask=torch.ones_like(TOKENS))
        with model.trace(TOKENS):
            traced = model.unembed.hook_out.value.save()
    assert torch.equal(masked, expected) and torch.equal(traced, expected)
    assert model.cfg.n_ctx == model.W_pos.shape[0] == model.hf_model.config.max_position_embeddings - 2


@pytest.mark.parametrize("key", ["openai-gpt", "cpmant", "minimax"])
def test_a_model_without_the_usual_cache_writes_the_same_text_without(key: str) -> None:
    model = lens_of(key)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    cached, uncached = (model.generate(TOKENS, use_past_kv_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    with pytest.raises(UnsupportedModelError, match="past_kv_cache cannot be used with this model"):
        model(TOKENS, past_kv_cache=cache, attention_mask=torch.ones_like(TOKENS))


@pytest.mark.parametrize("key", ["xlnet", "musicgen"])
def test_no_text_where_it_would_be_another_s(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no text can be generated with this model: it"):
        lens_of(key).generate(TOKENS, max_new_tokens=1, stop_at_eos=False)


@pytest.mark.parametrize("key", ["bert", "bart", "electra", "ctrl"])
def test_a_stream_of_more_than_embeddings_is_not_put_together(key: str) -> None:
    model = lens_of(key)
    embedded = torch.zeros(1, 3, model.cfg.d_model)
    with pytest.raises(UnsupportedModelError, match="more goes into the residual stream than embeddings"):
        model.get_residual(embedded, 0)
    with pytest.raises(UnsupportedModelError, match="run with stop_at_layer=0"):
        model.generate(embedded, max_new_tokens=1, verbose=False, stop_at_eos=False)


@pytest.mark.parametrize(
    "key", ["bert", "bart", "xlnet", "prophetnet", "electra", "cpmant", "megatron-bert", "xlm", "hrm_text"]
)
def test_a_run_can_stop_and_start_at_each_layer(key: str) -> None:
    model = lens_of(key)
    with torch.no_grad():
        whole, cache = model.run_with_cache(TOKENS)
        seen: list[Tensor] = []
        for layer in range(model.cfg.n_layers + 1):
            stream = model(TOKENS, stop_at_layer=layer)
            hooks = [("blocks.0.hook_resid_pre", lambda value, hook: seen.append(value))]
            assert torch.equal(stream, model.run_with_hooks(TOKENS, stop_at_layer=layer, fwd_hooks=hooks))
            if layer < model.cfg.n_layers:
                assert torch.equal(stream, cache[f"blocks.{layer}.hook_resid_pre"])
    assert whole.shape == (*TOKENS.shape, model.cfg.d_vocab_out)
    last = model.cfg.n_layers - 1
    name = next(n for n in ("hook_normalized_resid_post", "hook_resid_post") if f"blocks.{last}.{n}" in cache)
    assert torch.equal(stream, cache[f"blocks.{last}.{name}"])


@pytest.mark.parametrize("key", ["bert", "bart", "xlnet", "electra", "megatron-bert", "opt@post_norm_projected", "xlm"])
def test_what_is_behind_a_layer_runs_by_itself(key: str) -> None:
    model = lens_of(key)
    with torch.no_grad():
        whole, cache = model.run_with_cache(TOKENS)
        for layer in range(model.cfg.n_layers):
            part = model(cache[f"blocks.{layer}.hook_resid_pre"], start_at_layer=layer)
            assert torch.allclose(part, whole, atol=1e-5)
        assert torch.allclose(model.unembed(cache["unembed.hook_in"]), whole, atol=1e-5)


def test_rows_of_tokens_that_make_one_text() -> None:
    config = tiny_config("musicgen").decoder
    config.num_codebooks = 4
    hf = tiny_model(config, model_class=MusicgenForCausalLM)
    model = HookedTransformer.from_pretrained_no_processing("musicgen", hf_model=hf)
    tokens = torch.arange(24, 60).reshape(4, 9)
    with torch.no_grad():
        expected = hf(tokens).logits
        logits, cache = model.run_with_cache(tokens)
    assert torch.equal(model(tokens), expected) and torch.equal(logits, expected)
    assert logits.shape == (4, 9, model.cfg.d_vocab_out)
    assert cache["blocks.0.hook_resid_pre"].shape == (1, 9, model.cfg.d_model)
    assert torch.equal(cache["hook_embed"], model.W_E[tokens[:1]])
    assert torch.allclose(cache["unembed.hook_in"] @ model.W_U, logits[:1], atol=1e-5)


def test_the_sum_of_falcon_s_branches_leaves_what_was_kept() -> None:
    model = lens_of("falcon")
    name, kept = "blocks.0.hook_mlp_out", []
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: kept.append(value))])
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: kept.append(value) or value * 2)])
    assert all(torch.equal(value, cache[name]) for value in kept)
    assert not torch.equal(edited, model(TOKENS))
    written = cache["blocks.0.mlp.hook_post"] @ model.W_out[0] + model.b_out[0]
    assert torch.allclose(cache[name], written, atol=1e-5)


def test_keys_of_falcon_40b_are_shown_once_for_each_group() -> None:
    model = lens_of("falcon@new_decoder")
    _, cache = model.run_with_cache(TOKENS)
    q, k = (cache[f"blocks.0.attn.hook_rot_{letter}"] for letter in "qk")
    assert q.shape[2] == 2 * k.shape[2] == 2 * model.cfg.n_key_value_heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) / model.cfg.attn_scale
    found = cache["blocks.0.attn.hook_attn_scores"]
    assert torch.allclose(scores.masked_fill(found.isneginf(), -torch.inf), found, atol=1e-5)


def test_edits_go_into_both_calls_of_differential_attention() -> None:
    model = lens_of("diffllama")
    prefix = "blocks.0.attn.hook_"

    def edited(point: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return model.run_with_hooks(TOKENS, fwd_hooks=[(prefix + point, lambda value, hook: change(value))])

    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        gone = [(f"{prefix}pattern", lambda value, hook: value * 0)]
        with model.hooks(fwd_hooks=gone):
            _, without = model.run_with_cache(TOKENS, names_filter="blocks.0.hook_attn_out")
    assert not without["blocks.0.hook_attn_out"].any()
    uniform = edited("q", torch.zeros_like)
    assert not torch.allclose(uniform, model(TOKENS), atol=1e-2)
    assert torch.allclose(edited("rot_q", torch.zeros_like), uniform, atol=1e-5)
    assert torch.allclose(edited("rot_k", torch.zeros_like), uniform, atol=1e-5)
    scores = cache[f"{prefix}attn_scores"]
    level = scores.masked_fill(scores.isfinite(), 0.0)
    assert torch.allclose(edited("attn_scores", lambda value: level), uniform, atol=1e-5)
    assert torch.allclose(edited("pattern", lambda value: level.softmax(-1)), uniform, atol=1e-5)


def test_runs_of_one_layer_are_layers() -> None:
    model = lens_of("hrm_text")
    config = model.hf_model.config
    runs = model.interior.architecture.ran
    assert model.cfg.n_layers == len(runs) == config.num_hidden_layers
    layer, again = (number for number, run in enumerate(runs) if run.path == runs[0].path and run.before < 2)
    assert torch.equal(model.W_Q[layer], model.W_Q[again])
    with torch.no_grad():
        whole, cache = model.run_with_cache(TOKENS)
        for number in (layer, again):
            prefix = f"blocks.{number}."
            part = model(cache[f"{prefix}hook_resid_pre"], start_at_layer=number, tokens=TOKENS)
            assert torch.allclose(part, whole, atol=1e-5)
        assert not torch.allclose(cache["resid_pre", layer], cache["resid_pre", again], atol=0.1)
        past = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(TOKENS))
        steps = [model(part, past_kv_cache=past, attention_mask=torch.ones_like(part)) for part in TOKENS.split(5, 1)]
        assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)


def test_an_mlp_with_experts_beside_it_does_not_run_by_itself() -> None:
    model = lens_of("gemma4_text@experts")
    with pytest.raises(UnsupportedModelError, match="experts beside it, which read the residual stream"):
        model.blocks[0].mlp(torch.zeros(1, 3, model.cfg.d_model))


def test_a_bias_behind_the_projection_is_attention_s() -> None:
    model = lens_of("gpt_neox_japanese")
    last = model.cfg.n_layers - 1
    assert torch.equal(model.b_O[last], model.hf_model.gpt_neox_japanese.layers[last].attention.dense_bias)
    assert not model.b_O[0].any()
    model.set_use_attn_result(True)
    result = f"blocks.{last}.attn.hook_result"
    with torch.no_grad():
        same = model.run_with_hooks(TOKENS, fwd_hooks=[(result, lambda value, hook: value.clone())])
        assert torch.allclose(same, model(TOKENS), atol=1e-5)


def test_opt_without_its_last_norm() -> None:
    config = tiny_config("opt")
    config._remove_final_layer_norm = True
    model = hooked(tiny_model(config), "opt")
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.equal(logits, model.hf_model(TOKENS).logits)
    assert torch.equal(cache["unembed.hook_in"], cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"])


def test_embeddings_of_another_width_are_shown_in_the_stream_s() -> None:
    model = lens_of("opt@post_norm_projected")
    _, cache = model.run_with_cache(TOKENS)
    decoder = model.hf_model.model.decoder
    assert decoder.embed_tokens.weight.shape[1] != model.cfg.d_model == model.W_E.shape[1] == model.W_U.shape[0]
    assert torch.allclose(model.W_E[TOKENS], cache["hook_embed"], atol=1e-5)
    before = model.W_E.clone()
    with torch.no_grad():
        decoder.project_in.weight.mul_(2)
    model.set_processing(Processing(center_unembed=True))
    assert torch.allclose(model.W_E, 2 * before, atol=1e-5)


def test_patterns_in_pieces_are_refused_with_what_to_do() -> None:
    hf = tiny_family("big_bird")
    hf.config.attention_type = "block_sparse"
    with pytest.raises(UnsupportedModelError, match="attention_type='block_sparse' is not supported: .* load it with"):
        BIG_BIRD.for_model(hf)
