"""Are weights views of the HuggingFace parameters: shared where they can be, right and guarded where derived?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookedTransformer
from lensbridge.errors import ReadOnlyWeightError, UnknownPointError
from lensbridge.processing import Processing
from lensbridge.readonly import ReadOnlyTensor
from lensbridge.shared import SharedWeight
from lensbridge.tiny import tiny_family
from lensbridge.weights import _PROCESSORS, _process

DEFAULT = Processing(True, True, True, True, False)
REFACTORED = Processing(True, True, True, True, True)


def every(lens: Any) -> dict[str, Tensor]:
    weights = lens.interior.weights
    return {name: weights.get(name) for name in weights.names()}


def afresh(lens: Any) -> dict[str, Tensor]:
    """Every weight, computed now from the parameters by the processing functions alone."""
    weights = lens.interior.weights
    out = {}
    for name in weights.names():
        branch, layer, short = weights._locate(name)
        out[name] = _process(_PROCESSORS[branch], weights.raw_branch(branch, layer), weights.processing)[short]
    return out


def assert_up_to_date(lens: Any) -> None:
    shown, expected = every(lens), afresh(lens)
    for name, weight in expected.items():
        assert torch.allclose(shown[name], weight, atol=1e-5), name


# --- names and shapes ------------------------------------------------------------------------------------------------

SHAPES = {
    "embed.W_E": (290, 20), "pos_embed.W_pos": (24, 20), "blocks.1.ln1.w": (20,), "blocks.1.ln2.b": (20,),
    "blocks.1.attn.W_Q": (4, 20, 5), "blocks.1.attn.W_O": (4, 5, 20), "blocks.1.attn.b_V": (4, 5),
    "blocks.1.attn.b_O": (20,), "blocks.1.mlp.W_in": (20, 80), "blocks.1.mlp.b_in": (80,),
    "blocks.1.mlp.W_out": (80, 20), "ln_final.w": (20,), "unembed.W_U": (20, 290), "unembed.b_U": (290,),
}  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_shapes(raw: Any, name: str, shape: tuple[int, ...]) -> None:
    assert raw.interior.weights.get(name).shape == raw.interior.weights.shape(name) == shape


def test_norms_have_weights_of_their_own_unless_folded(hf: Any, raw: Any, lens: Any) -> None:
    names, folded = raw.interior.weights.names(), lens.interior.weights.names()
    gone = [name for name in names if ".ln" in name or name.startswith("ln_final")]
    assert [name for name in names if name not in gone] == folded and len(gone) == 4 * 2 + 2
    for name in gone:
        with pytest.raises(UnknownPointError, match="folded into the weights that read it"):
            lens.interior.weights.get(name)
    assert not hasattr(lens.blocks[0].ln1, "w") and hasattr(raw.blocks[0].ln1, "w")
    with pytest.raises(AttributeError, match="fold_ln"):
        _ = lens.ln_final.b


@pytest.mark.parametrize(
    "wrong", ["embed.W_X", "blocks.9.attn.W_Q", "blocks.0.attn.W_in", "blocks.0.mlp.W_Q", "W_E", "blocks.0.ln1.x", ""]
)
def test_an_unknown_weight_is_an_error(raw: Any, wrong: str) -> None:
    with pytest.raises(UnknownPointError, match="has no weight"):
        raw.interior.weights.get(wrong)


def test_near_misses_are_named(raw: Any) -> None:
    with pytest.raises(KeyError, match="Closest: blocks.0.attn.W_Q"):
        raw.interior.weights.get("blocks.0.attn.W_Qu")


# --- shared with the HF model ----------------------------------------------------------------------------------------


def test_unprocessed_weights_are_the_parameters_memory(hf: Any, raw: Any) -> None:
    by_memory = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    for name, weight in every(raw).items():
        if name != "unembed.b_U":
            assert weight.untyped_storage().data_ptr() in by_memory, name
    layer = hf.transformer.h[1]
    fused = layer.attn.c_attn.weight.detach()
    for index, letter in enumerate("QKV"):
        ours = raw.interior.weights.get(f"blocks.1.attn.W_{letter}")
        assert torch.equal(ours[2], fused[:, 20 * index + 10 : 20 * index + 15])
        bias = layer.attn.c_attn.bias[20 * index : 20 * index + 20].reshape(4, 5)
        assert torch.equal(raw.interior.weights.get(f"blocks.1.attn.b_{letter}"), bias)
    assert torch.equal(raw.blocks[1].attn.W_O[2], layer.attn.c_proj.weight[10:15])
    assert raw.W_E is hf.transformer.wte.weight and raw.blocks[1].mlp.b_out is layer.mlp.c_proj.bias
    assert torch.equal(raw.W_U, hf.lm_head.weight.T)


EDITS: dict[str, Callable[[Any], None]] = {
    "data[i] =": lambda m: m.blocks[0].attn.W_O.data.__setitem__(1, 0.0),
    "data =": lambda m: setattr(m.blocks[0].attn.W_Q, "data", torch.zeros(4, 20, 5)),
    "data = on a whole parameter": lambda m: setattr(m.W_E, "data", torch.zeros(290, 20)),
    "data.mul_": lambda m: m.W_U.data.mul_(2),
    "set the attribute": lambda m: setattr(m.blocks[0].mlp, "W_in", torch.zeros(20, 80)),
    "set a Parameter": lambda m: setattr(m.blocks[0].attn, "b_V", nn.Parameter(torch.ones(4, 5))),
    "set a norm": lambda m: setattr(m.ln_final, "w", torch.zeros(20)),
    "no_grad in place": lambda m: torch.no_grad()(lambda: m.blocks[1].attn.W_V.mul_(3))(),
    "no_grad item": lambda m: torch.no_grad()(lambda: m.W_pos.__setitem__(3, 0.0))(),
    "copy_ into a slice": lambda m: torch.no_grad()(lambda: m.blocks[1].attn.W_K[2].copy_(torch.ones(20, 5)))(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edit_of_an_unprocessed_weight_edits_the_hf_model(
    hf: Any, raw: Any, lens: Any, tokens: Tensor, edit: Callable
) -> None:
    before, shown = hf(tokens).logits, every(lens)
    edit(raw)
    after = hf(tokens).logits
    assert not torch.allclose(before, after)
    assert torch.equal(raw(tokens), after)
    # Another lens on the same HF model follows, although it keeps processed weights.
    assert any(not torch.equal(shown[name], weight) for name, weight in every(lens).items())
    assert_up_to_date(lens)


def test_assigning_data_through_a_view_keeps_the_other_parts(hf: Any, raw: Any) -> None:
    before = hf.transformer.h[0].attn.c_attn.weight.detach().clone()
    raw.blocks[0].attn.W_K.data = torch.full((4, 20, 5), 7.0)
    after = hf.transformer.h[0].attn.c_attn.weight
    assert bool((after[:, 20:40] == 7).all())
    assert torch.equal(after[:, :20], before[:, :20]) and torch.equal(after[:, 40:], before[:, 40:])
    with pytest.raises(ValueError, match="has shape"):
        raw.blocks[0].attn.W_K.data = torch.zeros(20, 5)


def test_a_shared_weight_is_an_ordinary_tensor_otherwise(raw: Any) -> None:
    weight = raw.blocks[0].attn.W_O
    assert type(weight) is SharedWeight and type(weight.detach()) is SharedWeight
    for computed in (weight + 1, weight[0], weight.data, weight.clone(), weight.sum(), torch.stack([weight])):
        assert type(computed) is Tensor
    twin = copy.deepcopy(weight)
    twin.zero_()
    assert type(twin) is Tensor and weight.abs().sum() > 0
    parameter = nn.Parameter(weight)
    assert parameter.requires_grad and parameter.data_ptr() == weight.data_ptr()


def test_setting_refuses_what_cannot_be_stored(hf: Any, raw: Any) -> None:
    before = {name: parameter.clone() for name, parameter in hf.named_parameters()}
    with pytest.raises(ValueError, match=r"'blocks.0.attn.W_Q' has shape \(4, 20, 5\), got \(4, 5, 20\)"):
        raw.blocks[0].attn.W_Q = torch.zeros(4, 5, 20)
    with pytest.raises(TypeError, match="not to a float"):
        raw.blocks[0].attn.W_Q = 3.0
    with pytest.raises(ReadOnlyWeightError, match="GPT2LMHeadModel has no such parameter"):
        raw.unembed.b_U = torch.ones(290)
    raw.unembed.b_U = torch.zeros(290)
    assert all(torch.equal(parameter, before[name]) for name, parameter in hf.named_parameters())


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.b_U.zero_(),
        lambda m: m.b_U.data.__setitem__(0, 1.0),
        lambda m: m.W_Q.data.zero_(),
        lambda m: m.W_out[0].__setitem__(0, 1.0),
        lambda m: m.W_E_pos.zero_(),
    ],
    ids=["b_U", "b_U.data", "W_Q", "W_out", "W_E_pos"],
)
def test_copies_refuse_edits_even_without_processing(raw: Any, edit: Callable) -> None:
    with pytest.raises(ReadOnlyWeightError):
        edit(raw)


def test_gradients_are_the_parameters(hf: Any, raw: Any, tokens: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert raw.blocks[0].attn.W_Q.grad is None and raw.W_E.grad is None
        raw(tokens, return_type="loss").backward()
        fused = hf.transformer.h[0].attn.c_attn.weight.grad
        for index, letter in enumerate("QKV"):
            gradient = raw.interior.weights.get(f"blocks.0.attn.W_{letter}").grad
            assert torch.equal(gradient[3], fused[:, 20 * index + 15 : 20 * index + 20])
        assert torch.equal(raw.W_U.grad, hf.lm_head.weight.grad.T) and raw.W_E.grad is hf.transformer.wte.weight.grad
        # A view that is held sees later gradients, and the lack of them.
        held = raw.blocks[0].attn.W_Q
        hf.zero_grad()
        assert held.grad is None and raw.blocks[0].attn.b_Q.grad is None


# --- processed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processing", [DEFAULT, REFACTORED, Processing(center_unembed=True)], ids=str)
def test_processed_weights_are_read_only_and_right(lens: Any, processing: Processing) -> None:
    lens.set_processing(processing)
    assert_up_to_date(lens)
    for name, weight in every(lens).items():
        assert type(weight) is ReadOnlyTensor, name
        for edit in (lambda w=weight: w.zero_(), lambda w=weight: w.data.__setitem__(0, 0.0)):
            with pytest.raises(ReadOnlyWeightError, match=name):
                edit()
        with pytest.raises(ReadOnlyWeightError, match="from_pretrained_no_processing"):
            lens.interior.weights.set(name, torch.zeros_like(weight))
    assert_up_to_date(lens)


def test_setting_an_attribute_of_a_processed_component_is_refused(hf: Any, lens: Any) -> None:
    before = hf.transformer.h[0].mlp.c_fc.weight.clone()
    with pytest.raises(ReadOnlyWeightError):
        lens.blocks[0].mlp.W_in = torch.zeros(20, 80)
    assert torch.equal(hf.transformer.h[0].mlp.c_fc.weight, before)


UPDATES: dict[str, Callable[[nn.Module], None]] = {
    "in place": lambda hf: torch.no_grad()(lambda: [p.mul_(1.5) for p in hf.parameters()])(),
    "data.sub_": lambda hf: [p.data.sub_(0.1 * torch.ones_like(p)) for p in hf.parameters()],
    "data =": lambda hf: [setattr(p, "data", p.data * 1.5) for p in hf.parameters()],
    "load_state_dict": lambda hf: hf.load_state_dict({n: v * 2 for n, v in hf.state_dict().items()}),
    "one element": lambda hf: hf.transformer.h[0].mlp.c_fc.weight.data[3, 4].add_(1.0),
    "two rows exchanged": lambda hf: hf.transformer.wte.weight.data.__setitem__(
        [3, 4], hf.transformer.wte.weight.data[[4, 3]]
    ),
    "new parameter": lambda hf: setattr(hf.transformer.h[0].mlp.c_proj, "weight", nn.Parameter(torch.ones(80, 20))),
    "other dtype": lambda hf: hf.double(),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_processed_weights_follow_the_parameters(hf: Any, lens: Any, update: Callable) -> None:
    before = every(lens)
    update(hf)
    after = every(lens)
    assert any(before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name]) for name in after)
    assert_up_to_date(lens)


def test_an_optimizer_step_is_followed(hf: Any, lens: Any, tokens: Tensor) -> None:
    before = lens.W_U
    optimizer = torch.optim.Adam(lens.parameters(), lr=1e-2)
    loss = lens(tokens, return_type="loss")
    loss.backward()
    optimizer.step()
    assert not torch.equal(lens.W_U, before)
    assert_up_to_date(lens)


@pytest.mark.parametrize("shape", [(768, 768), (768, 2304), (1024, 300)])
def test_an_edit_of_a_large_parameter_is_noticed_in_any_row_and_column(shape: tuple[int, int]) -> None:
    from lensbridge.weights import fingerprint

    parameter = nn.Parameter(torch.randn(shape))
    known = fingerprint(parameter)
    assert fingerprint(parameter) == known
    for axis in (0, 1):
        for index in range(0, shape[axis], 13):
            line = parameter.data.select(axis, index)
            before = line.clone()
            line.zero_()
            assert fingerprint(parameter) != known, (axis, index)
            line.copy_(before)
    assert fingerprint(parameter) == known


def test_unchanged_weights_are_computed_once(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import lensbridge.weights as module

    calls: list[Any] = []
    genuine = module._process
    monkeypatch.setattr(module, "_process", lambda *args: calls.append(args) or genuine(*args))
    for _ in range(3):
        every(lens)
        _ = lens.W_U, lens.W_Q, lens.b_U
    # embedding, unembedding, and attention and MLP of two layers
    assert len(calls) == 6


def test_an_edit_that_the_guard_only_notices_does_not_last(lens: Any) -> None:
    before = lens.blocks[0].mlp.W_in.clone()
    with torch.no_grad():
        with pytest.raises(ReadOnlyWeightError):
            torch.nn.functional.silu(lens.blocks[0].mlp.W_in, inplace=True)
        assert torch.equal(lens.blocks[0].mlp.W_in, before)
        # One that it does not notice at all.
        lens.blocks[0].mlp.W_in.as_subclass(Tensor).zero_()
    assert torch.equal(lens.blocks[0].mlp.W_in, before)


@pytest.mark.parametrize("processing", [DEFAULT, REFACTORED], ids=["default", "refactored"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_through_processed_weights(
    new_hf: Callable, new_lens: Callable, processing: Processing, tied: bool
) -> None:
    hf = new_hf(tie_word_embeddings=tied)
    lens = new_lens(hf)
    lens.set_processing(processing)
    parameters = dict(hf.named_parameters())
    expected_of = afresh(lens)
    for name, weight in every(lens).items():
        cotangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad((weight * cotangent).sum(), parameters.values(), allow_unused=True)
        target = (expected_of[name] * cotangent).sum()
        if not target.requires_grad:
            # A bias that was moved elsewhere is a constant.
            assert all(gradient is None or not gradient.any() for gradient in found), name
            continue
        expected = torch.autograd.grad(target, parameters.values(), allow_unused=True, retain_graph=True)
        for parameter, ours, theirs in zip(parameters, found, expected, strict=True):
            if theirs is None:
                assert ours is None or not ours.any(), (name, parameter)
            else:
                tolerance = 1e-4 * float(theirs.abs().max()) + 1e-7
                assert ours is not None and torch.allclose(ours, theirs, rtol=0, atol=tolerance), (name, parameter)


def test_weights_seen_in_inference_mode_still_carry_gradients_later(lens: Any, tokens: Tensor) -> None:
    lens.set_processing(REFACTORED)
    lens.set_use_attn_result(True)
    with torch.inference_mode():
        assert every(lens)["unembed.W_U"].shape == (20, 290)
        lens.run_with_cache(tokens)
    (lens.W_U.sum() + lens.W_O.sum()).backward()
    assert lens.hf_model.lm_head.weight.grad is not None
    _, cache = lens.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert "blocks.0.attn.hook_result_grad" in cache


def test_weights_without_gradients_on_a_frozen_model(hf: Any, lens: Any) -> None:
    hf.requires_grad_(False)
    assert not any(weight.requires_grad for weight in every(lens).values())
    hf.transformer.h[0].ln_1.weight.requires_grad_()
    assert lens.blocks[0].attn.W_Q.requires_grad and not lens.W_E.requires_grad
    with torch.no_grad():
        assert not lens.blocks[0].attn.W_Q.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_have_the_models_dtype(new_hf: Callable, new_lens: Callable, dtype: torch.dtype) -> None:
    lens = new_lens(new_hf().to(dtype))
    assert {weight.dtype for weight in every(lens).values()} == {dtype}


# --- changing the processing after loading ---------------------------------------------------------------------------


def test_processing_can_be_changed_and_undone(hf: Any, raw: Any, tokens: Tensor) -> None:
    logits, before = raw(tokens), {name: p.clone() for name, p in hf.named_parameters()}
    assert (raw.cfg.normalization_type, raw.cfg.layer_norm_folding) == ("LN", False)
    raw.process_weights_()
    assert raw.processing == DEFAULT and (raw.cfg.normalization_type, raw.cfg.layer_norm_folding) == ("LNPre", True)
    assert torch.allclose(raw(tokens).log_softmax(-1), logits.log_softmax(-1), atol=1e-5)
    assert raw(tokens).mean(-1).abs().max() < 1e-5 and not torch.equal(raw(tokens), logits)
    raw.process_weights_(fold_ln=False, center_unembed=False, refactor_factored_attn_matrices=True)
    assert raw.processing == Processing(False, True, False, True, True)
    raw.set_processing(Processing())
    assert torch.equal(raw(tokens), logits)
    assert all(torch.equal(parameter, before[name]) for name, parameter in hf.named_parameters())


def test_an_edit_made_while_processing_was_off_is_seen_when_it_is_on_again(
    lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a look at the parameters alone would not notice it.
    monkeypatch.setattr("lensbridge.weights._SAMPLE", 1)
    _ = every(lens)
    lens.set_processing(Processing())
    lens.W_E.data[5] = 3.0
    lens.set_processing(DEFAULT)
    assert_up_to_date(lens)


def test_layers_without_attention_have_weights_under_every_processing() -> None:
    model = HookedTransformer.from_pretrained("jamba", hf_model=tiny_family("jamba"), tokenizer=None)
    attending = [layer for layer, block in enumerate(model.interior.architecture.blocks) if block.attn is not None]
    names = [name for name in model.state_dict() if name.endswith("attn.W_O")]
    assert names == [f"blocks.{layer}.attn.W_O" for layer in attending] and len(names) < model.cfg.n_layers


def test_gradients_of_a_weight_reach_no_norm_that_it_does_not_contain() -> None:
    model = HookedTransformer.from_pretrained("qwen3", hf_model=tiny_family("qwen3"), tokenizer=None)
    model.blocks[0].attn.W_Q.sum().backward()
    reached = {name for name, parameter in model.hf_model.named_parameters() if parameter.grad is not None}
    layer = "model.layers.0."
    assert {f"{layer}self_attn.q_proj.weight", f"{layer}input_layernorm.weight"} <= reached
    assert not any("q_norm" in name or "k_norm" in name for name in reached)
    model.blocks[0].attn.q_norm.w.sum().backward()
    assert model.hf_model.get_parameter(f"{layer}self_attn.q_norm.weight").grad is not None
