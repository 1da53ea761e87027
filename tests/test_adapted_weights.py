"""Are weights in other names read and written by an adapter's conversions, and by nothing else?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lensbridge.adapted_weights import component_path, from_transformer_lens, through, to_transformer_lens
from lensbridge.conversion_utils.conversion_steps import TransposeTensorConversion
from lensbridge.conversion_utils.param_processing_conversion import ParamProcessingConversion

ADAPTER: Any = SimpleNamespace(
    weight_processing_conversions={
        "blocks.{i}.mlp.in": ParamProcessingConversion(TransposeTensorConversion()),
        "blocks.{i}.mlp.out.weight": "mlp.c_proj",
    }
)


@pytest.mark.parametrize(("name", "path"), [
    ("blocks.3.attn.W_Q", "blocks.3.attn.q.weight"), ("blocks.3.attn._b_V", "blocks.3.attn.v.bias"),
    ("blocks.3.mlp.W_gate", "blocks.3.mlp.gate.weight"), ("embed.W_E", "embed.weight"),
    ("blocks.3.ln1.b", "blocks.3.ln1.bias"), ("blocks.3.attn.mask", "blocks.3.attn.mask"), ("W_Q", "W_Q"),
])  # fmt: skip
def test_where_a_component_keeps_a_weight(name: str, path: str) -> None:
    assert component_path(name) == path


def test_only_what_has_a_conversion_is_converted() -> None:
    w = {f"blocks.1.mlp.{part}.weight": torch.rand(2, 3) for part in ("in", "out", "gate")}
    for path, weight in w.items():
        there = to_transformer_lens(path, w, weight, ADAPTER)
        assert there is not None and there.shape == ((3, 2) if ".in." in path else (2, 3))
        assert torch.equal(from_transformer_lens(path, there, ADAPTER), weight)  # type: ignore[arg-type]
        assert to_transformer_lens(path, w, weight, None) is weight
    assert to_transformer_lens("blocks.1.mlp.in.bias", w, None, ADAPTER) is None
    assert from_transformer_lens("blocks.1.mlp.in.weight", None, ADAPTER) is None
    assert to_transformer_lens("blocks.1.mlp.in.weight", {}, None, ADAPTER) is None


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_what_is_not_changed_stays_the_same_object(adapter: Any) -> None:
    name = "blocks.0.mlp.W_in" if adapter is None else "blocks.0.mlp.in.weight"
    given = {name: torch.rand(2, 3), "other": torch.rand(1), "ln_final.w": torch.rand(1)}
    before = dict(given)
    shapes = []

    def change(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shapes.append(tuple(w["blocks.0.mlp.W_in"].shape))
        return {**w, "blocks.0.mlp.W_in": w["blocks.0.mlp.W_in"] * 2}

    after = through(adapter, given, SimpleNamespace(n_layers=1), change)
    assert shapes == [(2, 3) if adapter is None else (3, 2)]
    assert torch.equal(after[name], before[name] * 2) and given == before
    assert after["other"] is given["other"] and after.keys() == given.keys()
