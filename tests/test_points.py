"""Does the table of hook points say the truth about a run?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge import points


def test_names_are_in_firing_order_and_numbered_by_layer() -> None:
    found = points.names(2)
    assert found[:3] == ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre"]
    assert found[-1] == "unembed.hook_out"
    assert len(found) == len(set(found))
    of_layer = [[name for name in found if name.startswith(f"blocks.{layer}.")] for layer in range(2)]
    assert [name.replace("blocks.0", "blocks.1") for name in of_layer[0]] == of_layer[1]
    assert found.index(of_layer[0][-1]) < found.index(of_layer[1][0])
    outside = [point for point in points.POINTS if not point.in_layer and point.needs in (None, *points.GPT2_FEATURES)]
    assert points.names(0) == [point.name for point in outside]


def test_points_exist_with_the_features_that_they_need() -> None:
    plain, rotary = points.names([points.GPT2_LAYER]), points.names([points.GPT2_LAYER | {"rotary", "gate"}])
    assert set(rotary) - set(plain) == {
        "blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k", "blocks.0.mlp.hook_pre_linear"
    }  # fmt: skip
    other = points.GPT2_LAYER - {"norms before", "norm before MLP"}
    after, before = points.names([other | {"norms after"}]), points.names(1)
    assert sorted(before) == sorted(after)
    assert before.index("blocks.0.ln1.hook_scale") < before.index("blocks.0.attn.hook_q")
    assert after.index("blocks.0.ln1.hook_scale") > after.index("blocks.0.attn.hook_z")


def test_layers_of_several_kinds() -> None:
    attention, recurrence = points.GPT2_LAYER, points.GPT2_LAYER - {"attention", "queries", "heads out"}
    found = points.names([recurrence, attention])
    assert "blocks.0.attn.hook_z" not in found and "blocks.1.attn.hook_z" in found
    assert "blocks.0.hook_attn_out" in found and "blocks.0.hook_mlp_out" in found


def test_the_points_of_experts_come_expert_by_expert() -> None:
    layer = points.GPT2_LAYER - {"neurons"} | {"experts", "expert neurons", "expert gates"}
    found = [name.removeprefix("blocks.0.mlp.") for name in points.names([layer], n_experts=2) if ".mlp." in name]
    assert found == [
        *("hook_expert_weights", "hook_expert_indices"),
        *(f"experts.0.hook_{name}" for name in ("gate", "pre", "post")),
        *(f"experts.1.hook_{name}" for name in ("gate", "pre", "post")),
    ]


def test_every_feature_says_why_a_point_without_it_is_not_there() -> None:
    assert {point.needs for point in points.POINTS} - {None} == set(points.ABSENT)
    parallel = points.GPT2_LAYER - {"sequential"}
    reason = points.why_absent("blocks.1.hook_resid_mid", [points.GPT2_LAYER, parallel], ())
    assert reason == points.ABSENT["sequential"]
    assert points.why_absent("hook_pos_embed", [], ()) == points.ABSENT["learned positions"]
    for unknown in ("blocks.2.hook_resid_mid", "blocks.0.hook_resid_mid", "blocks.0.hook_middle"):
        assert points.why_absent(unknown, [points.GPT2_LAYER, parallel], ()) is None


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("blocks.3.attn.hook_q", "blocks.{l}.attn.hook_q"),
        ("blocks.12.hook_resid_pre", "blocks.{l}.hook_resid_pre"),
        ("hook_embed", "hook_embed"),
        ("ln_final.hook_scale", "ln_final.hook_scale"),
        ("blocks.2.mlp.experts.11.hook_pre", "blocks.{l}.mlp.experts.{e}.hook_pre"),
        ("blocks", "blocks"),
        ("blocks.x.hook_q", "blocks.x.hook_q"),
    ],
)
def test_template_of_a_name(name: str, template: str) -> None:
    assert points.template(name) == template


def test_point_of_a_name() -> None:
    found = points.point_of("blocks.3.attn.hook_result")
    assert found is not None and found.flag == "use_attn_result" and found.in_layer
    assert points.point_of("blocks.3.attn.hook_nothing") is None
    assert points.point_of("blocks.hook_resid_pre") is None


def test_every_flag_has_a_setter_on_the_model(lens: Any) -> None:
    assert {point.flag for point in points.POINTS} - {None} == set(points.FLAG_SETTERS)
    for flag, setter in points.FLAG_SETTERS.items():
        getattr(lens, setter)(True)
        assert getattr(lens.cfg, flag) is True


def test_the_model_has_these_points_and_no_others(lens: Any) -> None:
    assert set(lens.hook_dict) == set(points.names(lens.cfg.n_layers))


def test_a_run_fires_all_of_them_in_this_order_with_these_shapes(lens: Any, tokens: torch.Tensor) -> None:
    for setter in points.FLAG_SETTERS.values():
        getattr(lens, setter)(True)
    _, cache = lens.run_with_cache(tokens)
    assert list(cache) == points.names(2)
    cfg = lens.cfg
    sizes = {
        "batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "head": cfg.n_heads, "d_model": cfg.d_model,
        "d_head": cfg.d_head, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab, "1": 1,
    }  # fmt: skip
    for name, value in cache.items():
        described = points.point_of(name).shape.split()  # type: ignore[union-attr]
        if "ln1" in name:  # each head's copy of the input has a norm of its own
            described.insert(2, "head")
        assert list(value.shape) == [sizes[axis] for axis in described], name
