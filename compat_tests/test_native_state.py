"""Do native models and TransformerLens' read each other's state dicts, new and old?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compat_tests.comparison import caches_close, close, weights_close
from compat_tests.hub_repositories import with_buffers, without_output_biases
from compat_tests.native_models import BASE, agree_in_a_run, forget_alibi, native_pair, reference, roughen
from compat_tests.rough_models import PROCESSING_FLAGS
from lensbridge import HookedTransformer, HookedTransformerConfig
from lensbridge.native import NativeForCausalLM

TOKENS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(3))
LNPRE: dict[str, Any] = {"normalization_type": "LNPre"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary, groups": {"positional_embedding_type": "rotary", "n_key_value_heads": 1},
    "experts": {"num_experts": 2, "experts_per_token": 1},
    "alibi, attention only": {"positional_embedding_type": "alibi", "attn_only": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_ours_loads_there(kind: str) -> None:
    fields = BASE | KINDS[kind]
    mine = NativeForCausalLM.from_cfg(HookedTransformerConfig(**fields))
    roughen(mine)
    theirs = reference(fields)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    missing, unexpected = theirs.load_state_dict(mine.state_dict())
    assert (missing, unexpected) == ([], [])
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, mine.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_loads_here(kind: str) -> None:
    theirs = reference(BASE | KINDS[kind])
    roughen(theirs)
    mine = NativeForCausalLM.from_cfg(HookedTransformerConfig(**BASE | KINDS[kind] | {"seed": 99}))
    mine.load_state_dict(theirs.state_dict())
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_masks_and_fill_values_of_old_versions() -> None:
    """Up to 2.x a mask was ``[n_ctx, n_ctx]``, and the oldest versions ignored with a finite number."""
    pair = native_pair()
    old = dict(pair.theirs.state_dict())
    for layer in range(2):
        old[f"blocks.{layer}.attn.mask"] = torch.tril(torch.ones(14, 14, dtype=torch.bool))
        old[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    for model in (pair.mine, pair.theirs):
        model.load_state_dict(old)
    assert pair.mine.blocks[0].attn.mask.shape == (0, 0)
    agree_in_a_run(pair, TOKENS)


def test_rotary_tables_of_another_length() -> None:
    pair = native_pair(positional_embedding_type="rotary")
    other = dict(pair.theirs.state_dict())
    other["blocks.0.attn.rotary_sin"] = torch.zeros(3, 4)
    for model in (pair.mine, pair.theirs):
        model.load_state_dict(other)
    agree_in_a_run(pair, TOKENS)


def test_half_precision_parameters_are_cast_as_there() -> None:
    pair = native_pair()
    half = {
        name: value.half() if value.is_floating_point() else value for name, value in pair.mine.state_dict().items()
    }
    for model in (pair.mine, pair.theirs):
        model.load_state_dict(half)
    agree_in_a_run(pair, TOKENS)


@pytest.mark.parametrize("on", [*PROCESSING_FLAGS[:4], "all", "none"])
@pytest.mark.parametrize("old", [with_buffers, without_output_biases])
@pytest.mark.parametrize("fields", [{}, {"act_fn": "solu_ln"}, {"attn_only": True}, LNPRE], ids=str)
def test_old_state_dicts_are_processed_as_there(fields: dict[str, Any], old: Any, on: str) -> None:
    """With masks and fill values of their time, and without biases, which stay as they are in the model."""
    theirs, saved = reference(BASE | fields), reference(BASE | fields)
    roughen(theirs)
    roughen(saved, seed=1)
    mine = HookedTransformer(HookedTransformerConfig(**BASE | fields))
    mine.load_state_dict(theirs.state_dict())
    state = old(saved.state_dict(), BASE["n_ctx"])
    flags = dict.fromkeys(PROCESSING_FLAGS, False) | {flag: on in (flag, "all") for flag in PROCESSING_FLAGS[:4]}
    for model in (mine, theirs):
        model.load_and_process_state_dict(dict(state), **flags)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    weights_close(dict(mine.named_parameters()), dict(theirs.named_parameters()))
    (logits, cache), (expected, reference_cache) = (model.run_with_cache(TOKENS) for model in (mine, theirs))
    close("logits", logits.detach(), expected.detach())
    caches_close(cache, {name: value.detach() for name, value in reference_cache.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_old_state_dicts_are_loaded_as_there(kind: str) -> None:
    theirs = reference(BASE | KINDS[kind])
    roughen(theirs)
    mine = HookedTransformer(HookedTransformerConfig(**BASE | KINDS[kind] | {"seed": 99}))
    whole = with_buffers(theirs.state_dict(), BASE["n_ctx"])
    for model in (mine, theirs):
        assert model.load_state_dict(whole) == ([], [])
    forget_alibi(theirs)
    close("logits", mine(TOKENS).detach(), theirs(TOKENS).detach())
    part = without_output_biases(whole, BASE["n_ctx"])
    for model in (mine, theirs):
        with pytest.raises(RuntimeError, match="b_O"):
            model.load_state_dict(part)
    missing = [model.load_state_dict(part, strict=False).missing_keys for model in (mine, theirs)]
    assert missing[0] == missing[1]
