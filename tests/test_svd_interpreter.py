"""Are the token scores those of the singular vectors of the weights that the model shows?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge import SVDInterpreter
from lensbridge.svd_interpreter import OUTPUT_EMBEDDING, VECTOR_TYPES


def by_hand(matrix: torch.Tensor, unembedding: torch.Tensor, count: int) -> torch.Tensor:
    return (torch.linalg.svd(matrix).Vh[:count] @ unembedding).T


def same_up_to_sign(mine: torch.Tensor, other: torch.Tensor) -> None:
    """Compare [d_vocab, n]; each column may have the other sign."""
    signs = (mine * other).sum(0).sign()
    torch.testing.assert_close(mine * signs, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vector_type", VECTOR_TYPES)
def test_scores_by_hand(either: Any, vector_type: Any) -> None:
    scores = SVDInterpreter(either).get_singular_vectors(vector_type, 1, num_vectors=3, head_index=2)
    assert scores.shape == (either.cfg.d_vocab, 1, 3)
    block = either.blocks[1]
    gain = 1.0 if either.processing.fold_ln else block.ln2.w
    matrix = {
        "OV": block.attn.W_V[2] @ block.attn.W_O[2],
        "w_in": block.mlp.W_in.T * gain,
        "w_out": block.mlp.W_out,
    }[vector_type]
    same_up_to_sign(scores[:, 0], by_hand(matrix, either.W_U, 3))


def test_an_mlp_needs_no_head_and_ov_does(lens: Any) -> None:
    interpreter = SVDInterpreter(lens)
    assert interpreter.get_singular_vectors("w_out", 0).shape == (lens.cfg.d_vocab, 1, 10)
    with pytest.raises(AssertionError, match="optional only for"):
        interpreter.get_singular_vectors("OV", 0)


def test_it_follows_the_weights(raw: Any) -> None:
    interpreter = SVDInterpreter(raw)
    before = interpreter.get_singular_vectors("w_out", 0, 2)
    with torch.no_grad():
        raw.hf_model.lm_head.weight.mul_(3)
    torch.testing.assert_close(interpreter.get_singular_vectors("w_out", 0, 2), 3 * before)


def test_params_are_the_weights_by_name(lens: Any) -> None:
    params = SVDInterpreter(lens).params
    assert torch.equal(params[OUTPUT_EMBEDDING], lens.W_U)
    assert torch.equal(params["blocks.1.attn.W_V"], lens.blocks[1].attn.W_V)


def test_bad_input_is_refused(lens: Any) -> None:
    interpreter = SVDInterpreter(lens)
    with pytest.raises(ValueError, match="must be in"):
        interpreter.get_singular_vectors("QK", 0, head_index=0)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="Layer index must be between 0 and 1 but got 2"):
        interpreter.get_singular_vectors("w_in", 2)
    with pytest.raises(AssertionError, match="Head index must be between 0 and 3 but got 4"):
        interpreter.get_singular_vectors("OV", 0, head_index=4)
    with pytest.raises(IndexError, match="has 5 singular vectors"):
        interpreter.get_singular_vectors("OV", 0, 6, head_index=0)
