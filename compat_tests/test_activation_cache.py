"""Does every method of the cache give TransformerLens 3.9.0's numbers, labels and shapes on the same activations?

The cache asks its model only for weights and sizes, so both caches are given one model, a small random one of
TransformerLens itself. Weights, gains and biases are all random: a part that is left out or counted twice shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import pytest
import torch
from transformer_lens import ActivationCache as TheirCache
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.utilities import Slice as TheirSlice

from lensbridge.activation_cache import ActivationCache
from lensbridge.utilities.slice import Slice

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

BATCH, POS, N_LAYERS, D_MODEL, D_MLP = 3, 5, 2, 12, 10

FAMILIES: dict[str, dict[str, Any]] = {
    "layer_norm": {},
    "folded": {"normalization_type": "LNPre"},
    "rms_gated_rotary": {"normalization_type": "RMS", "gated_mlp": True, "positional_embedding_type": "rotary"},
    "rms_folded": {"normalization_type": "RMSPre"},
    "no_norm": {"normalization_type": None},
    "attn_only": {"attn_only": True, "act_fn": None},
    "parallel": {"parallel_attn_mlp": True, "positional_embedding_type": "rotary"},
    "with_results": {"use_attn_result": True},
    "grouped_heads": {"n_key_value_heads": 1},
    "solu_final_rms": {"act_fn": "solu_ln", "final_rms": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
}
LAYERS = [None, 0, 1, N_LAYERS]
POSITIONS = [None, -1, (1, 4), [0, 2]]


def build(family: str) -> HookedTransformer:
    fields = {
        "n_layers": N_LAYERS, "d_model": D_MODEL, "d_head": 4, "n_heads": 3, "d_mlp": D_MLP, "n_ctx": 8,
        "d_vocab": 17, "act_fn": "gelu", "device": "cpu", "seed": 1, **FAMILIES[family],
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**fields))
    generator = torch.Generator().manual_seed(len(family))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(".w"):  # a norm's gain
            parameter.add_(1.0)
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    return build(request.param)


class Twins:
    """The same activations in both caches, and one call on both."""

    def __init__(self, model: HookedTransformer, batch: int = BATCH, has_batch_dim: bool = True) -> None:
        tokens = torch.randint(0, 17, (batch, POS), generator=torch.Generator().manual_seed(5))
        _, stored = model.run_with_cache(tokens, return_cache_object=False)
        self.ours = ActivationCache(dict(stored), model)  # type: ignore[arg-type]
        self.theirs = TheirCache(dict(stored), model)
        if not has_batch_dim:
            self.ours.remove_batch_dim()
            self.theirs.remove_batch_dim()

    def agree(self, call: Callable[[Any], Any]) -> None:
        same(call(self.ours), call(self.theirs))


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, tuple):
        assert ours[1] == theirs[1]
        ours, theirs = ours[0], theirs[0]
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if theirs.numel():
        # float32: sums are taken in another order, no more.
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@pytest.fixture(scope="module", params=[True, False], ids=["batch", "no_batch"])
def twins(request: pytest.FixtureRequest, model: HookedTransformer) -> Twins:
    return Twins(model, BATCH if request.param else 1, request.param)


def norm_is_cached(twins: Twins, layer: int | None, mlp_input: bool = False) -> bool:
    """Parallel blocks have no second norm, models without norms no scale at all."""
    if layer in (None, N_LAYERS):
        return True
    name = f"blocks.{layer}.ln{2 if mlp_input else 1}.hook_scale"
    return name in twins.ours.cache_dict or twins.ours.model.cfg.normalization_type is None


def has_mid(twins: Twins) -> bool:
    return "blocks.0.hook_resid_mid" in twins.ours.cache_dict


def test_every_way_to_say_the_end_and_every_kind_of_slice() -> None:
    twins = Twins(build("layer_norm"))
    for layer in (None, -1, N_LAYERS):
        for pos in (None, 2, -1, (1, 4), (3,), (0, 5, 2), slice(1, 3), [0, 2], torch.tensor([1, 3])):
            for method in ("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results",
                           "get_full_resid_decomposition"):  # fmt: skip
                twins.agree(methodcaller(method, layer=layer, pos_slice=pos, apply_ln=True, return_labels=True))


def test_accumulated_resid(twins: Twins) -> None:
    for kwargs in grid(layer=LAYERS, incl_mid=[False, True], apply_ln=[False, True], mlp_input=[False, True],
                       pos_slice=POSITIONS, return_labels=[True]):  # fmt: skip
        needs_mid = kwargs["incl_mid"] or kwargs["mlp_input"]
        norm_there = not kwargs["apply_ln"] or norm_is_cached(twins, kwargs["layer"], kwargs["mlp_input"])
        if norm_there and (has_mid(twins) or not needs_mid):
            twins.agree(methodcaller("accumulated_resid", **kwargs))


def test_decompose_resid(twins: Twins) -> None:
    for kwargs in grid(layer=LAYERS, mode=["all", "mlp", "attn"], apply_ln=[False, True], mlp_input=[False, True],
                       incl_embeds=[True, False], pos_slice=POSITIONS, return_labels=[True]):  # fmt: skip
        layer, mode = kwargs["layer"], kwargs["mode"]
        is_end = layer in (None, N_LAYERS)
        if (kwargs["mlp_input"] and is_end and mode != "mlp") or (
            kwargs["apply_ln"] and not norm_is_cached(twins, layer, kwargs["mlp_input"])
        ):
            continue
        nothing_before = layer == 0 or (mode == "mlp" and twins.ours.model.cfg.attn_only)
        if not kwargs["incl_embeds"] and nothing_before and not (kwargs["mlp_input"] and mode != "mlp"):
            continue
        twins.agree(methodcaller("decompose_resid", **kwargs))


def test_stack_head_results(twins: Twins) -> None:
    for kwargs in grid(layer=LAYERS, incl_remainder=[False, True], apply_ln=[False, True], pos_slice=POSITIONS,
                       return_labels=[True]):  # fmt: skip
        if kwargs["layer"] != 0 or not kwargs["incl_remainder"]:  # see test_the_rest_of_the_stream_before_layer_0
            twins.agree(methodcaller("stack_head_results", **kwargs))


def test_head_results_stay_in_the_cache(model: HookedTransformer) -> None:
    twins = Twins(model)
    twins.agree(methodcaller("stack_head_results", layer=1))
    assert list(twins.ours.keys()) == list(twins.theirs.keys())
    for at in range(N_LAYERS):
        same(twins.ours["result", at], twins.theirs["result", at])


def test_stack_activation(twins: Twins) -> None:
    for layer in (None, -1, 1, N_LAYERS):
        twins.agree(methodcaller("stack_activation", "z", layer))
        twins.agree(methodcaller("stack_activation", "attn_out", layer))
    if twins.ours.model.cfg.normalization_type is not None:
        twins.agree(methodcaller("stack_activation", "normalized", sublayer_type="ln1"))


def projections() -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(9)
    return [None, torch.randn(D_MODEL, generator=generator), torch.randn(D_MODEL, 3, generator=generator)]


def test_get_neuron_results(twins: Twins) -> None:
    if twins.ours.model.cfg.attn_only:
        pytest.raises(KeyError, twins.ours.get_neuron_results, 0)
        return
    for kwargs in grid(layer=[0, 1, -1], neuron_slice=[None, (2, 7), [1, 4, 9], torch.tensor([3])],
                       pos_slice=POSITIONS, project_output_onto=projections()):  # fmt: skip
        twins.agree(methodcaller("get_neuron_results", **kwargs))
    for pos in POSITIONS:
        twins.agree(methodcaller("get_neuron_results", 1, 4, pos))


def test_stack_neuron_results(twins: Twins) -> None:
    if twins.ours.model.cfg.attn_only:
        pytest.raises(KeyError, twins.ours.stack_neuron_results, 1)
        return
    unnormed = twins.ours.model.cfg.normalization_type is None
    for kwargs in grid(layer=LAYERS, neuron_slice=[None, (2, 7), [1, 4, 9]], pos_slice=POSITIONS,
                       incl_remainder=[False, True], apply_ln=[False, True], project_output_onto=projections(),
                       return_labels=[True]):  # fmt: skip
        projected = kwargs["project_output_onto"] is not None
        if kwargs["layer"] == 0 and (kwargs["incl_remainder"] or (projected and kwargs["apply_ln"])):
            continue
        if unnormed and projected and kwargs["apply_ln"]:
            continue  # a KeyError there, although a model without norms passes everything on unchanged
        twins.agree(methodcaller("stack_neuron_results", **kwargs))


def test_get_full_resid_decomposition(twins: Twins) -> None:
    attn_only = twins.ours.model.cfg.attn_only
    unnormed = twins.ours.model.cfg.normalization_type is None
    for kwargs in grid(layer=LAYERS, mlp_input=[False, True], expand_neurons=[True, False], apply_ln=[False, True],
                       pos_slice=POSITIONS, project_output_onto=projections(), return_labels=[True]):  # fmt: skip
        is_end = kwargs["layer"] in (None, N_LAYERS)
        if kwargs["mlp_input"] and is_end:
            continue
        if kwargs["apply_ln"] and not norm_is_cached(twins, kwargs["layer"], kwargs["mlp_input"]):
            continue
        if kwargs["expand_neurons"]:
            folded = kwargs["apply_ln"] and kwargs["project_output_onto"] is not None
            if attn_only or (folded and (unnormed or kwargs["mlp_input"])):
                continue  # see the tests of what differs, below
        twins.agree(methodcaller("get_full_resid_decomposition", **kwargs))


def test_apply_ln_to_stack(twins: Twins) -> None:
    stack = twins.ours.decompose_resid()
    batched = twins.ours.has_batch_dim
    for kwargs in grid(layer=LAYERS, mlp_input=[False, True], recompute_ln=[False, True], pos_slice=POSITIONS,
                       batch_slice=[None, 1, (0, 2), [0, 2]] if batched else [None]):  # fmt: skip
        if not norm_is_cached(twins, kwargs["layer"], kwargs["mlp_input"]):
            continue
        sliced = Slice(kwargs["pos_slice"]).apply(stack, dim=-2)
        twins.agree(methodcaller("apply_ln_to_stack", sliced, has_batch_dim=batched, **kwargs))
        if batched and not kwargs["recompute_ln"]:
            # A stack whose batch was sliced by the caller.
            sliced = Slice(kwargs["batch_slice"]).apply(sliced, dim=1)
            twins.agree(methodcaller("apply_ln_to_stack", sliced, has_batch_dim=False, **kwargs))


@pytest.mark.parametrize(
    ("tokens", "incorrect"),
    [
        (3, None),
        (3, 5),
        (torch.tensor(4), torch.tensor(5)),
        (torch.tensor([4]), torch.tensor([2])),
        (torch.arange(POS), torch.arange(POS) + 2),
        (torch.arange(BATCH * POS).view(BATCH, POS) % 17, None),
        (torch.arange(BATCH * POS).view(BATCH, POS) % 17, torch.arange(BATCH * POS).view(BATCH, POS) % 11),
    ],
)
def test_logit_attrs(twins: Twins, tokens: Any, incorrect: Any) -> None:
    if not twins.ours.has_batch_dim and isinstance(tokens, torch.Tensor) and tokens.ndim == 2:
        tokens, incorrect = tokens[0], None if incorrect is None else incorrect[0]
    twins.agree(lambda cache: cache.logit_attrs(cache.decompose_resid(), tokens, incorrect))


def test_logit_attrs_of_some_positions_and_inputs(twins: Twins) -> None:
    for kwargs in grid(pos_slice=[2, -1, (1, 4), [0, 3]],
                       batch_slice=[None, 1, (1, 3), [2, 0]] if twins.ours.has_batch_dim else [None]):  # fmt: skip
        stack = twins.ours.stack_head_results(pos_slice=kwargs["pos_slice"])
        twins.agree(methodcaller("logit_attrs", stack, 3, 4, **kwargs))


def test_slice_objects_are_taken_as_they_are(twins: Twins) -> None:
    for method in ("decompose_resid", "stack_head_results", "accumulated_resid"):
        ours = getattr(twins.ours, method)(pos_slice=Slice([0, 2]), apply_ln=True)
        same(ours, getattr(twins.theirs, method)(pos_slice=TheirSlice([0, 2]), apply_ln=True))


def test_logit_attrs_refuses_what_is_refused_there(twins: Twins) -> None:
    for tokens, incorrect in ([[1, 2], None], [3, torch.tensor([4])], [torch.arange(5), torch.arange(4)]):
        for cache in (twins.ours, twins.theirs):
            with pytest.raises(ValueError):
                cache.logit_attrs(cache.decompose_resid(), tokens, incorrect)


def test_batch_slices(model: HookedTransformer) -> None:
    for batch_slice in (None, 1, -1, (0, 2), [2, 1]):
        twins = Twins(model)
        ours, theirs = (cache.apply_slice_to_batch_dim(batch_slice) for cache in (twins.ours, twins.theirs))
        assert ours.has_batch_dim == theirs.has_batch_dim
        assert list(ours.keys()) == list(theirs.keys())
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        same(ours.accumulated_resid(apply_ln=True), theirs.accumulated_resid(apply_ln=True))


def test_removing_the_batch_dimension(model: HookedTransformer) -> None:
    twins = Twins(model, batch=1)
    assert twins.ours.remove_batch_dim() is twins.ours
    twins.theirs.remove_batch_dim()
    assert all(torch.equal(value, twins.theirs[name]) for name, value in twins.ours.items())
    for cache in (Twins(model).ours, Twins(model).theirs):
        with pytest.raises(AssertionError):
            cache.remove_batch_dim()
    for cache in (twins.ours, twins.theirs):
        with pytest.raises(AssertionError):
            cache.apply_slice_to_batch_dim(0)


KEYS: list[Any] = [
    "blocks.0.attn.hook_q", "q0", "attn1", "pre1", "mlp_post0", "scale1ln1", "normalized0ln1", "scale", "embed",
    "hook_embed", ("q", 1), ("q", -1), ("resid_pre", -2), ("scale", 1, "ln1"), ("scale", None), ("attn_out", 0, "b"),
    "q7", "resid_post0", "nonsense", ("q", 7), ("q", -9), ("resid_pre", 0, "attn"), ("q",),
]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["batch", "no_batch"])
def plain_twins(request: pytest.FixtureRequest) -> Twins:
    return Twins(build("layer_norm"), 1, request.param)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_keys_lead_to_the_same_place(plain_twins: Twins, key: Any) -> None:
    twins = plain_twins
    try:
        expected = twins.theirs[key]
    except KeyError:
        with pytest.raises(KeyError):
            twins.ours[key]
    else:
        assert torch.equal(twins.ours[key], expected)


@pytest.mark.parametrize("key", [3, None, ["q", 0], ("q", "0"), ()], ids=str)
def test_keys_of_a_wrong_type(plain_twins: Twins, key: Any) -> None:
    for cache in (plain_twins.ours, plain_twins.theirs):
        with pytest.raises(TypeError):
            cache[key]


def test_the_dictionary_half(model: HookedTransformer) -> None:
    twins = Twins(model)
    ours, theirs = twins.ours, twins.theirs
    assert repr(ours) == repr(theirs)
    assert len(ours) == len(theirs)
    assert list(ours) == list(theirs) == list(ours.keys())
    assert [name for name, _ in ours.items()] == list(ours)
    assert all(value is ours[name] for name, value in zip(ours, ours.values(), strict=True))
    assert ("q0" in ours, "hook_embed" in ours) == ("q0" in theirs, "hook_embed" in theirs) == (False, True)
    assert (ours.has_embed, ours.has_pos_embed) == (theirs.has_embed, theirs.has_pos_embed)


def test_moving(model: HookedTransformer) -> None:
    twins = Twins(model)
    for cache in (twins.ours, twins.theirs):
        before = cache["q0"]
        assert cache.to(torch.device("meta")) is cache
        assert cache["q0"].device.type == "meta"
        assert before.device.type == "cpu"


def test_state_space_methods_of_a_model_that_has_none(twins: Twins) -> None:
    for cache in (twins.ours, twins.theirs):
        assert cache.ssm_layers() == []
        assert cache.ssm_layers(mixer_type=torch.nn.Linear) == []
        for method in (cache.compute_ssm_state, cache.compute_ssm_effective_attention):
            pytest.raises(RuntimeError, method)
            pytest.raises(TypeError, method, layer=0)
            pytest.raises(IndexError, method, layer=N_LAYERS)


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.accumulated_resid(layer=N_LAYERS + 1),
        lambda cache: cache.decompose_resid(layer=N_LAYERS + 1),
        lambda cache: cache.decompose_resid(mlp_input=True),
        lambda cache: cache.stack_head_results(layer=N_LAYERS + 1),
        lambda cache: cache.stack_activation("z", layer=N_LAYERS + 1),
        lambda cache: cache.stack_activation("nonsense"),
        lambda cache: cache.get_full_resid_decomposition(mlp_input=True),
        lambda cache: cache.apply_ln_to_stack(cache.decompose_resid(), layer=N_LAYERS + 1),
        lambda cache: cache.decompose_resid(layer=0, incl_embeds=False),
        lambda cache: cache.stack_activation("z", layer=0),
    ],
)
def test_refusals_have_the_type_raised_there(call: Callable[[Any], Any]) -> None:
    twins = Twins(build("layer_norm"))
    with pytest.raises((KeyError, RuntimeError)) as theirs:
        call(twins.theirs)
    with pytest.raises(theirs.type):
        call(twins.ours)


# What differs from 3.9.0 on purpose: each test shows the other value and why ours is right.


def test_the_rest_of_the_stream_before_layer_0() -> None:
    """Nothing was written before layer 0, so the rest is the embedding; 3.9.0 gives the last layer's output."""
    twins = Twins(build("layer_norm"))
    for method in ("stack_head_results", "stack_neuron_results"):
        ours, theirs = (getattr(cache, method)(layer=0, incl_remainder=True) for cache in (twins.ours, twins.theirs))
        assert torch.equal(ours[0], twins.ours["resid_pre", 0])
        assert torch.equal(theirs[0], twins.ours["resid_post", N_LAYERS - 1])


