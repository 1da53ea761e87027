"""Does processing keep what a native model computes, and say what it left out?"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lensbridge import HookedTransformerConfig, Processing
from lensbridge.components import LayerNormPre, RMSNormPre
from lensbridge.native import NativeForCausalLM
from lensbridge.native.processing import process_weights

DEFAULT = Processing(True, True, True, True)
IDS = torch.tensor([[1, 5, 2, 9], [3, 3, 0, 7]])


def new_model(**options: Any) -> NativeForCausalLM:
    fields = {"d_model": 12, "d_head": 4, "n_layers": 2, "n_ctx": 8, "d_vocab": 11, "act_fn": "gelu", "device": "cpu"}
    model = NativeForCausalLM.from_cfg(HookedTransformerConfig(**fields | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator) + 0.2)
    return model.eval()


def log_probs(model: NativeForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.log_softmax(-1)


def test_processed_weights_have_the_properties_that_are_wanted() -> None:
    model = new_model()
    before = log_probs(model)
    assert process_weights(model, DEFAULT) == DEFAULT
    torch.testing.assert_close(log_probs(model), before, rtol=1e-4, atol=1e-5)
    assert type(model.ln_final) is type(model.blocks[0].ln1) is type(model.blocks[1].ln2) is LayerNormPre
    zero = torch.zeros(())
    for weight in (model.embed.W_E, model.pos_embed.W_pos, model.blocks[0].attn.W_O, model.blocks[1].mlp.b_out):
        torch.testing.assert_close(weight.mean(-1).abs().max(), zero, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.unembed.W_U.mean(-1).abs().max(), zero, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.blocks[0].attn.W_Q.mean(1).abs().max(), zero, atol=1e-6, rtol=0)
    assert not any(block.attn.b_V.any() for block in model.blocks)


def test_a_processed_model_can_be_saved_and_processed_again(tmp_path: Any) -> None:
    model = new_model(normalization_type="RMS", positional_embedding_type="rotary")
    process_weights(model, DEFAULT)
    expected = log_probs(model)
    model.save_pretrained(tmp_path)
    again = NativeForCausalLM.from_pretrained(tmp_path)
    assert type(again.ln_final) is RMSNormPre
    assert torch.equal(log_probs(again), expected)
    done = process_weights(again, DEFAULT)
    assert not done.fold_ln
    torch.testing.assert_close(log_probs(again), expected)


@pytest.mark.parametrize(
    ("options", "left_out", "reason"),
    [
        ({"gated_mlp": True}, "fold_ln", "gate"),
        ({"normalization_type": None}, "fold_ln", "no gain"),
        ({"final_rms": True}, "center_writing_weights", "RMS norm"),
        ({"output_logits_soft_cap": 3.0}, "center_unembed", "softcap"),
        ({"use_attention_sinks": True}, "fold_value_biases", "sinks"),
    ],
)
def test_what_is_left_out_is_said(
    options: dict[str, Any], left_out: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model(**options)
    before = log_probs(model)
    with caplog.at_level(logging.WARNING):
        done = process_weights(model, DEFAULT)
    assert not getattr(done, left_out)
    assert any(left_out in record.getMessage() and reason in record.getMessage() for record in caplog.records)
    torch.testing.assert_close(log_probs(model), before, rtol=1e-4, atol=1e-5)


def test_a_gated_mlp_is_folded_where_the_norm_has_no_bias() -> None:
    model = new_model(gated_mlp=True)
    with torch.no_grad():
        for block in model.blocks:
            block.ln2.b.zero_()
    before = log_probs(model)
    assert process_weights(model, DEFAULT).fold_ln
    torch.testing.assert_close(log_probs(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"normalization_type": "RMS"}, {"act_fn": "solu_ln"}], ids=str)
def test_a_processed_model_takes_unprocessed_weights(fields: dict[str, Any]) -> None:
    model, other = new_model(**fields), new_model(**fields)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    process_weights(model, DEFAULT)
    norm = model.ln_final
    process_weights(model, DEFAULT, other.state_dict())
    assert model.ln_final is norm
    torch.testing.assert_close(log_probs(model), log_probs(other), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="norms that were folded cannot take over blocks.0.ln1.w"):
        process_weights(model, Processing(), other.state_dict())
    torch.testing.assert_close(log_probs(model), log_probs(other), rtol=1e-4, atol=1e-5)


def test_state_dicts_with_too_little_or_too_much(caplog: pytest.LogCaptureFixture) -> None:
    model, other = new_model(), new_model()
    given = {name: value * 1.5 for name, value in other.state_dict().items() if name.rsplit(".")[-1][:2] != "b_"}
    given["blocks.0.attn.mask"] = torch.ones(8, 8, dtype=torch.bool)
    with caplog.at_level(logging.WARNING):
        process_weights(model, Processing(), given | {"blocks.7.thing": torch.ones(1)})
    assert [record.getMessage() for record in caplog.records] == [
        "in the state dict, but not in the model: blocks.7.thing"
    ]
    assert torch.equal(model.embed.W_E, given["embed.W_E"])
    assert torch.equal(model.blocks[0].attn.b_Q, other.blocks[0].attn.b_Q)
    del given["blocks.1.attn.W_K"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.W_K"):
        process_weights(model, Processing(), given)


def test_half_precision_is_computed_in_float32() -> None:
    exact, half = new_model(), new_model(dtype=torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    for model in (exact, half):
        process_weights(model, DEFAULT)
    for name, value in half.named_parameters():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact.get_parameter(name).bfloat16()), name
