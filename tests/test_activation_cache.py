"""Does the cache find what is asked for, say why when it cannot, and take the residual stream apart without a rest?

The run below is computed by hand from random weights, so that every identity between its parts is known to hold.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lensbridge.activation_cache import ActivationCache
from lensbridge.errors import LensbridgeError, UnknownPointError

LAYERS, HEADS, D_HEAD, D_MODEL, D_MLP, VOCAB, BATCH, POS = 2, 3, 4, 6, 5, 9, 2, 3
EPS = 1e-5


def fake_model() -> Any:
    torch.manual_seed(0)
    blocks = [
        SimpleNamespace(
            attn=SimpleNamespace(W_O=torch.randn(HEADS, D_HEAD, D_MODEL), b_O=torch.randn(D_MODEL)),
            mlp=SimpleNamespace(W_out=torch.randn(D_MLP, D_MODEL), b_out=torch.randn(D_MODEL)),
        )
        for _ in range(LAYERS)
    ]
    W_U = torch.randn(D_MODEL, VOCAB)

    def accumulated_bias(layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> torch.Tensor:
        terms = [block.attn.b_O for block in blocks[: layer + mlp_input]]
        terms += [block.mlp.b_out for block in blocks[:layer]] if include_mlp_biases else []
        return sum(terms, torch.zeros(D_MODEL))

    def ln_final(x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 3, "a norm wants [batch, pos, d_model]"
        return torch.nn.functional.layer_norm(x, (D_MODEL,), eps=EPS) * 3.0 + 1.0

    return SimpleNamespace(
        cfg=SimpleNamespace(
            n_layers=LAYERS, n_heads=HEADS, d_mlp=D_MLP, d_model=D_MODEL, attn_only=False, normalization_type="LN"
        ),
        blocks=blocks,
        W_U=W_U,
        ln_final=ln_final,
        accumulated_bias=accumulated_bias,
        tokens_to_residual_directions=lambda tokens: W_U[:, tokens].movedim(0, -1),
        to_single_token=lambda text: {"yes": 1, "no": 2}[text],
        hook_dict={"blocks.0.hook_mlp_in": None},
    )


def fake_run(model: Any, batch: int = BATCH) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    run = {"hook_embed": torch.randn(batch, POS, D_MODEL), "hook_pos_embed": torch.randn(batch, POS, D_MODEL)}

    def norm(name: str, stream: torch.Tensor) -> None:
        centred = stream - stream.mean(-1, keepdim=True)
        run[f"{name}.hook_scale"] = (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        run[f"{name}.hook_normalized"] = centred / run[f"{name}.hook_scale"]

    stream = run["hook_embed"] + run["hook_pos_embed"]
    for at, block in enumerate(model.blocks):
        here = f"blocks.{at}."
        run[here + "hook_resid_pre"] = stream
        norm(here + "ln1", stream)
        run[here + "attn.hook_z"] = torch.randn(batch, POS, HEADS, D_HEAD)
        attn_out = torch.einsum("bphd,hdm->bpm", run[here + "attn.hook_z"], block.attn.W_O) + block.attn.b_O
        run[here + "hook_attn_out"] = attn_out
        run[here + "hook_resid_mid"] = stream = stream + attn_out
        norm(here + "ln2", stream)
        run[here + "mlp.hook_post"] = torch.randn(batch, POS, D_MLP)
        run[here + "hook_mlp_out"] = run[here + "mlp.hook_post"] @ block.mlp.W_out + block.mlp.b_out
        run[here + "hook_resid_post"] = stream = stream + run[here + "hook_mlp_out"]
    norm("ln_final", stream)
    return run


@pytest.fixture
def model() -> Any:
    return fake_model()


@pytest.fixture
def cache(model: Any) -> ActivationCache:
    return ActivationCache(fake_run(model), model)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


# Lookup


@pytest.mark.parametrize(
    "key", ["blocks.1.attn.hook_z", "z1", ("z", 1), ("z", -1), ("z", np.int64(1)), ("z", 1, "attn")], ids=str
)
def test_many_keys_for_one_tensor(cache: ActivationCache, key: Any) -> None:
    assert cache[key] is cache.cache_dict["blocks.1.attn.hook_z"]


def test_the_dict_is_used_as_it_is(model: Any) -> None:
    stored = fake_run(model)
    cache = ActivationCache(stored, model)
    assert cache.cache_dict is stored
    assert (list(cache), len(cache), repr(cache)) == (
        list(stored),
        len(stored),
        f"ActivationCache with keys {list(stored)}",
    )
    assert list(cache.keys()) == list(stored)
    assert dict(cache.items()) == stored
    assert all(a is b for a, b in zip(cache.values(), stored.values(), strict=True))


def test_values_can_be_read_without_a_model(model: Any) -> None:
    cache = ActivationCache(fake_run(model), None)  # type: ignore[arg-type]
    assert cache["z", 1].shape == (BATCH, POS, HEADS, D_HEAD)
    with pytest.raises(KeyError, match="names_filter"):
        cache["q", 1]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("blocks.1.attn.hook_zz", r"no 'blocks.1.attn.hook_zz'\. .*names_filter.*Closest: blocks.1.attn.hook_z"),
        (("z", 5), r"\('z', 5\) \(that is, 'blocks.5.attn.hook_z'\).*Closest: .*blocks.1.attn.hook_z"),
        ("resid_post0", r"'resid_post0' \(that is, 'hook_resid_post0'\).*hook_resid_post"),
        (("mlp_in", 0), "The model has this hook point, but the run did not store it"),
    ],
)
def test_a_missing_key_is_explained(cache: ActivationCache, key: Any, said: str) -> None:
    with pytest.raises(UnknownPointError, match=said) as caught:
        cache[key]
    assert isinstance(caught.value, KeyError)


def test_an_empty_cache_says_that_it_is_empty(model: Any) -> None:
    with pytest.raises(KeyError, match="empty.*names_filter"):
        ActivationCache({}, model)["z", 0]


@pytest.mark.parametrize("key", [3, None, (), (3, "z"), ["z", 0], ("z", "1"), ("z", 1.0)], ids=str)
def test_a_key_of_another_type_is_a_type_error(cache: ActivationCache, key: Any) -> None:
    with pytest.raises(TypeError):
        cache[key]


def test_only_full_names_are_in_the_cache(cache: ActivationCache) -> None:
    assert "hook_embed" in cache
    assert "z0" not in cache


def test_moving_changes_the_cache_and_leaves_the_tensors(cache: ActivationCache) -> None:
    before = cache["z0"]
    assert cache.to("meta") is cache
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert before.device.type == "cpu"


def test_toggle_autodiff_is_global_and_says_so(cache: ActivationCache, caplog: pytest.LogCaptureFixture) -> None:
    assert torch.is_grad_enabled()
    try:
        cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert "global state" in caplog.text


# The batch dimension


def test_removing_the_batch_dimension(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = ActivationCache(fake_run(model, batch=1), model)
    row = cache["z0"][0]
    assert cache.remove_batch_dim() is cache
    assert torch.equal(cache["z0"], row)
    assert not cache.has_batch_dim
    cache.remove_batch_dim()
    assert torch.equal(cache["z0"], row)
    assert "already" in caplog.text


def test_a_batch_of_several_cannot_lose_its_dimension(cache: ActivationCache) -> None:
    with pytest.raises(AssertionError, match="2 inputs.*apply_slice_to_batch_dim"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim


@pytest.mark.parametrize(
    ("chosen", "rows"), [(1, 1), (-1, 1), ((1, 2), slice(1, 2)), ([1, 0], [1, 0]), (None, slice(None))]
)
def test_slicing_the_batch_makes_a_new_cache(cache: ActivationCache, chosen: Any, rows: Any) -> None:
    sliced = cache.apply_slice_to_batch_dim(chosen)
    assert sliced is not cache
    assert type(sliced) is ActivationCache
    assert sliced.has_batch_dim is not isinstance(chosen, int)
    assert torch.equal(sliced["z0"], cache["z0"][rows])
    assert cache["z0"].shape[0] == BATCH


def test_entries_without_the_batch_are_left_alone(cache: ActivationCache) -> None:
    cache.cache_dict["blocks.0.attn.hook_bias"] = bias = torch.randn(1, POS)
    cache.cache_dict["number"] = number = torch.tensor(2.0)
    sliced = cache.apply_slice_to_batch_dim(1)
    assert sliced["blocks.0.attn.hook_bias"] is bias
    assert sliced.cache_dict["number"] is number


def test_entries_with_another_first_dimension_keep_it(model: Any) -> None:
    cache = ActivationCache(fake_run(model, batch=1), model)
    cache.cache_dict["hook_expert_weights"] = weights = torch.randn(POS, 4)
    assert cache.remove_batch_dim()["hook_expert_weights"] is weights


def test_no_batch_dimension_to_slice(cache: ActivationCache) -> None:
    with pytest.raises(AssertionError, match="no batch dimension"):
        cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)


# The stream taken apart


@pytest.mark.parametrize("layer", [0, 1, LAYERS])
def test_sublayers_add_up_to_the_stream(cache: ActivationCache, layer: int) -> None:
    stream = cache["resid_pre", layer] if layer < LAYERS else cache["resid_post", -1]
    assert close(cache.decompose_resid(layer).sum(0), stream)
    if layer < LAYERS:
        assert close(cache.decompose_resid(layer, mlp_input=True).sum(0), cache["resid_mid", layer])


@pytest.mark.parametrize("expand_neurons", [True, False])
@pytest.mark.parametrize("mlp_input", [True, False])
def test_all_parts_add_up_to_the_stream(cache: ActivationCache, expand_neurons: bool, mlp_input: bool) -> None:
    stack, labels = cache.get_full_resid_decomposition(1, mlp_input, expand_neurons=expand_neurons, return_labels=True)
    assert close(stack.sum(0), cache["resid_mid" if mlp_input else "resid_pre", 1])
    heads = [f"L{at}H{head}" for at in range(1 + mlp_input) for head in range(HEADS)]
    mlps = [f"L0N{neuron}" for neuron in range(D_MLP)] if expand_neurons else ["0_mlp_out"]
    assert labels == [*heads, *mlps, "embed", "pos_embed", "bias"]
    parts = dict(zip(labels, stack, strict=True))
    assert torch.equal(parts["embed"], cache["embed"])
    assert torch.equal(parts["pos_embed"], cache["pos_embed"])
    assert close(parts["L0H1"], cache["z0"][:, :, 1] @ cache.model.blocks[0].attn.W_O[1])
    assert torch.equal(parts["bias"], cache.model.accumulated_bias(1, mlp_input, expand_neurons).expand(BATCH, POS, -1))


def test_normed_parts_add_up_to_what_the_layer_reads(cache: ActivationCache) -> None:
    for layer, mlp_input, read in (
        (0, False, "normalized0ln1"),
        (1, True, "normalized1ln2"),
        (None, False, "normalized"),
    ):
        for decompose in (cache.decompose_resid, cache.get_full_resid_decomposition):
            assert close(decompose(layer, mlp_input, apply_ln=True).sum(0), cache[read])


def test_the_remainder_is_what_heads_or_neurons_leave(cache: ActivationCache) -> None:
    for layer, stream in ((0, cache["resid_pre", 0]), (1, cache["resid_pre", 1]), (-1, cache["resid_post", -1])):
        for stack_results in (cache.stack_head_results, cache.stack_neuron_results):
            stack, labels = stack_results(layer, incl_remainder=True, return_labels=True)
            assert close(stack.sum(0), stream)
            assert labels[-1] == "remainder"


def test_projecting_is_the_same_before_and_after(cache: ActivationCache) -> None:
    for direction in (torch.randn(D_MODEL), torch.randn(D_MODEL, 2)):
        for fields in ({}, {"apply_ln": True}, {"apply_ln": True, "layer": 1, "mlp_input": True}, {"layer": 0}):
            whole = cache.get_full_resid_decomposition(**fields)
            assert close(cache.get_full_resid_decomposition(**fields, project_output_onto=direction), whole @ direction)


def test_attributions_add_up_to_the_logit(cache: ActivationCache, model: Any) -> None:
    logits = cache["normalized"] @ model.W_U
    stack = cache.get_full_resid_decomposition()
    assert close(cache.logit_attrs(stack, 4).sum(0), logits[..., 4])
    assert close(cache.logit_attrs(stack, 4, 7).sum(0), logits[..., 4] - logits[..., 7])
    assert close(cache.logit_attrs(stack[:, :, -1], 4, pos_slice=-1).sum(0), logits[:, -1, 4])
    assert close(cache.logit_attrs(stack, 4, batch_slice=1).sum(0), logits[1, :, 4])
    assert close(cache.logit_attrs(stack[:, 1], 4, batch_slice=1, has_batch_dim=False).sum(0), logits[1, :, 4])


def test_accumulated_resid_labels_and_values(cache: ActivationCache) -> None:
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert torch.equal(stack[3], cache["resid_mid", 1])
    assert torch.equal(stack[4], cache["resid_post", 1])
    assert cache.accumulated_resid(1, mlp_input=True, return_labels=True)[1] == ["0_pre", "1_pre", "1_mid"]
    assert cache.accumulated_resid(1, incl_mid=True, return_labels=True)[1] == ["0_pre", "0_mid", "1_pre"]


@pytest.mark.parametrize("pos_slice", [None, 1, (0, 2)])
def test_the_logit_lens_goes_through_the_last_norm_in_any_shape(model: Any, pos_slice: Any) -> None:
    cache = ActivationCache(fake_run(model, batch=1), model)
    expected = torch.stack(
        [model.ln_final(cache[key]) for key in (("resid_pre", 0), ("resid_pre", 1), ("resid_post", 1))]
    )
    index = slice(*pos_slice) if isinstance(pos_slice, tuple) else slice(None) if pos_slice is None else pos_slice
    assert close(cache.accumulated_resid(apply_ln=True, pos_slice=pos_slice), expected[:, :, index])
    cache.remove_batch_dim()
    assert close(cache.accumulated_resid(apply_ln=True, pos_slice=pos_slice), expected[:, 0, index])


def test_rms_norms_do_not_centre_and_no_norm_does_nothing(cache: ActivationCache) -> None:
    stack = cache.decompose_resid()
    cache.model.cfg.normalization_type = "RMS"
    assert torch.equal(cache.apply_ln_to_stack(stack), stack / cache["scale"])
    cache.model.cfg.normalization_type = None
    assert cache.apply_ln_to_stack(stack) is stack
    assert close(cache.stack_neuron_results(-1, apply_ln=True), cache.stack_neuron_results(-1))


def test_half_precision_stays_half_precision(cache: ActivationCache) -> None:
    half = ActivationCache({name: value.bfloat16() for name, value in cache.items()}, cache.model)
    for block in cache.model.blocks:
        block.attn.W_O = block.attn.W_O.bfloat16()
    assert half.stack_head_results(0).dtype == half.stack_head_results(1).dtype == torch.bfloat16
    assert half.stack_head_results(0).shape == (0, BATCH, POS, D_MODEL)


# Head results in the cache


def test_head_results_stay_and_are_computed_once(cache: ActivationCache, caplog: pytest.LogCaptureFixture) -> None:
    assert "blocks.1.attn.hook_result" not in cache
    cache.stack_head_results(layer=1)
    kept = cache["result", 1]
    cache.stack_head_results()
    assert cache["result", 1] is kept
    assert caplog.text == ""
    cache.compute_head_results()
    assert cache["result", 1] is kept
    assert "already cached" in caplog.text


def test_layers_that_the_run_did_not_reach_are_not_needed(cache: ActivationCache) -> None:
    del cache.cache_dict["blocks.1.attn.hook_z"]
    assert cache.stack_head_results(layer=1).shape[0] == HEADS
    for call in (cache.stack_head_results, cache.compute_head_results):
        with pytest.raises(KeyError, match="blocks.1.attn.hook_z"):
            call()


def test_neurons_can_be_chosen(cache: ActivationCache) -> None:
    whole = cache.stack_neuron_results(-1)
    stack, labels = cache.stack_neuron_results(-1, neuron_slice=[1, 4], return_labels=True)
    assert labels == ["L0N1", "L0N4", "L1N1", "L1N4"]
    assert torch.equal(stack, whole[[1, 4, 6, 9]])
    assert torch.equal(cache.stack_neuron_results(-1, neuron_slice=-1), whole[[4, 9]])


# Refusals


@pytest.mark.parametrize("layer", [-2, LAYERS + 1])
def test_layers_that_do_not_exist(cache: ActivationCache, layer: int) -> None:
    for method in ("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results"):
        with pytest.raises(LensbridgeError, match=f"no layer {layer} in a model of 2"):
            getattr(cache, method)(layer)


def test_the_unembedding_has_no_mlp_input(cache: ActivationCache) -> None:
    for method in ("decompose_resid", "get_full_resid_decomposition"):
        with pytest.raises(KeyError, match="no MLP input"):
            getattr(cache, method)(mlp_input=True)


def test_an_unknown_mode_is_all_and_says_so(cache: ActivationCache) -> None:
    with pytest.warns(UserWarning, match="'mlps'.*\"mlp\""):
        stack = cache.decompose_resid(mode="mlps")  # type: ignore[arg-type]
    assert torch.equal(stack, cache.decompose_resid())


def test_nothing_to_stack(cache: ActivationCache) -> None:
    with pytest.raises(RuntimeError, match="nothing to stack"):
        cache.decompose_resid(0, incl_embeds=False)


def test_a_scale_that_was_not_cached(cache: ActivationCache) -> None:
    del cache.cache_dict["ln_final.hook_scale"]
    with pytest.raises(KeyError, match="scale.*ln_final.hook_scale"):
        cache.decompose_resid(apply_ln=True)


def test_heads_with_equal_inputs_share_their_scale(cache: ActivationCache) -> None:
    expected = cache.decompose_resid(1, apply_ln=True)
    name = "blocks.1.ln1.hook_scale"
    cache.cache_dict[name] = cache[name][:, :, None].repeat(1, 1, HEADS, 1)
    assert torch.equal(cache.decompose_resid(1, apply_ln=True), expected)
    cache[name][:, :, 1] *= 2
    with pytest.raises(RuntimeError, match="different inputs"):
        cache.decompose_resid(1, apply_ln=True)


def test_projections_have_one_or_two_axes(cache: ActivationCache) -> None:
    for call in (cache.get_full_resid_decomposition, lambda **k: cache.get_neuron_results(0, **k)):
        with pytest.raises(ValueError, match=r"\(1, 2, 3\)"):
            call(project_output_onto=torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("tokens", "incorrect", "said"),
    [(1, torch.tensor([2]), r"same shape.*\(\).*\(1,\)"), ("yes", [1], "str, an int or a tensor, not as list")],
)
def test_tokens_that_do_not_match(cache: ActivationCache, tokens: Any, incorrect: Any, said: str) -> None:
    cache.model.tokens_to_residual_directions = lambda _: torch.zeros(D_MODEL)
    with pytest.raises(ValueError, match=said):
        cache.logit_attrs(cache.decompose_resid(), tokens, incorrect)


def test_no_state_space_layers(cache: ActivationCache) -> None:
    assert cache.ssm_layers() == []
    for method in (cache.compute_ssm_state, cache.compute_ssm_effective_attention):
        for layer, error in ((None, RuntimeError), (1, TypeError), (LAYERS, IndexError)):
            with pytest.raises(error):
                method(layer)


def test_nothing_is_logged_by_ordinary_use(cache: ActivationCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    cache.get_full_resid_decomposition(apply_ln=True)
    assert caplog.text == ""
