"""Are the names and shapes of older formats understood?"""

from __future__ import annotations

import pytest
import torch

from lensbridge.native.old_weights import converted


@pytest.mark.parametrize("architecture", ["neel", None, "redwood"])
def test_todays_format_is_left_alone(architecture: str | None) -> None:
    state = {"embed.W_E": torch.ones(3, 2), "blocks.0.ln1.w": torch.ones(2)}
    found = converted(state, architecture, n_layers=1, n_heads=1)
    assert found == state
    assert found is not state


@pytest.mark.parametrize(
    ("n_layers", "turned"), [(1, {"W_pos", "W_Q", "W_in"}), (6, {"W_pos", "W_Q", "W_in"}), (8, {"W_pos"}), (10, set())]
)
def test_the_first_solu_models(n_layers: int, turned: set[str]) -> None:
    shapes = {
        "pos_embed.W_pos": (5, 4),
        "blocks.0.attn.W_Q": (2, 4, 3),
        "blocks.0.mlp.W_in": (4, 7),
        "blocks.0.norm1.w": (4,),
        "blocks.0.mlp.ln.b": (7,),
        "norm.w": (4,),
        "unembed.b_U": (9,),
    }
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    found = converted(state, "neel-solu-old", n_layers, n_heads=2)
    names = {"blocks.0.norm1.w": "blocks.0.ln1.w", "norm.w": "ln_final.w"}
    assert list(found) == [names.get(name, name) for name in shapes]
    for name, value in state.items():
        same = value.transpose(-2, -1) if name.rsplit(".")[-1] in turned else value
        assert torch.equal(found[names.get(name, name)], same), name


def test_mingpt_computes_the_same_queries_and_outputs() -> None:
    d_model, n_heads, d_head = 6, 2, 3
    query, proj = torch.nn.Linear(d_model, d_model), torch.nn.Linear(d_model, d_model)
    state = {
        "blocks.3.attn.query.weight": query.weight,
        "blocks.3.attn.query.bias": query.bias,
        "blocks.3.attn.proj.weight": proj.weight,
        "blocks.3.attn.proj.bias": proj.bias,
        "blocks.3.mlp.2.weight": torch.randn(d_model, 9),
        "pos_emb": torch.randn(1, 5, d_model),
        "head.weight": torch.randn(7, d_model),
        "ln_f.weight": torch.randn(d_model),
        "blocks.3.ln2.bias": torch.randn(d_model),
        "blocks.3.attn.mask": torch.ones(1, 1, 5, 5),
    }
    found = converted(state, "mingpt", n_layers=4, n_heads=n_heads)
    assert sorted(found) == sorted(
        ["blocks.3.attn.W_Q", "blocks.3.attn.b_Q", "blocks.3.attn.W_O", "blocks.3.attn.b_O", "blocks.3.mlp.W_out"]
        + ["pos_embed.W_pos", "unembed.W_U", "ln_final.w", "blocks.3.ln2.b", "blocks.3.attn.mask"]
    )
    x = torch.randn(2, d_model)
    heads = torch.einsum("pm,hmd->phd", x, found["blocks.3.attn.W_Q"]) + found["blocks.3.attn.b_Q"]
    torch.testing.assert_close(heads, query(x).unflatten(-1, (n_heads, d_head)))
    z = torch.randn(2, n_heads, d_head)
    out = torch.einsum("phd,hdm->pm", z, found["blocks.3.attn.W_O"]) + found["blocks.3.attn.b_O"]
    torch.testing.assert_close(out, proj(z.flatten(1)))
    assert torch.equal(found["blocks.3.mlp.W_out"], state["blocks.3.mlp.2.weight"].T)
    assert found["pos_embed.W_pos"].shape == (5, d_model)
    assert found["unembed.W_U"].shape == (d_model, 7)
