"""Is every weight, stacked or per block, raw or processed, the tensor that 3.9.0 would hold?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from compat_tests.comparison import close, outcome, same_outcome, weights_close
from compat_tests.conftest import Pairs
from compat_tests.rough_models import PROCESSING_FLAGS, PROCESSINGS, SHAPES, rough_gpt2
from compat_tests.test_points import COMBINATIONS, combination_id

STACKED = ("W_E", "W_pos", "W_E_pos", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
STACKED += ("W_in", "W_out", "b_in", "b_out")
IN_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
IN_MLP = ("W_in", "W_out", "b_in", "b_out")


def named_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every weight by every name it can be reached by."""
    weights = {name: getattr(model, name) for name in STACKED}
    weights |= {"embed.W_E": model.embed.W_E, "pos_embed.W_pos": model.pos_embed.W_pos}
    weights |= {"unembed.W_U": model.unembed.W_U, "unembed.b_U": model.unembed.b_U}
    for layer, block in enumerate(model.blocks):
        weights |= {f"blocks.{layer}.attn.{name}": getattr(block.attn, name) for name in IN_ATTENTION}
        weights |= {f"blocks.{layer}.mlp.{name}": getattr(block.mlp, name) for name in IN_MLP}
        for name, matrix in (("attn.QK", block.attn.QK), ("attn.OV", block.attn.OV)):
            weights |= {f"blocks.{layer}.{name}.A": matrix.A, f"blocks.{layer}.{name}.B": matrix.B}
            weights[f"blocks.{layer}.{name}"] = matrix.AB
    weights |= {"QK": model.QK.AB, "OV": model.OV.AB, "QK singular values": model.QK.S, "OV norm": model.OV.norm()}
    return weights


