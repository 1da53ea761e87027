"""What does each processing option do to the weights of one branch?

That it keeps the function of a whole model is tested in test_weight_processing.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lensbridge.processing import (
    ATTENTION_READERS,
    MLP_READERS,
    Processing,
    center,
    fold_norm_into,
    move_value_bias,
    process_attention,
    process_mlp,
    process_unembed,
)

HEADS, D_HEAD, D_MODEL, D_MLP = 4, 3, 7, 5
OPTIONS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))) + 0.3


def attention(groups: int = HEADS) -> dict[str, Tensor]:
    out = {"ln.w": draw(D_MODEL), "ln.b": draw(D_MODEL), "W_O": draw(HEADS, D_HEAD, D_MODEL), "b_O": draw(D_MODEL)}
    for letter, heads in (("Q", HEADS), ("K", groups), ("V", groups)):
        out |= {f"W_{letter}": draw(heads, D_MODEL, D_HEAD), f"b_{letter}": draw(heads, D_HEAD)}
    return out


def mlp() -> dict[str, Tensor]:
    out = {"ln.w": draw(D_MODEL), "ln.b": draw(D_MODEL), "W_in": draw(D_MODEL, D_MLP), "b_in": draw(D_MLP)}
    return out | {"W_gate": draw(D_MODEL, D_MLP), "W_out": draw(D_MLP, D_MODEL), "b_out": draw(D_MODEL)}


def test_a_folded_norm_does_nothing_and_its_readers_do_what_it_did() -> None:
    w, x = mlp(), draw(6, D_MODEL)
    after = fold_norm_into(w, MLP_READERS, center_weights=False)
    assert torch.equal(after["ln.w"], torch.ones_like(w["ln.w"])) and not after["ln.b"].any()
    read = x * w["ln.w"] + w["ln.b"]
    assert torch.allclose(x @ after["W_in"] + after["b_in"], read @ w["W_in"] + w["b_in"])
    # The gate had no bias: it is made.
    assert torch.allclose(x @ after["W_gate"] + after["b_gate"], read @ w["W_gate"])
    assert after["W_out"] is w["W_out"] and "b_gate" not in w


def test_centred_readers_are_blind_to_the_mean_and_the_gate_stays() -> None:
    centred, plain = (fold_norm_into(mlp(), MLP_READERS, center_weights=flag) for flag in (True, False))
    assert centred["W_in"].sum(0).abs().max() < 1e-12 < plain["W_in"].sum(0).abs().max()
    assert torch.equal(centred["W_gate"], plain["W_gate"])


def test_a_norm_without_parameters_only_leaves_centring() -> None:
    w = {name: weight for name, weight in attention().items() if not name.startswith("ln.")}
    after = fold_norm_into(w, ATTENTION_READERS)
    assert after.keys() == w.keys()
    assert torch.allclose(after["W_Q"], w["W_Q"] - w["W_Q"].mean(1, keepdim=True))
    assert after["b_Q"] is w["b_Q"]


def test_a_norm_that_nothing_reads_stays() -> None:
    w = {"ln.w": draw(D_MODEL), "ln.b": draw(D_MODEL), "W_other": draw(D_MODEL)}
    assert fold_norm_into(w, MLP_READERS) == w


@pytest.mark.parametrize("process", [process_attention, process_mlp, process_unembed])
def test_readers_of_an_rms_norm_keep_the_mean(process: object) -> None:
    branch = {
        process_attention: attention(), process_mlp: mlp(),
        process_unembed: {"ln.w": draw(D_MODEL), "W_U": draw(D_MODEL, 9), "b_U": draw(9)},
    }[process]  # fmt: skip
    branch.pop("ln.b", None)
    after = process(branch, Processing(fold_ln=True))
    readers = [name for name in ("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U") if name in branch]
    assert readers
    for name in readers:
        assert torch.allclose(after[name], branch[name] * branch["ln.w"][:, None])
    assert after.keys() == branch.keys()


def test_a_value_bias_that_heads_share_counts_once_for_each() -> None:
    w = attention(groups=2)
    after = move_value_bias(w)
    opened = move_value_bias({**w, "b_V": w["b_V"].repeat_interleave(2, 0)})
    assert torch.allclose(after["b_O"], opened["b_O"])
    assert after["b_V"].shape == w["b_V"].shape and not after["b_V"].any()
    del w["b_O"]
    assert torch.allclose(move_value_bias(w)["b_O"], after["b_O"] - attention(groups=2)["b_O"])


@pytest.mark.parametrize("shape", [(3, D_HEAD), (HEADS, D_HEAD + 1), (HEADS * D_HEAD,)])
def test_a_value_bias_of_other_heads_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="b_V has shape"):
        move_value_bias({**attention(), "b_V": draw(*shape)})


def test_centring_passes_over_what_is_missing() -> None:
    w = mlp()
    after = center(w, ("W_out", "b_out", "W_O"))
    assert after.keys() == w.keys()
    assert after["W_out"].mean(-1).abs().max() < 1e-12 and after["b_out"].mean().abs() < 1e-12


def test_what_a_choice_of_options_means() -> None:
    assert not Processing().any
    assert all(Processing(**{option: True}).any for option in OPTIONS)
    assert Processing(fold_value_biases=True).moves_value_bias
    assert Processing(refactor_factored_attn_matrices=True).moves_value_bias
    assert not Processing(fold_ln=True).moves_value_bias
    assert hash(Processing(True)) == hash(Processing(fold_ln=True))