def test_projected_neurons_at_an_mlp_input_are_read_by_its_norm() -> None:
    """Projecting after the norm commutes with stacking; 3.9.0 divides projected neurons by the other norm's scale."""
    twins, direction = Twins(build("layer_norm")), projections()[1]
    for cache, commutes in ((twins.ours, True), (twins.theirs, False)):
        whole = cache.get_full_resid_decomposition(1, mlp_input=True, apply_ln=True)
        projected = cache.get_full_resid_decomposition(1, mlp_input=True, apply_ln=True, project_output_onto=direction)
        assert torch.allclose(whole @ direction, projected, atol=1e-5) == commutes


def test_one_neuron_per_layer() -> None:
    """3.9.0 fails on an int; here it is one neuron of each layer, as the list of one."""
    twins = Twins(build("layer_norm"))
    stack, labels = twins.ours.stack_neuron_results(-1, neuron_slice=-1, return_labels=True)
    same((stack, labels), twins.theirs.stack_neuron_results(-1, neuron_slice=[-1], return_labels=True))
    pytest.raises(TypeError, twins.theirs.stack_neuron_results, -1, neuron_slice=-1)


def test_one_neuron_projected_on_one_direction_is_one_number() -> None:
    """3.9.0 leaves an axis of length one behind, and mixes up axes for a matrix of directions."""
    twins = Twins(build("layer_norm"))
    _, vector, matrix = projections()
    ours = twins.ours.get_neuron_results(0, neuron_slice=3, project_output_onto=vector)
    same(ours[..., None], twins.theirs.get_neuron_results(0, neuron_slice=3, project_output_onto=vector))
    several = twins.ours.get_neuron_results(0, neuron_slice=3, project_output_onto=matrix)
    same(several, twins.theirs.get_neuron_results(0, neuron_slice=[3], project_output_onto=matrix).squeeze(-2))


