"""Does a seed give a native model the weights that it gives TransformerLens 3.9.0's?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compat_tests.native_models import BASE, reference
from lensbridge import HookedTransformerConfig
from lensbridge.native import NativeForCausalLM
from lensbridge.native.initialisation import MODES

#: Options that change which parameters there are, and in which order they are drawn.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention only": {"attn_only": True},
    "gated": {"gated_mlp": True},
    "groups": {"n_key_value_heads": 1},
    "rotary": {"positional_embedding_type": "rotary"},
    "alibi": {"positional_embedding_type": "alibi"},
    "no norm": {"normalization_type": None},
    "norms everywhere": {"normalization_type": "RMS", "use_normalization_before_and_after": True, "use_qk_norm": True},
    "normed embeddings": {"post_embedding_ln": True, "act_fn": "solu_ln"},
    "experts": {"num_experts": 3, "experts_per_token": 1},
    "experts of GPT-OSS": {
        "num_experts": 3,
        "experts_per_token": 1,
        "original_architecture": "GptOssForCausalLM",
        "use_attention_sinks": True,
    },
    "xielu": {"act_fn": "xielu"},
    "d_vocab_out": {"d_vocab_out": 4},
}


def states(**options: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    fields = BASE | options
    theirs = reference(fields).state_dict()
    mine = NativeForCausalLM.from_cfg(HookedTransformerConfig(**fields)).state_dict()
    return mine, theirs


def identical(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(mine) == list(theirs)
    different = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    assert different == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode(kind: str, mode: str) -> None:
    identical(*states(init_mode=mode, **KINDS[kind]))


@pytest.mark.parametrize("seed", [0, 1, 123])
@pytest.mark.parametrize("scale", [0.02, 2.0])
def test_seeds_and_ranges(seed: int, scale: float) -> None:
    for mode in MODES:
        identical(*states(init_mode=mode, seed=seed, initializer_range=scale))


@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_without_a_seed_the_state_of_the_generator_decides(kind: str) -> None:
    fields = BASE | KINDS[kind] | {"seed": None}
    after = []
    found = []
    for make in (lambda: NativeForCausalLM.from_cfg(HookedTransformerConfig(**fields)), lambda: reference(fields)):
        torch.manual_seed(7)
        found.append(make().state_dict())
        after.append(torch.rand(3))
    identical(*found)
    # What is drawn next is the same too.
    assert torch.equal(*after)


def test_in_float64() -> None:
    identical(*states(dtype=torch.float64))
