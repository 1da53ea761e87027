"""Does the config hold the same fields, defaults and derived values as TransformerLens 3.9.0's?"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
from transformer_lens.config import HookedTransformerConfig as TheirHooked
from transformer_lens.config import TransformerBridgeConfig as TheirBridge
from transformer_lens.config import TransformerLensConfig as TheirBase

from lensbridge.config import HookedTransformerConfig, TransformerBridgeConfig, TransformerLensConfig

SIZES: dict[str, Any] = {"d_model": 20, "d_head": 5, "n_layers": 3, "n_ctx": 8}
PAIRS = [(HookedTransformerConfig, TheirHooked), (TransformerLensConfig, TheirBase)]

VARIANTS: list[dict[str, Any]] = [
    {},
    {"d_vocab": 17},
    {"d_vocab": 17, "d_vocab_out": 4},
    {"attn_only": True, "act_fn": None},
    {"n_heads": 3, "d_mlp": 9, "gated_mlp": True},
    {"num_experts": 4, "experts_per_token": 2},
    {"positional_embedding_type": "rotary"},
    {"positional_embedding_type": "rotary", "rotary_dim": 2},
    {"use_attn_scale": False},
    {"attn_scale": 2.5},
    {"init_mode": "kaiming_normal"},
    {"init_mode": "kaiming_normal", "initializer_range": 0.3},
    {"initializer_range": -0.5},
    {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "global", "local"]},
    {"act_fn": "solu_ln", "normalization_type": None, "seed": 3},
]

REFUSED: list[dict[str, Any]] = [
    {"d_head": 7},
    {"act_fn": "gelo"},
    {"act_fn": None},
    {"use_local_attn": True},
    {"use_local_attn": True, "window_size": 3},
    {"num_experts": 4},
    {"experts_per_token": 4},
    {"default_prepend_bos": None},
    {"n_devices": 1000},
    {"no_such_field": 1},
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_same_fields_in_the_same_order_with_the_same_defaults(ours: Any, theirs: Any) -> None:
    def table(cls: Any) -> list[tuple[str, Any]]:
        return [(field.name, field.default) for field in dataclasses.fields(cls)]

    assert table(ours) == table(theirs)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("fields", VARIANTS)
def test_same_derived_values(fields: dict[str, Any]) -> None:
    ours, theirs = HookedTransformerConfig(**SIZES, **fields), TheirHooked(**SIZES, **fields)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.is_layer_norm_activation() == theirs.is_layer_norm_activation()


@pytest.mark.parametrize("fields", [{}, {"d_mlp": 3, "n_heads": 2, "device": "cpu"}])
def test_same_derived_values_of_the_base(fields: dict[str, Any]) -> None:
    assert TransformerLensConfig(**SIZES, **fields).to_dict() == TheirBase(**SIZES, **fields).to_dict()


@pytest.mark.parametrize("fields", REFUSED)
@pytest.mark.parametrize("build", [lambda cls, fields: cls(**fields), lambda cls, fields: cls.from_dict(fields)])
def test_refusals_have_the_type_raised_there(fields: dict[str, Any], build: Any) -> None:
    with pytest.raises(Exception) as theirs:
        build(TheirHooked, {**SIZES, **fields})
    with pytest.raises(theirs.type):
        build(HookedTransformerConfig, {**SIZES, **fields})


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_conversions_behave_alike(ours: Any, theirs: Any) -> None:
    fields = {**SIZES, "eps": 1e-3}
    for cls, base in ((ours, TransformerLensConfig), (theirs, TheirBase)):
        config = cls(**fields)
        assert cls.unwrap(config) is config
        assert cls.unwrap(dict(fields)) == config
        assert cls.unwrap(base(**fields)).eps == 1e-3
        assert isinstance(cls.from_dict(dict(fields)), cls)
    # The hooked config hands out its own __dict__, the base a copy.
    mine, yours = ours(**SIZES), theirs(**SIZES)
    assert (mine.to_dict() is mine.__dict__) == (yours.to_dict() is yours.__dict__)


def test_repr_shows_the_same_text_up_to_number_types() -> None:
    # TransformerLens computes two square roots with numpy and shows "np.float64(2.0)".
    ours, theirs = HookedTransformerConfig(**SIZES), TheirHooked(**SIZES)
    theirs.attn_scale, theirs.initializer_range = float(theirs.attn_scale), float(theirs.initializer_range)
    assert repr(ours) == repr(theirs)


# --- the config of a bridge -------------------------------------------------------------------------------------------

BRIDGES: list[dict[str, Any]] = [
    {},
    {"d_vocab": 17, "architecture": "GPT2LMHeadModel", "use_attn_result": True, "d_mlp": 9, "device": "cpu"},
    {"init_mode": "xavier_uniform", "rotary_base": 5e5, "dtype": None, "act_fn": "no such function"},
    {
        "initializer_range": 0.02,
        "dtype": torch.float16,
        "positional_embedding_type": "rotary",
        "rmsnorm_uses_offset": True,
    },
    {"n_heads": 7, "n_key_value_heads": 1, "attn_scale": 3.0, "default_prepend_bos": False, "seed": 4},
]


def test_a_bridges_config_has_the_same_parameters() -> None:
    def table(cls: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.default, p.kind) for p in inspect.signature(cls.__init__).parameters.values()]

    assert table(TransformerBridgeConfig) == table(TheirBridge)
    assert issubclass(TransformerBridgeConfig, TransformerLensConfig)


@pytest.mark.parametrize("fields", BRIDGES)
def test_a_bridges_config_holds_the_same_values(fields: dict[str, Any]) -> None:
    ours, theirs = TransformerBridgeConfig(**SIZES, **fields), TheirBridge(**SIZES, **fields)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.head_dim == theirs.head_dim
    assert pickle.loads(pickle.dumps(ours)).to_dict() == ours.to_dict()
    for config, cls in ((ours, TransformerBridgeConfig), (theirs, TheirBridge)):
        again = cls.from_dict({**config.to_dict(), "no_such_field": 1})
        assert type(again) is cls and again.to_dict() == config.to_dict()
        assert (again == config) and (cls(**{**SIZES, "n_ctx": 9}) != config)


@pytest.mark.parametrize("fields", [{"d_head": 7}, {"architecture": 3}, {"no_such_field": 1}])
def test_a_bridges_config_refuses_the_same(fields: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:
        TheirBridge(**{**SIZES, **fields})
    with pytest.raises(theirs.type):
        TransformerBridgeConfig(**{**SIZES, **fields})
