"""Is a config filled in, checked and converted as promised?"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

from lensbridge.config import HookedTransformerConfig, TransformerBridgeConfig, TransformerLensConfig
from lensbridge.errors import UnknownArgumentError

SIZES: dict[str, Any] = {"d_model": 12, "d_head": 4, "n_layers": 2, "n_ctx": 8}


def make(**fields: Any) -> HookedTransformerConfig:
    return HookedTransformerConfig(**{**SIZES, **fields})


def test_what_is_not_given_is_filled_in() -> None:
    cfg = make(d_vocab=50)
    assert (cfg.n_heads, cfg.d_mlp, cfg.d_vocab_out, cfg.rotary_dim) == (3, 48, 50, None)
    assert cfg.attn_scale == 2.0
    assert cfg.initializer_range == pytest.approx(0.8 / 12**0.5)
    assert cfg.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_is_given_stays() -> None:
    given = {
        "n_heads": 5, "d_mlp": 7, "d_vocab": 50, "d_vocab_out": 9, "attn_scale": 3.0, "initializer_range": 0.02,
        "device": "cpu", "positional_embedding_type": "rotary", "rotary_dim": 2,
    }  # fmt: skip
    cfg = make(**given)
    assert {name: getattr(cfg, name) for name in given} == given


def test_rotary_models_rotate_the_whole_head_unless_told() -> None:
    assert make(positional_embedding_type="rotary").rotary_dim == 4


def test_no_scale_without_use_attn_scale() -> None:
    assert make(use_attn_scale=False).attn_scale == -1.0


def test_other_init_modes_take_a_gain_of_one() -> None:
    assert make(init_mode="xavier_uniform").initializer_range == 1.0


@pytest.mark.parametrize(
    ("fields", "per_layer"),
    [
        ({"attn_only": True}, 4 * 12 * 12),
        ({}, 4 * 12 * 12 + 2 * 12 * 48),
        ({"gated_mlp": True}, 4 * 12 * 12 + 3 * 12 * 48),
        ({"num_experts": 3, "experts_per_token": 1}, 4 * 12 * 12 + (2 * 12 * 48 + 12) * 3),
    ],
)
def test_n_params_counts_matrices_only(fields: dict[str, object], per_layer: int) -> None:
    assert make(**fields).n_params == 2 * per_layer


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"d_head": 5}, ValueError, "divisible"),
        ({"act_fn": "gelo"}, AssertionError, "gelu_new"),
        ({"act_fn": None}, AssertionError, "act_fn"),
        ({"use_local_attn": True, "attn_types": ["local"]}, AssertionError, "window_size"),
        ({"use_local_attn": True, "window_size": 3}, AssertionError, "attn_types"),
        ({"num_experts": 4}, AssertionError, "experts_per_token"),
        ({"experts_per_token": 2}, AssertionError, "num_experts"),
        ({"default_prepend_bos": None}, AssertionError, "default_prepend_bos"),
        ({"n_devices": 1000}, AssertionError, "CUDA"),
    ],
)
def test_refusals_say_which_field(fields: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make(**fields)


def test_attn_only_needs_no_activation() -> None:
    assert make(attn_only=True, act_fn=None).act_fn is None


def test_huggingface_activations_are_for_models_read_from_huggingface() -> None:
    assert make(act_fn="quick_gelu", original_architecture="CLIPTextModel").act_fn == "quick_gelu"
    with pytest.raises(AssertionError, match="quick_gelu"):
        make(act_fn="quick_gelu")
    with pytest.raises(AssertionError, match="no_such_function"):
        make(act_fn="no_such_function", original_architecture="CLIPTextModel")


def test_a_seed_is_set_everywhere_at_once() -> None:
    draws = []
    for _ in range(2):
        make(seed=7)
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    make()
    assert draws[0] == draws[1]
    assert draws[1] != (torch.rand(1).item(), random.random(), np.random.rand())


def test_to_dict_is_live_and_its_copy_makes_an_equal_config() -> None:
    cfg = make(d_vocab=11)
    again = HookedTransformerConfig.from_dict(dict(cfg.to_dict()))
    assert again == cfg == copy.deepcopy(cfg)
    cfg.to_dict()["use_attn_result"] = True
    assert cfg.use_attn_result
    assert again != cfg


def test_from_dict_names_the_field_that_was_meant() -> None:
    with pytest.raises(UnknownArgumentError, match=r"'n_layer'.*n_layers") as caught:
        HookedTransformerConfig.from_dict({**SIZES, "n_layer": 2})
    assert isinstance(caught.value, TypeError)


def test_base_from_dict_leaves_out_what_it_has_no_field_for() -> None:
    base = TransformerLensConfig.from_dict({**SIZES, "model_name": "x", "eps": 1e-3})
    assert type(base) is TransformerLensConfig
    assert base.eps == 1e-3
    assert "model_name" not in base.to_dict()


def test_base_to_dict_is_a_copy() -> None:
    base = TransformerLensConfig(**SIZES)
    base.to_dict()["eps"] = 1.0
    assert base.eps == 1e-5


def test_unwrap() -> None:
    cfg, base = make(), TransformerLensConfig(**SIZES, eps=1e-3)
    assert HookedTransformerConfig.unwrap(cfg) is cfg
    assert HookedTransformerConfig.unwrap(dict(cfg.to_dict())) == cfg
    assert HookedTransformerConfig.unwrap(base).eps == 1e-3
    assert TransformerLensConfig.unwrap(cfg) is cfg
    assert TransformerLensConfig.unwrap(dict(SIZES)) == TransformerLensConfig(**SIZES)


def test_repr_lists_the_fields() -> None:
    assert repr(make()).startswith("HookedTransformerConfig:\n{")
    assert "'d_model': 12" in repr(make())
    assert repr(TransformerLensConfig(**SIZES)).startswith("TransformerLensConfig:\n{")


@pytest.mark.parametrize(("act_fn", "answer"), [("solu_ln", True), ("solu", False), ("gelu", False)])
def test_is_layer_norm_activation(act_fn: str, answer: bool) -> None:
    assert make(act_fn=act_fn).is_layer_norm_activation() is answer


def test_a_bridges_config_takes_values_as_they_come() -> None:
    cfg = TransformerBridgeConfig(**SIZES, act_fn="gelo", d_vocab=11, rotary_base=5e5, dtype=None)
    assert (cfg.n_heads, cfg.d_mlp, cfg.d_vocab_out, cfg.attn_scale, cfg.n_params) == (3, 48, -1, -1.0, None)
    assert (cfg.rotary_base, cfg.dtype, cfg.head_dim) == (500000, torch.float32, 4)
    assert cfg.initializer_range == pytest.approx(0.8 / 12**0.5)


def test_a_bridges_config_refuses_what_is_no_field_or_no_name() -> None:
    with pytest.raises(TypeError, match="d_modle"):
        TransformerBridgeConfig(**SIZES, d_modle=3)
    with pytest.raises(ValueError, match="architecture"):
        TransformerBridgeConfig(**SIZES, architecture=object())


def test_a_bridges_config_from_a_dict_keeps_every_field_it_has() -> None:
    cfg = TransformerBridgeConfig.from_dict({**SIZES, "d_mlp": 5, "is_stateful": True, "clip_qkv": 3.0})
    assert isinstance(cfg, TransformerBridgeConfig)
    assert (cfg.d_mlp, cfg.is_stateful, hasattr(cfg, "clip_qkv")) == (5, True, False)
