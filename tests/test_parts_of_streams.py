"""Is the residual stream taken apart only where its parts add up to it, and a cache of keys used only where it fits?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge import HookedTransformer, TransformerLensKeyValueCache
from lensbridge.checking import hooked
from lensbridge.checking.families import recorded, refusal
from lensbridge.errors import UnknownPointError, UnsupportedModelError
from lensbridge.tiny import tiny_family, tiny_tokens

KEYS = [key for key in recorded() if refusal(key) is None]
QUICK = frozenset("gpt2 llama gemma2 bloom bert bart gemma4_text minimax ctrl megatron-bert olmo2 granite".split())
MARKED = [pytest.param(key, marks=[] if key in QUICK else [pytest.mark.slow]) for key in KEYS]
#: Why there is no such sum, by what stands between it and the stream.
REASONS = {
    "bert": "norms stand in the stream, behind attention and MLP",
    "xlnet": "norms stand in the stream, behind attention and MLP",
    "minimax": "attention and MLP add to what their norm returns",
    "beam": "the stream is multiplied by a factor before attention's",
    "hrm_text": "some layers begin with another stream",
    "gemma4_text": "layers do more than to add .* a scalar multiplies it",
    "xmod@pre_norm": "layers do more than to add .* an adapter of the language",
}


def run_of(key: str) -> tuple[HookedTransformer, torch.Tensor, Any]:
    model = hooked(tiny_family(key), key)
    rows = model.interior.architecture.rows
    tokens = tiny_tokens(2 if rows is None else 2 * getattr(model.hf_model.config, rows))
    return (model, *model.run_with_cache(tokens))


@pytest.mark.parametrize("key", MARKED)
def test_parts_add_up_to_the_stream_or_are_refused(key: str) -> None:
    model, _, cache = run_of(key)
    try:
        parts = cache.decompose_resid().sum(0)
    except UnsupportedModelError:
        stream = model.interior.architecture
        assert stream.why_no_sum is not None or not stream.reads_embedding_only
    except UnknownPointError:
        branches = [f"blocks.{i}.hook_{part}_out" for i in range(model.cfg.n_layers) for part in ("attn", "mlp")]
        assert any(name not in cache for name in branches)
    else:
        stream = cache["resid_post", -1]
        assert (parts - stream).abs().max() <= 1e-5 * stream.abs().max()


@pytest.mark.parametrize("key", REASONS)
def test_what_is_no_sum_is_refused_with_the_reason(key: str) -> None:
    _, _, cache = run_of(key)
    calls = [
        cache.decompose_resid,
        cache.get_full_resid_decomposition,
        lambda: cache.stack_head_results(incl_remainder=True),
        lambda: cache.stack_neuron_results(None, incl_remainder=True),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModelError, match=f"cannot be taken apart: {REASONS[key]}"):
            call()
    assert len(cache.accumulated_resid()) == cache.model.cfg.n_layers + 1


@pytest.mark.parametrize("key", ["bert", "openai-gpt", "opt@post_norm_projected"])
def test_no_part_is_read_through_norms_that_stand_behind(key: str) -> None:
    _, _, cache = run_of(key)
    stack = cache.accumulated_resid()
    for call in (lambda: cache.logit_attrs(stack, 7), lambda: cache.accumulated_resid(apply_ln=True)):
        with pytest.raises(UnsupportedModelError, match="cannot be read through a norm .* norms stand in the"):
            call()


@pytest.mark.parametrize("key", ["mbart", "megatron-bert", "ctrl"])
def test_embeddings_that_are_not_all_are_refused_as_parts(key: str) -> None:
    _, _, cache = run_of(key)
    with pytest.raises(UnsupportedModelError, match=r"more goes into the residual stream .* cache\['resid_pre', 0\]"):
        cache.decompose_resid()
    parts = cache.decompose_resid(incl_embeds=False).sum(0) + cache["resid_pre", 0]
    torch.testing.assert_close(parts, cache["resid_post", -1], rtol=1e-5, atol=1e-4)


def test_a_cache_whose_model_was_taken_off_can_still_be_stacked() -> None:
    _, _, cache = run_of("gpt2")
    assert cache._interior is cache.model.interior
    cache.model = None
    assert cache._interior is None


# --- TransformerLens' cache of keys and values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["deepseek_v2", "deepseek_v3", "minicpm3", "falcon@new_decoder", "gemma4_text", "rwkv", "recurrent_gemma"]
)
def test_a_cache_of_keys_that_are_others_is_refused(key: str) -> None:
    model = hooked(tiny_family(key), key)
    tokens = tiny_tokens()
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    with pytest.raises(UnsupportedModelError, match=r"holds keys and values .* or use generate\(\)"):
        model(tokens, past_kv_cache=cache, attention_mask=torch.ones_like(tokens))
    assert all(entry.past_keys.shape[1] == 0 for entry in cache.entries), "part of the run was appended"


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "falcon"])
def test_a_cache_of_keys_that_fit_is_used(key: str) -> None:
    model = hooked(tiny_family(key), key)
    tokens = tiny_tokens()
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    parts = [
        model(part, past_kv_cache=cache, attention_mask=torch.ones_like(part))
        for part in (tokens[:, :7], tokens[:, 7:])
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
