"""Are the weights that a facade reads off a native model its parameters?"""

from __future__ import annotations

import pytest
import torch

from lensbridge import HookedTransformerConfig
from lensbridge.errors import ReadOnlyWeightError, UnknownPointError
from lensbridge.native import NativeForCausalLM
from lensbridge.native.weights import NativeWeights


@pytest.fixture
def model() -> NativeForCausalLM:
    cfg = HookedTransformerConfig(
        d_model=12, d_head=3, n_layers=2, n_ctx=8, d_vocab=11, n_key_value_heads=2, act_fn="relu", seed=0, device="cpu"
    )
    return NativeForCausalLM.from_cfg(cfg)


def test_parameters_are_handed_out_as_they_are(model: NativeForCausalLM) -> None:
    weights = NativeWeights(model)
    assert weights.names() == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert weights.get(name) is parameter
        assert weights.shape(name) == parameter.shape
    assert weights.attention_output(1) == {"W_O": model.blocks[1].attn.W_O, "b_O": model.blocks[1].attn.b_O}
    assert not weights.tied


def test_stacks_are_copies_that_carry_gradients(model: NativeForCausalLM) -> None:
    weights = NativeWeights(model)
    stacked = weights.stack("attn.W_K")
    assert stacked.shape == (2, 4, 12, 3)
    assert torch.equal(stacked[1, 3], model.blocks[1].attn._W_K[1])
    stacked.square().sum().backward()
    assert torch.allclose(model.blocks[0].attn._W_K.grad, 4 * model.blocks[0].attn._W_K)
    with pytest.raises(ReadOnlyWeightError, match="W_K is a copy"):
        stacked[0] = 0


def test_setting(model: NativeForCausalLM) -> None:
    weights = NativeWeights(model)
    weights.set("blocks.0.mlp.W_in", torch.ones(12, 48))
    assert (model.blocks[0].mlp.W_in == 1).all() and model.blocks[0].mlp.W_in.requires_grad
    with pytest.raises(ValueError, match=r"\(12, 48\), got \(48, 12\)"):
        weights.set("blocks.0.mlp.W_in", torch.ones(48, 12))
    with pytest.raises(TypeError, match="not to a float"):
        weights.set("blocks.0.mlp.W_in", 1.0)  # type: ignore[arg-type]
    with pytest.raises(UnknownPointError, match=r"Closest: blocks\.0\.attn\._W_K"):
        weights.set("blocks.0.attn.W_K", torch.ones(4, 12, 3))


def test_a_weight_that_does_not_exist(model: NativeForCausalLM) -> None:
    for name in ("blocks.0.attn.W_X", "blocks.7.attn.W_Q", "W_E"):
        with pytest.raises(UnknownPointError, match=f"no weight '{name}'"):
            NativeWeights(model).get(name)
