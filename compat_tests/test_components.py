"""Can the parts of the model be called on their own, with 3.9.0's arguments and results?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compat_tests.comparison import close
from compat_tests.conftest import Pair, Pairs
from compat_tests.edits import noise
from compat_tests.rough_models import PROCESSINGS, SHAPES

WIDTH = 20


def residual(*shape: int, seed: int = 0) -> torch.Tensor:
    """A stream that has a mean, as an intervention may leave it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def compare(pair: Pair, name: str, call: Any) -> None:
    mine, theirs = (call(model) for model in pair.both)
    close(f"component: {name}", mine, theirs)


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_component(pairs: Pairs, shape: str, processing: str) -> None:
    pair = pairs.get(shape, processing)
    width = pair.shape.d_model
    stream = residual(2, 6, width)
    tokens = pair.tokens(2, 6)
    compare(pair, "embed", lambda model: model.embed(tokens))
    compare(pair, "pos_embed", lambda model: model.pos_embed(tokens))
    compare(pair, "ln_final", lambda model: model.ln_final(stream))
    compare(pair, "unembed", lambda model: model.unembed(stream))
    for layer in range(pair.shape.n_layers):
        compare(pair, "block", lambda model, i=layer: model.blocks[i](stream))
        compare(pair, "ln1", lambda model, i=layer: model.blocks[i].ln1(stream))
        compare(pair, "ln2", lambda model, i=layer: model.blocks[i].ln2(stream))
        compare(pair, "attn", lambda model, i=layer: model.blocks[i].attn(stream, stream, stream))
        compare(pair, "mlp", lambda model, i=layer: model.blocks[i].mlp(stream))


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_attention_with_three_different_inputs(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    query, key, value = (residual(2, 6, WIDTH, seed=seed) for seed in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    for model_arguments in ({}, {"attention_mask": mask}):
        mine, theirs = (
            model.blocks[1].attn(query_input=query, key_input=key, value_input=value, **model_arguments)
            for model in pair.both
        )
        real = mask.bool() if model_arguments else torch.ones_like(mask, dtype=torch.bool)
        close("component: attn", mine[real], theirs[real])


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_position_embedding_arguments(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    tokens = pair.tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    compare(pair, "pos_embed", lambda model: model.pos_embed(tokens, 4))
    compare(pair, "pos_embed", lambda model: model.pos_embed(tokens, past_kv_pos_offset=3))
    compare(pair, "pos_embed", lambda model: model.pos_embed(tokens, attention_mask=mask))


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_residuals_with_more_or_fewer_dimensions(pairs: Pairs, processing: str) -> None:
    """The logit lens calls the last two parts on stacks of residuals."""
    pair = pairs.get("two", processing)
    for shape in ((3, 2, 6, WIDTH), (6, WIDTH), (WIDTH,)):
        stream = residual(*shape)
        compare(pair, "ln_final", lambda model, x=stream: model.ln_final(x))
        compare(pair, "unembed", lambda model, x=stream: model.unembed(x))


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_components_compose_to_the_model(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    tokens = pair.tokens()
    for model in pair.both:
        stream = model.embed(tokens) + model.pos_embed(tokens)
        for block in model.blocks:
            stream = block(stream)
        close("component: all in a row", model.unembed(model.ln_final(stream)), model(tokens))


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("blocks.1.attn.hook_pattern", lambda model, x: model.blocks[1].attn(x, x, x)),
        ("blocks.1.attn.hook_v", lambda model, x: model.blocks[1](x)),
        ("blocks.0.ln1.hook_scale", lambda model, x: model.blocks[0].ln1(x)),
        ("blocks.0.ln2.hook_normalized", lambda model, x: model.blocks[0](x)),
        ("blocks.0.mlp.hook_post", lambda model, x: model.blocks[0].mlp(x)),
        ("blocks.0.hook_resid_mid", lambda model, x: model.blocks[0](x)),
        ("ln_final.hook_normalized", lambda model, x: model.ln_final(x)),
        ("unembed.hook_in", lambda model, x: model.unembed(x)),
        ("unembed.hook_out", lambda model, x: model.unembed(x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hooks_fire_when_a_component_is_called(pairs: Pairs, name: str, call: Any, processing: str) -> None:
    pair = pairs.get("two", processing)
    stream = residual(2, 6, WIDTH)
    results = []
    for model in pair.both:
        plain = call(model, stream)
        with model.hooks(fwd_hooks=[(name, noise)]):
            edited = call(model, stream)
        assert not torch.equal(plain, edited)
        results.append(edited)
    close("component: edited", *results)


def test_gradients_flow_through_components(pairs: Pairs) -> None:
    pair = pairs.get()
    grads = []
    for model in pair.both:
        stream = residual(2, 6, WIDTH).requires_grad_()
        model.unembed(model.ln_final(model.blocks[1](stream)))[..., 7].sum().backward()
        grads.append(stream.grad)
        model.zero_grad()
    close("component: gradient", *grads)


def test_blocks_is_a_list_of_modules(model: Any) -> None:
    assert len(model.blocks) == 2
    assert list(model.blocks)[1] is model.blocks[1] is model.blocks[-1]
    assert len(model.blocks[:1]) == 1
    with pytest.raises(IndexError):
        model.blocks[2]


def test_points_are_attributes_of_their_components(model: Any) -> None:
    for name, point in model.hook_dict.items():
        owner = model
        for part in name.split("."):
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        assert owner is point


def test_the_config_is_shared(model: Any) -> None:
    assert model.blocks[0].attn.cfg is model.cfg
    assert model.cfg.normalization_type == "LNPre"
    assert model.blocks[1].attn.layer_id == 1


CONFIG_FIELDS = [
    "n_layers",
    "n_heads",
    "n_key_value_heads",
    "d_model",
    "d_head",
    "d_mlp",
    "d_vocab",
    "d_vocab_out",
    "n_ctx",
    "act_fn",
    "eps",
    "normalization_type",
    "positional_embedding_type",
    "attn_scale",
    "use_attn_scale",
    "scale_attn_by_inverse_layer_idx",
    "attention_dir",
    "attn_only",
    "gated_mlp",
    "final_rms",
    "parallel_attn_mlp",
    "original_architecture",
    "model_name",
    "tokenizer_name",
    "tokenizer_prepends_bos",
    "default_prepend_bos",
    "device",
    "n_devices",
    "dtype",
    "n_params",
    "init_weights",
    "use_attn_result",
    "use_attn_in",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "output_logits_soft_cap",
    "attn_scores_soft_cap",
    "use_local_attn",
]


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_config_values(pairs: Pairs, shape: str, processing: str) -> None:
    pair = pairs.get(shape, processing)
    mine, theirs = ({name: getattr(model.cfg, name) for name in CONFIG_FIELDS} for model in pair.both)
    assert mine == theirs


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"])
def test_setters_switch_points_on_and_off(pairs: Pairs, flag: str) -> None:
    pair = pairs.get("one")
    for model in pair.both:
        off = set(model.run_with_cache(pair.tokens())[1].keys())
        getattr(model, f"set_{flag}")(True)
        assert getattr(model.cfg, flag) is True
        assert set(model.run_with_cache(pair.tokens())[1].keys()) > off
        getattr(model, f"set_{flag}")(False)
        assert set(model.run_with_cache(pair.tokens())[1].keys()) == off


def test_dropout_never_acts(pairs: Pairs) -> None:
    """3.9.0 has no dropout; here the HF model's dropout must not act either."""
    pair = pairs.get()
    assert pair.hf.config.resid_pdrop == 0.1
    for model in pair.both:
        assert torch.equal(model(pair.tokens()), model(pair.tokens()))