def test_attention_only_models_decompose_fully() -> None:
    """Without MLPs there are no MLP biases to count; 3.9.0 looks for them unless expand_neurons is False."""
    twins = Twins(build("attn_only"))
    ours = twins.ours.get_full_resid_decomposition(return_labels=True)
    same(ours, twins.theirs.get_full_resid_decomposition(expand_neurons=False, return_labels=True))
    pytest.raises(AttributeError, twins.theirs.get_full_resid_decomposition)


def test_models_without_norms_project_too() -> None:
    twins, direction = Twins(build("no_norm")), projections()[1]
    normed = twins.ours.stack_neuron_results(-1, apply_ln=True, project_output_onto=direction)
    same(normed, twins.theirs.stack_neuron_results(-1, project_output_onto=direction))
    pytest.raises(KeyError, twins.theirs.stack_neuron_results, -1, apply_ln=True, project_output_onto=direction)


def test_head_results_that_are_cached_are_never_replaced() -> None:
    """After remove_batch_dim 3.9.0 takes cached head results for stale ones and recomputes them, hook edits lost."""
    model = build("with_results")
    twins = Twins(model, batch=1, has_batch_dim=False)
    for cache in (twins.ours, twins.theirs):
        cache["result", 0].mul_(2.0)
    edited = twins.ours["result", 0].clone()
    for cache, kept in ((twins.ours, True), (twins.theirs, False)):
        cache.stack_head_results()
        assert torch.allclose(cache["result", 0], edited) == kept


def test_split_inputs_that_are_equal_have_one_scale() -> None:
    """With one input per head the first norm's scale has a head axis, on which 3.9.0 cannot broadcast."""
    model = build("layer_norm")
    plain = Twins(model).ours.decompose_resid(layer=1, apply_ln=True)
    model.set_use_split_qkv_input(True)
    split = Twins(model)
    same(split.ours.decompose_resid(layer=1, apply_ln=True), plain)
    pytest.raises(RuntimeError, split.theirs.decompose_resid, layer=1, apply_ln=True)
