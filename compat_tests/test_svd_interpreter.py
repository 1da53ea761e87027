"""Does SVDInterpreter give 3.9.0's token scores, in every basis?"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from transformer_lens import SVDInterpreter as Theirs

from compat_tests.comparison import close, outcome, same_outcome
from compat_tests.conftest import Pairs
from compat_tests.rough_models import PROCESSINGS, SUBJECT

Ours = import_module(SUBJECT).SVDInterpreter


def with_signs_of(scores: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Scores [d_vocab, 1, n], each column with the sign of the other's: a singular vector has none of its own."""
    return scores * (scores * other).sum(0, keepdim=True).sign()


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", ["two", "three"])
@pytest.mark.parametrize("vector_type", ["OV", "w_in", "w_out"])
def test_singular_vectors(pairs: Pairs, shape: str, processing: str, vector_type: Any) -> None:
    pair = pairs.get(shape, processing=processing)
    for layer in range(pair.shape.n_layers):
        options = {"num_vectors": 4, "head_index": layer if vector_type == "OV" else None}
        mine, theirs = (
            cls(model).get_singular_vectors(vector_type, layer, **options)
            for cls, model in zip((Ours, Theirs), pair.both, strict=True)
        )
        close(f"SVDInterpreter {vector_type}", with_signs_of(mine, theirs), theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        ("OV", 0),
        ("QK", 0),
        ("QK", 0, 2, 0),
        ("OV", 5, 2, 0),
        ("OV", 0, 2, 9),
        ("OV", 0, 99, 1),
        ("w_in", -1),
        ("w_out", 2, 3),
        ("w_out", 0, 99),
    ],
)
def test_errors(pairs: Pairs, arguments: tuple[Any, ...]) -> None:
    pair = pairs.get()
    mine, theirs = (
        outcome(lambda c=cls, m=model: c(m).get_singular_vectors(*arguments))
        for cls, model in zip((Ours, Theirs), pair.both, strict=True)
    )
    assert theirs.error is not None
    same_outcome("get_singular_vectors", mine, theirs)


def test_the_module_has_the_names_of_3_9_0() -> None:
    import transformer_lens.SVDInterpreter  # noqa: F401

    mine, theirs = (__import__("sys").modules[f"{package}.SVDInterpreter"] for package in (SUBJECT, "transformer_lens"))
    assert (mine.OUTPUT_EMBEDDING, mine.VECTOR_TYPES) == (theirs.OUTPUT_EMBEDDING, theirs.VECTOR_TYPES)