def norm_weights(model: Any) -> dict[str, torch.Tensor]:
    modules = {"ln_final": model.ln_final}
    for layer, block in enumerate(model.blocks):
        modules |= {f"blocks.{layer}.ln1": block.ln1, f"blocks.{layer}.ln2": block.ln2}
    return {f"{name}.{part}": getattr(module, part) for name, module in modules.items() for part in ("w", "b")}


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    """The state dict without the constant mask buffers that 3.9.0 keeps in its attention modules."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith(("attn.mask", "IGNORE"))}


@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_id)
def test_every_weight_for_every_combination(pairs: Pairs, combination: tuple[tuple[str, bool], ...]) -> None:
    pair = pairs.get("two", combination)
    weights_close(named_weights(pair.ours), named_weights(pair.theirs))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_id)
def test_state_dict(pairs: Pairs, combination: tuple[tuple[str, bool], ...]) -> None:
    pair = pairs.get("two", combination)
    weights_close(parameters_of(pair.ours), parameters_of(pair.theirs))


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "two"])
def test_every_weight_on_other_shapes(pairs: Pairs, shape: str, processing: str) -> None:
    pair = pairs.get(shape, processing)
    weights_close(named_weights(pair.ours), named_weights(pair.theirs))
    weights_close(parameters_of(pair.ours), parameters_of(pair.theirs))


@pytest.mark.parametrize("flag", PROCESSING_FLAGS)
def test_norm_weights_exist_unless_folded(pairs: Pairs, flag: str) -> None:
    pair = pairs.get("two", tuple((name, name == flag) for name in PROCESSING_FLAGS))
    if flag == "fold_ln":
        for model in pair.both:
            for module in (model.ln_final, model.blocks[0].ln1, model.blocks[1].ln2):
                assert not hasattr(module, "w")
                assert not hasattr(module, "b")
    else:
        weights_close(norm_weights(pair.ours), norm_weights(pair.theirs))


def test_w_gate_is_none_without_a_gate(model: Any) -> None:
    assert model.W_gate is None


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_accumulated_bias(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("three", processing)
    for layer, mlp_input, with_mlp in itertools.product(range(5), (False, True), (False, True)):
        arguments = {"layer": layer, "mlp_input": mlp_input, "include_mlp_biases": with_mlp}
        mine, theirs = (outcome(lambda m=model, a=arguments: m.accumulated_bias(**a)) for model in pair.both)
        same_outcome("accumulated_bias", mine, theirs)


@pytest.mark.parametrize("mode", ["Q", "K", "V", "other"])
def test_all_composition_scores(pairs: Pairs, mode: str) -> None:
    pair = pairs.get("three")
    mine, theirs = (outcome(lambda m=model: m.all_composition_scores(mode)) for model in pair.both)
    same_outcome("all_composition_scores", mine, theirs)


def test_all_head_labels(pairs: Pairs) -> None:
    pair = pairs.get("three")
    assert pair.ours.all_head_labels() == pair.theirs.all_head_labels()


def test_parameters_require_gradients(model: Any) -> None:
    parameters = list(model.parameters())
    assert parameters
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.ours_only
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_weights_follow_the_huggingface_parameters(pairs: Pairs, processing: str) -> None:
    """A view is read from the parameter at the time of asking, so training the HF model shows in it."""
    pair = pairs.get("two", processing)
    weight = pair.hf.transformer.h[1].mlp.c_fc.weight
    before = pair.ours.W_in[1].clone()
    with torch.no_grad():
        weight.mul_(2)
    doubled = pair.ours.W_in[1].clone()
    with torch.no_grad():
        weight.div_(2)
    torch.testing.assert_close(doubled, 2 * before)


EDITS = {
    "W_O": lambda model: model.blocks[1].attn.W_O.data[2],
    "W_Q": lambda model: model.blocks[0].attn.W_Q.data[1],
    "W_V": lambda model: model.blocks[0].attn.W_V.data[3, :4],
    "b_Q": lambda model: model.blocks[1].attn.b_Q.data[0],
    "b_O": lambda model: model.blocks[1].attn.b_O.data,
    "W_in": lambda model: model.blocks[0].mlp.W_in.data[:, 5:9],
    "b_out": lambda model: model.blocks[1].mlp.b_out.data[3:],
    "W_E": lambda model: model.embed.W_E.data[7:40],
    "W_pos": lambda model: model.pos_embed.W_pos.data[2],
    "W_U": lambda model: model.unembed.W_U.data[:, 9],
    "ln2.w": lambda model: model.blocks[0].ln2.w.data,
    "model.W_E": lambda model: model.W_E.data[11:],
}


@pytest.mark.parametrize("name", EDITS)
def test_unprocessed_weights_can_be_edited_in_place(pairs: Pairs, name: str) -> None:
    """``model.blocks[1].attn.W_O.data[2] = 0`` ablates a head, as it does in 3.9.0."""
    pair = pairs.get("two", "raw")
    untouched = pair.ours(pair.tokens()).detach()
    edited, restored = [], []
    for model in pair.both:
        target = EDITS[name](model)
        before = target.clone()
        target.zero_()
        edited.append(model(pair.tokens()).detach())
        target.copy_(before)
        restored.append(model(pair.tokens()).detach())
    close("edited logits", edited[0], edited[1])
    assert (edited[0] - untouched).abs().max() > 1e-3
    assert torch.equal(restored[0], untouched)


@pytest.mark.ours_only
@pytest.mark.parametrize("name", [name for name in EDITS if name != "ln2.w"])
def test_an_edit_of_a_derived_weight_raises(pairs: Pairs, name: str) -> None:
    """3.9.0 stores the processed weight; here it is computed, so a write cannot reach the model and must not pass."""
    model = pairs.get("two", "default").ours
    with pytest.raises(RuntimeError):
        EDITS[name](model).zero_()


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_a_copy_of_a_weight_is_an_ordinary_tensor(pairs: Pairs, processing: str) -> None:
    for model in pairs.get("two", processing).both:
        for copy in (model.blocks[0].attn.W_O.detach().clone(), model.W_O.clone(), model.W_U.detach() * 1):
            copy[0] = 0
            assert (copy[0] == 0).all()
            assert type(copy) is torch.Tensor


@pytest.mark.ours_only
def test_unprocessed_weights_share_memory_with_huggingface(pairs: Pairs) -> None:
    model = pairs.get("two", "raw").ours
    block = model.hf_model.transformer.h[1]
    for view, parameter in [
        (model.blocks[1].attn.W_Q, block.attn.c_attn.weight),
        (model.blocks[1].attn.W_O, block.attn.c_proj.weight),
        (model.blocks[1].attn.b_V, block.attn.c_attn.bias),
        (model.blocks[1].mlp.W_out, block.mlp.c_proj.weight),
        (model.W_E, model.hf_model.transformer.wte.weight),
        (model.W_U, model.hf_model.lm_head.weight),
    ]:
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def test_the_reference_leaves_the_huggingface_weights_alone(pairs: Pairs) -> None:
    """Both models of a pair are built on one HF object, so processing must not have written into it."""
    for processing in PROCESSINGS:
        pair = pairs.get("two", processing)
        fresh = rough_gpt2(pair.shape).state_dict()
        now = pair.hf.state_dict()
        assert fresh.keys() == now.keys()
        assert all(torch.equal(now[name], value) for name, value in fresh.items())
