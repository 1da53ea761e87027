"""Does processing rewrite the weights of a native model as TransformerLens 3.9.0 does, and never its function?"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from compat_tests.comparison import close, weights_close
from compat_tests.native_models import agree_in_a_run, native_pair
from compat_tests.rough_models import PROCESSING_FLAGS
from compat_tests.test_native_model import GRID, LEFT_PADDED, LOCAL, MOE, ROTARY, TOKENS
from lensbridge import Processing
from lensbridge.native.processing import process_weights

SAME: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention only": {"attn_only": True},
    "RMS": {"normalization_type": "RMS"},
    "LNPre": {"normalization_type": "LNPre"},
    "no norm": {"normalization_type": None},
    "groups": {"n_key_value_heads": 1} | ROTARY,
    "gated, RMS": {"gated_mlp": True, "normalization_type": "RMS"},
    "solu_ln": {"act_fn": "solu_ln"},
    "parallel": {"parallel_attn_mlp": True} | ROTARY,
    "norms before and after": {"normalization_type": "RMS", "use_normalization_before_and_after": True},
    "local, alibi": LOCAL | {"positional_embedding_type": "alibi"},
    "experts, RMS": MOE | {"normalization_type": "RMS"},
    "normed embeddings": {"post_embedding_ln": True},
    "d_vocab_out": {"d_vocab_out": 5},
    "float64": {"dtype": torch.float64},
}
FLAGS = [{flag: True} for flag in PROCESSING_FLAGS[:4]] + [dict.fromkeys(PROCESSING_FLAGS[:4], True)]


def flags(**on: bool) -> dict[str, bool]:
    return dict.fromkeys(PROCESSING_FLAGS, False) | on


@pytest.mark.parametrize("on", FLAGS, ids=lambda on: " ".join(on) if len(on) == 1 else "default")
@pytest.mark.parametrize("kind", SAME)
def test_weights_and_values(kind: str, on: dict[str, bool]) -> None:
    pair = native_pair(**SAME[kind])
    process_weights(pair.mine, Processing(**flags(**on)))
    pair.theirs.load_and_process_state_dict(dict(pair.theirs.state_dict()), **flags(**on))
    mine, theirs = pair.mine.state_dict(), pair.theirs.state_dict()
    weights_close(
        {name: value for name, value in mine.items() if value.is_floating_point() and not name.endswith("IGNORE")},
        {name: theirs[name] for name in mine if mine[name].is_floating_point() and not name.endswith("IGNORE")},
    )
    assert pair.mine.cfg.normalization_type == pair.theirs.cfg.normalization_type
    agree_in_a_run(pair, TOKENS)
    agree_in_a_run(pair, TOKENS, LEFT_PADDED)


@pytest.mark.parametrize("kind", ["gated", "experts"])
def test_layer_norms_before_gates(kind: str) -> None:
    """The gate and the experts are not made blind to the mean, as there."""
    pair = native_pair(**GRID[kind])
    for model in (pair.mine, pair.theirs):
        for block in model.blocks:
            block.ln2.b.data.zero_()
    # Of experts, 3.9.0 centres what they write over d_mlp.
    on = flags(fold_ln=True, fold_value_biases=True, center_unembed=True, center_writing_weights=kind == "gated")
    assert process_weights(pair.mine, Processing(**on)).fold_ln
    pair.theirs.load_and_process_state_dict(dict(pair.theirs.state_dict()), **on)
    mine, theirs = pair.mine.state_dict(), pair.theirs.state_dict()
    assert mine.keys() == theirs.keys()
    weights_close(
        {name: value for name, value in mine.items() if value.is_floating_point() and not name.endswith("IGNORE")},
        {name: theirs[name] for name in mine if mine[name].is_floating_point() and not name.endswith("IGNORE")},
    )
    agree_in_a_run(pair, TOKENS)


@pytest.mark.parametrize("kind", ["plain", "attention only", "local, alibi", "shortformer"])
def test_refactored_attention(kind: str) -> None:
    pair = native_pair(**(SAME | GRID)[kind])
    # Positions that queries and keys read besides the stream go through the same matrices; other options do not fit.
    on = flags(refactor_factored_attn_matrices=True) if kind == "shortformer" else dict.fromkeys(PROCESSING_FLAGS, True)
    process_weights(pair.mine, Processing(**on))
    pair.theirs.load_and_process_state_dict(dict(pair.theirs.state_dict()), **on)
    agree_in_a_run(pair, TOKENS)


def test_a_state_dict_to_load_and_process() -> None:
    """Missing biases are kept, as there."""
    pair, source = native_pair(), native_pair(seed=8).theirs.state_dict()
    given = {name: 2 * value for name, value in source.items() if "b_" not in name and "mask" not in name}
    given = {name: value for name, value in given.items() if "IGNORE" not in name}
    on = dict.fromkeys(PROCESSING_FLAGS[:4], True)
    process_weights(pair.mine, Processing(**on), given)
    pair.theirs.load_and_process_state_dict(dict(given), **on)
    agree_in_a_run(pair, TOKENS)


@pytest.mark.parametrize("name", GRID)
def test_the_function_is_kept(name: str) -> None:
    """For every kind of model: where TransformerLens' processing changes the function, the option is left out here."""
    fields = GRID[name] | {"dtype": torch.float64}
    mine = native_pair(**fields).mine
    with torch.no_grad():
        before = mine(TOKENS).logits
        done = process_weights(mine, Processing(**dict.fromkeys(PROCESSING_FLAGS[:4], True)))
        after = mine(TOKENS).logits
    close("log probs", after.log_softmax(-1), before.log_softmax(-1))
    if not done.center_unembed:
        close("logits", after, before)


@pytest.mark.parametrize("option", PROCESSING_FLAGS[:4])
def test_an_option_is_carried_out_where_it_can_be(option: str) -> None:
    """Being left out is for the models named here, and no others."""
    left_out = set()
    for name, fields in GRID.items():
        mine = native_pair(**fields).mine
        if not getattr(process_weights(mine, Processing(**{option: True})), option):
            left_out.add(name)
    carried_out = {"plain", "attention only", "rotary", "local", "parallel", "softcap on scores", "d_vocab_out"}
    assert left_out.isdisjoint(carried_out)
    expected = {
        "fold_ln": {"no norm", "LNPre", "RMSPre", "shortformer", "OLMo 2", "gated", "experts"},
        "center_writing_weights": {"no norm", "RMS", "RMSPre", "final RMS", "shortformer", "OLMo 2"},
        "center_unembed": {"softcap on logits", "both softcaps"},
        "fold_value_biases": {"sinks", "clipped", "experts of GPT-OSS", "OLMoE"},
    }[option]
    assert expected <= left_out


@pytest.mark.parametrize("name", ["rotary", "groups", "query-key norms", "clipped", "sinks", "OLMo 2, split"])
def test_refactoring_is_refused_where_it_would_change_the_function(name: str) -> None:
    mine = native_pair(**GRID[name]).mine
    with pytest.raises(AssertionError if name == "rotary" else ValueError, match="refactor"):
        process_weights(mine, Processing(refactor_factored_attn_matrices=True))


def test_the_options_are_those_of_the_facade() -> None:
    assert tuple(field.name for field in dataclasses.fields(Processing)) == PROCESSING_FLAGS
