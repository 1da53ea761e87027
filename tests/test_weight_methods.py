"""Do weight properties, state dicts and initialisation say and store what the HuggingFace parameters are?"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.errors import ReadOnlyWeightError, UnsupportedModelError
from lensbridge.processing import Processing

DEFAULT = Processing(True, True, True, True, False)


def every(lens: Any) -> dict[str, Tensor]:
    weights = lens.interior.weights
    return {name: weights.get(name) for name in weights.names()}


# --- stacks and what is made of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("processed", [False, True])
def test_stacks_hold_every_layer(raw: Any, lens: Any, processed: bool) -> None:
    model = lens if processed else raw
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        stacked = getattr(model, name)
        assert all(torch.equal(stacked[layer], getattr(model.blocks[layer].attn, name)) for layer in range(2))
    for name in ("W_in", "b_in", "W_out", "b_out"):
        stacked = getattr(model, name)
        assert all(torch.equal(stacked[layer], getattr(model.blocks[layer].mlp, name)) for layer in range(2))
    assert torch.equal(model.W_E_pos, torch.cat([model.W_E, model.W_pos]))
    assert torch.equal(model.embed.W_E, model.W_E) and torch.equal(model.unembed.b_U, model.b_U)
    assert model.W_gate is None
    assert torch.allclose(model.OV.AB[1], model.W_V[1] @ model.W_O[1])
    assert torch.allclose(model.QK.AB[1], model.W_Q[1] @ model.W_K[1].mT)
    assert torch.allclose(model.blocks[1].attn.QK.AB, model.QK.AB[1])
    assert torch.allclose(model.blocks[1].attn.OV.AB, model.OV.AB[1])


def test_accumulated_bias(raw: Any) -> None:
    b_O, b_out = raw.b_O, raw.b_out
    assert raw.accumulated_bias(0).abs().sum() == 0
    assert torch.allclose(raw.accumulated_bias(2), b_O.sum(0) + b_out.sum(0))
    assert torch.allclose(raw.accumulated_bias(1, mlp_input=True), b_O.sum(0) + b_out[0])
    assert torch.allclose(raw.accumulated_bias(2, include_mlp_biases=False), b_O.sum(0))
    with pytest.raises(AssertionError, match="no MLP in layer 2"):
        raw.accumulated_bias(2, mlp_input=True)
    with pytest.raises(IndexError, match="2 layers"):
        raw.accumulated_bias(3)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_of_earlier_heads_only(raw: Any, mode: str) -> None:
    scores = raw.all_composition_scores(mode)
    assert scores.shape == (2, 4, 2, 4)
    OV = (raw.W_V @ raw.W_O)[0, 1]
    right = {"Q": (raw.W_Q @ raw.W_K.mT)[1, 2], "K": (raw.W_K @ raw.W_Q.mT)[1, 2], "V": (raw.W_V @ raw.W_O)[1, 2]}[mode]
    assert torch.allclose(scores[0, 1, 1, 2], (OV @ right).norm() / (OV.norm() * right.norm()), atol=1e-5)
    assert not scores[1].any() and not scores[0, :, 0].any()


def test_composition_scores_of_another_mode(raw: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        raw.all_composition_scores("O")


def test_labels_and_size(raw: Any, hf: Any) -> None:
    assert raw.all_head_labels() == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    # TransformerLens counts its own b_U, which GPT-2 does not have.
    assert raw.n_params_total == sum(p.numel() for p in hf.parameters()) + 290


# --- state dicts -----------------------------------------------------------------------------------------------------


def test_a_state_dict_goes_round(new_hf: Callable, new_lens: Callable, raw: Any, tokens: Tensor) -> None:
    other = new_lens(new_hf(seed=5), raw=True)
    expected = other(tokens)
    assert not torch.allclose(raw(tokens), expected)
    result = raw.load_state_dict({name: value.clone() for name, value in other.state_dict().items()})
    assert torch.equal(raw(tokens), expected) and (result.missing_keys, result.unexpected_keys) == ([], [])


def test_a_state_dict_can_be_saved(raw: Any, lens: Any) -> None:
    for model in (raw, lens):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert all(type(value) is Tensor and torch.equal(value, model.state_dict()[n]) for n, value in loaded.items())
        assert not any(value.requires_grad for value in loaded.values())


def test_what_a_state_dict_holds(raw: Any, lens: Any) -> None:
    names = raw.interior.weights.names()
    extra = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("mask", "IGNORE")]
    assert list(raw.state_dict()) == names + extra
    assert set(lens.state_dict()) == set(lens.interior.weights.names()) | set(extra)
    assert list(raw.state_dict(prefix="m.")) == [f"m.{name}" for name in names + extra]
    into: dict[str, Tensor] = {"a": torch.ones(1)}
    assert raw.state_dict(destination=into) is into and "embed.W_E" in into
    assert raw.state_dict(keep_vars=True)["embed.W_E"].requires_grad
    assert not raw.state_dict()["embed.W_E"].requires_grad


def test_a_state_dict_shares_memory_without_processing(hf: Any, raw: Any) -> None:
    raw.state_dict()["blocks.0.attn.W_O"][0] = 0
    assert not hf.transformer.h[0].attn.c_proj.weight[:5].any()


def test_a_state_dict_with_wrong_names_or_shapes_is_refused_whole(hf: Any, raw: Any) -> None:
    before = {name: parameter.clone() for name, parameter in hf.named_parameters()}
    good = {name: value.clone() * 2 for name, value in raw.state_dict().items()}
    less = {name: value for name, value in good.items() if name != "embed.W_E"}
    wrong = good | {"embed.W_E": torch.zeros(3, 3)}
    for given, message in (
        (less, "missing .'embed.W_E'."),
        (good | {"embed.W_X": torch.zeros(1)}, "unexpected .'embed.W_X'."),
        (wrong, r"embed.W_E: \(3, 3\) instead of \(290, 20\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.load_state_dict(given)
    with pytest.raises(RuntimeError, match="instead of"):
        raw.load_state_dict(wrong, strict=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in hf.named_parameters())
    result = raw.load_state_dict(less | {"embed.W_X": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["embed.W_E"], ["embed.W_X"])
    assert torch.equal(hf.transformer.wte.weight, before["transformer.wte.weight"])
    assert torch.equal(hf.transformer.wpe.weight, before["transformer.wpe.weight"] * 2)


def test_a_bias_that_hf_has_no_place_for_is_refused(hf: Any, raw: Any) -> None:
    before = {name: parameter.clone() for name, parameter in hf.named_parameters()}
    given = {name: value.clone() * 2 for name, value in raw.state_dict().items()} | {"unembed.b_U": torch.ones(290)}
    with pytest.raises(ReadOnlyWeightError, match="no such parameter"):
        raw.load_state_dict(given)
    assert all(torch.equal(parameter, before[name]) for name, parameter in hf.named_parameters())


def test_a_processed_model_takes_no_state_dict(lens: Any) -> None:
    with pytest.raises(ReadOnlyWeightError, match="load_and_process_state_dict"):
        lens.load_state_dict(lens.state_dict())


def test_a_tied_head_takes_equal_values_only(new_hf: Callable, new_lens: Callable, tokens: Tensor) -> None:
    hf = new_hf(tie_word_embeddings=True)
    tied = new_lens(hf, raw=True)
    doubled = {name: value.clone() * 2 for name, value in tied.state_dict().items()}
    before = hf.transformer.wte.weight.clone()
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings=False"):
        tied.load_state_dict(doubled | {"unembed.W_U": torch.zeros(20, 290)})
    assert torch.equal(hf.transformer.wte.weight, before)
    tied.load_state_dict(doubled)
    assert torch.equal(hf.transformer.wte.weight, before * 2) and torch.equal(tied.W_U, tied.W_E.T)


def test_load_and_process(new_hf: Callable, new_lens: Callable, raw: Any, tokens: Tensor) -> None:
    other = new_lens(new_hf(seed=5), raw=True)
    given = {name: value.clone() for name, value in other.state_dict().items()}
    kept = dict(given)
    raw.load_and_process_state_dict(given)
    assert raw.processing == DEFAULT and given.keys() == kept.keys()
    other.process_weights_()
    assert torch.allclose(raw(tokens), other(tokens), atol=1e-5)
    assert torch.equal(raw.W_U, other.W_U)
    with pytest.raises(RuntimeError, match="instead of"):
        raw.load_and_process_state_dict({"embed.W_E": torch.zeros(2, 2)}, fold_ln=False)
    assert raw.processing == DEFAULT


def test_missing_entries_are_filled_from_the_model(raw: Any, caplog: pytest.LogCaptureFixture) -> None:
    given = {name: value for name, value in raw.state_dict().items() if "b_" not in name}
    assert raw.fill_missing_keys(given).keys() == raw.state_dict().keys() and caplog.text == ""
    raw.fill_missing_keys({"embed.W_E": raw.W_E})
    assert "blocks.0.attn.W_Q" in caplog.text and "embed.W_E" not in caplog.text


def test_processing_methods_work_on_state_dicts(raw: Any) -> None:
    state = {name: value.clone() for name, value in raw.state_dict().items()}
    folded = raw.fold_layer_norm(state)
    folded = raw.fold_value_biases(raw.center_unembed(raw.center_writing_weights(folded)))
    raw.process_weights_()
    assert all(torch.allclose(folded[name], weight, atol=1e-5) for name, weight in every(raw).items())
    refactored = raw.refactor_factored_attn_matrices(state)
    assert not refactored["blocks.0.attn.b_V"].any()


# --- initialising ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP"]
)
def test_init_weights_draws_matrices_anew(hf: Any, raw: Any, mode: str) -> None:
    raw.cfg.init_mode, raw.cfg.seed, raw.cfg.initializer_range = mode, 3, 0.5
    before = hf.transformer.h[0].attn.c_attn.bias.clone()
    raw.init_weights()
    drawn = {name: weight.detach().clone() for name, weight in every(raw).items()}
    assert abs(float(drawn["embed.W_E"].mean())) < 0.02
    if mode == "gpt2":
        assert float(drawn["embed.W_E"].std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(hf.transformer.h[0].attn.c_attn.bias, before)
    raw.init_weights()
    assert all(torch.equal(drawn[name], weight) for name, weight in every(raw).items())


def test_init_weights_refuses(raw: Any, lens: Any) -> None:
    raw.cfg.init_mode = "zeros"
    with pytest.raises(ValueError, match="init_mode='zeros' is unknown"):
        raw.init_weights()
    with pytest.raises(ReadOnlyWeightError):
        lens.init_weights()
