"""Does a value read as in a model with the processed weights, and is an edit of it written back as that model has it?

Such a model is written out here: one function that computes every activation from the weights the lens shows, and lets
an edit replace each. The lens computes the same with HuggingFace's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.basis import HeadMaps, Stream
from lensbridge.processing import Processing

PROCESSINGS = {
    "none": Processing(),
    "fold_ln": Processing(fold_ln=True),
    "writing": Processing(center_writing_weights=True),
    "unembed": Processing(center_unembed=True),
    "value biases": Processing(fold_value_biases=True),
    "default": Processing(True, True, True, True, False),
    "refactored": Processing(refactor_factored_attn_matrices=True),
    "all": Processing(True, True, True, True, True),
}
Edit = Callable[[str, Tensor], Tensor]


def normed(x: Tensor, w: dict[str, Tensor], prefix: str, show: Edit) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    scale = show(f"{prefix}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
    n = show(f"{prefix}.hook_normalized", x / scale)
    return n * w[f"{prefix}.w"] + w[f"{prefix}.b"] if f"{prefix}.w" in w else n


def written_out(w: dict[str, Tensor], tokens: Tensor, show: Edit) -> Tensor:
    """Logits of GPT-2 with the weights ``w``; ``show(name, value)`` sees every activation and may replace it."""
    positions = w["pos_embed.W_pos"][: tokens.shape[1]].expand(len(tokens), -1, -1)
    x = show("hook_embed", w["embed.W_E"][tokens]) + show("hook_pos_embed", positions)
    for layer in range(2):
        block, at = f"blocks.{layer}", f"blocks.{layer}.attn"
        x = show(f"{block}.hook_resid_pre", x)
        q, k, v = (
            show(
                f"{at}.hook_{letter}",
                torch.einsum("bpm,hmd->bphd", normed(x, w, f"{block}.ln1", show), w[f"{at}.W_{letter.upper()}"])
                + w[f"{at}.b_{letter.upper()}"],
            )
            for letter in "qkv"
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = show(f"{at}.hook_attn_scores", scores.masked_fill(future, -torch.inf))
        pattern = show(f"{at}.hook_pattern", scores.softmax(-1).nan_to_num(0.0))
        z = show(f"{at}.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        result = show(f"{at}.hook_result", torch.einsum("bqhd,hdm->bqhm", z, w[f"{at}.W_O"]))
        x = show(f"{block}.hook_resid_mid", x + show(f"{block}.hook_attn_out", result.sum(2) + w[f"{at}.b_O"]))
        n = normed(show(f"{block}.hook_mlp_in", x), w, f"{block}.ln2", show)
        hidden = show(f"{block}.mlp.hook_pre", n @ w[f"{block}.mlp.W_in"] + w[f"{block}.mlp.b_in"])
        post = show(f"{block}.mlp.hook_post", torch.nn.functional.gelu(hidden, approximate="tanh"))
        out = show(f"{block}.hook_mlp_out", post @ w[f"{block}.mlp.W_out"] + w[f"{block}.mlp.b_out"])
        x = show(f"{block}.hook_resid_post", x + out)
    x = show("unembed.hook_in", normed(x, w, "ln_final", show))
    return show("unembed.hook_out", x @ w["unembed.W_U"] + w["unembed.b_U"])


def close(found: Tensor, expected: Tensor) -> bool:
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    expected, found = expected[finite], found[finite]
    return float((found - expected).abs().max()) <= 1e-9 * max(1.0, float(expected.abs().max()))


@pytest.fixture(params=PROCESSINGS)
def shown(request: pytest.FixtureRequest, lens: Any) -> Any:
    # In double precision, so that what rounding does under an ill-conditioned map is no question.
    lens.to(torch.float64)
    lens.set_processing(PROCESSINGS[request.param])
    lens.set_use_attn_result(True)
    lens.set_use_hook_mlp_in(True)
    return lens


@torch.no_grad()
def test_every_activation_reads_as_with_the_processed_weights(shown: Any, tokens: Tensor) -> None:
    expected: dict[str, Tensor] = {}
    logits = written_out(shown.state_dict(), tokens, lambda name, value: expected.setdefault(name, value))
    found, cache = shown.run_with_cache(tokens)
    assert set(cache) == set(expected)
    assert [name for name in expected if not close(cache[name], expected[name])] == []
    assert close(found, logits)


def tilted(value: Tensor) -> Tensor:
    return value * torch.linspace(0.6, 1.5, value.shape[-1], dtype=value.dtype)


def noisy(value: Tensor) -> Tensor:
    """Far from zero mean along every axis; masked scores stay masked."""
    return value + 0.5 + torch.randn(value.shape, generator=torch.Generator().manual_seed(9))


def one_entry(value: Tensor) -> Tensor:
    value = value.clone()
    value[0, 2] = torch.linspace(-1.0, 2.5, value.shape[-1])
    return value


POINTS = [
    "hook_embed", "hook_pos_embed", "blocks.1.hook_resid_pre", "blocks.0.ln1.hook_scale",
    "blocks.1.ln1.hook_normalized", "blocks.0.attn.hook_q", "blocks.1.attn.hook_k", "blocks.0.attn.hook_v",
    "blocks.0.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.0.attn.hook_z", "blocks.0.attn.hook_result",
    "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_in", "blocks.1.ln2.hook_scale",
    "blocks.0.ln2.hook_normalized", "blocks.1.mlp.hook_pre", "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out",
    "blocks.0.hook_resid_post", "ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in",
    "unembed.hook_out",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("shown", ["none", "value biases", "default", "all"], indirect=True)
@pytest.mark.parametrize("change", [tilted, noisy, one_entry], ids=lambda change: change.__name__)
def test_an_edit_does_what_it_would_with_the_processed_weights(shown: Any, tokens: Tensor, change: Callable) -> None:
    weights, wrong = shown.state_dict(), []
    plain = shown(tokens)
    for point in POINTS:
        activations: dict[str, Tensor] = {}

        def show(name: str, value: Tensor, point: str = point, activations: dict = activations) -> Tensor:
            activations[name] = change(value) if name == point else value
            return activations[name]

        expected = written_out(weights, tokens, show)
        with shown.hooks([(point, lambda value, hook: change(value))]):
            logits, cache = shown.run_with_cache(tokens)
        assert not close(logits, plain), point
        wrong += [f"{name} after {point}" for name in activations if not close(cache[name], activations[name])]
        wrong += [] if close(logits, expected) else [f"logits after {point}"]
    assert wrong == []


@torch.no_grad()
def test_a_row_whose_scores_are_all_masked_attends_to_nothing(shown: Any, tokens: Tensor) -> None:
    point = "blocks.0.attn.hook_attn_scores"

    def masked(name: str, value: Tensor) -> Tensor:
        if name == point:
            value = value.clone()
            value[:, 1, 3:5] = -torch.inf
        return value

    expected = written_out(shown.state_dict(), tokens, masked)
    with shown.hooks([(point, lambda value, hook: masked(point, value))]):
        assert close(shown(tokens), expected)
        pattern = shown.run_with_cache(tokens)[1]["blocks.0.attn.hook_pattern"]
    assert not pattern[:, 1, 3:5].any() and torch.allclose(pattern[:, 1, 2].sum(-1), torch.ones(2).double())


@torch.no_grad()
def test_edits_at_many_points_at_once(shown: Any, tokens: Tensor) -> None:
    chosen = [point for point in POINTS if not point.endswith("hook_scale")]

    def show(name: str, value: Tensor) -> Tensor:
        return value * 0.9 + 0.05 if name in chosen else value

    expected = written_out(shown.state_dict(), tokens, show)
    hooks = [(point, lambda value, hook: value * 0.9 + 0.05) for point in chosen]
    assert close(shown.run_with_hooks(tokens, fwd_hooks=hooks), expected)


def test_parameters_get_the_gradients_of_what_was_computed(lens: Any, tokens: Tensor) -> None:
    """Against finite differences, because an edit changes how much of a folded bias reaches the output."""
    lens.to(torch.float64, print_details=False)
    lens.set_use_attn_result(True)
    layer = lens.hf_model.transformer.h[0]
    parameters = [layer.ln_1.weight, layer.ln_1.bias, layer.attn.c_attn.weight, layer.attn.c_attn.bias]
    parameters += [layer.attn.c_proj.weight, layer.attn.c_proj.bias]
    for name in ("v", "z", "pattern", "result"):
        hooks = [(f"blocks.0.attn.hook_{name}", lambda value, hook: tilted(value))]

        def loss(hooks: Any = hooks) -> Tensor:
            return lens.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss")

        gradients = torch.autograd.grad(loss(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            generator = torch.Generator().manual_seed(1)
            step = 1e-5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            with torch.no_grad():
                parameter.add_(step)
                above = loss()
                parameter.sub_(2 * step)
                below = loss()
                parameter.add_(step)
            assert float((gradient * step).sum()) == pytest.approx(float((above - below) / 2), rel=1e-4, abs=1e-12), (
                name
            )


# --- the pieces ------------------------------------------------------------------------------------------------------


def test_a_centred_stream_has_the_mean_that_edits_bring_in() -> None:
    torch.manual_seed(0)
    x, stream = torch.randn(2, 3, 4) + 5, Stream(centred=True)
    centred = x - x.mean(-1, keepdim=True)
    assert torch.equal(stream.read(x), centred)
    edited = centred + 2
    stream.written(edited)
    assert torch.allclose(stream.read(edited + 100), edited, atol=1e-4)
    branch = torch.randn(2, 3, 4) + 1
    stream.branch_written(branch)
    assert torch.allclose(stream.read_branch(branch - 7), branch, atol=1e-5)
    stream.add_branch()
    assert torch.allclose(stream.read(edited + branch), edited + branch, atol=1e-5)
    # The next branch has no edit's mean of its own, and adds none.
    assert torch.allclose(stream.read_branch(branch).mean(-1), torch.zeros(2, 3), atol=1e-6)
    stream.add_branch()
    assert torch.allclose(stream.read(edited + branch), edited + branch, atol=1e-5)


def test_a_branchs_mean_counts_from_zero_where_the_stream_has_none() -> None:
    stream = Stream(centred=True)
    stream.branch_written(torch.ones(1, 1, 4))
    stream.add_branch()
    assert torch.allclose(stream.read(torch.zeros(1, 1, 4)), torch.ones(1, 1, 4))


def test_a_stream_that_is_not_centred_is_passed_on_as_it_is() -> None:
    x, stream = torch.randn(2, 3, 4), Stream(centred=False)
    stream.written(x + 3)
    stream.branch_written(x + 3)
    stream.add_branch()
    assert stream.read(x) is x and stream.read_branch(x) is x and stream.mean is None


def test_maps_are_inverted_but_for_what_a_head_does_not_write() -> None:
    full = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = full.clone()
    flat[:, :, 2] = 0
    maps = HeadMaps(full, full * 2, flat)
    back = maps.inverse()
    unit = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    assert torch.allclose(full @ back.q, unit) and torch.allclose(2 * full @ back.k, unit)
    assert back.v.isfinite().all() and torch.allclose(flat @ back.v @ flat, flat)
    assert maps.to(torch.float32).v.dtype == torch.float32


def test_a_head_that_writes_nothing_survives_refactoring(hf: Any, lens: Any, tokens: Tensor) -> None:
    lens.to(torch.float64)
    with torch.no_grad():
        hf.transformer.h[0].attn.c_proj.weight[5:10] = 0
        hf.transformer.h[1].attn.c_attn.weight[:, 20:25] = 0
        expected = lens(tokens)
        lens.set_processing(PROCESSINGS["all"])
        with lens.hooks([(lambda name: "attn.hook" in name, lambda value, hook: value * 1.0)]):
            assert close(lens(tokens), expected)


def test_value_bias_follows_the_parameters(hf: Any, lens: Any) -> None:
    basis, attention = lens.interior.basis, hf.transformer.h[0].attn
    before = basis.value_bias(0)
    with torch.no_grad():
        attention.c_attn.bias[40:] += 1
    assert torch.allclose(basis.value_bias(0), before + 1)
    norm = hf.transformer.h[0].ln_1.bias
    expected = attention.c_attn.bias[40:] + norm @ attention.c_attn.weight[:, 40:]
    assert torch.allclose(basis.value_bias(0).flatten(), expected, atol=1e-6)
    lens.set_processing(Processing(fold_value_biases=True))
    assert torch.equal(basis.value_bias(0).flatten(), attention.c_attn.bias[40:])
    lens.set_processing(Processing(fold_ln=True))
    assert basis.value_bias(0) is None


def test_head_maps_follow_the_parameters_and_are_made_once(hf: Any, lens: Any) -> None:
    basis = lens.interior.basis
    assert basis.head_maps(0) is None
    lens.set_processing(PROCESSINGS["all"])
    first = basis.head_maps(0)
    again = basis.head_maps(0)
    assert first is not None and again is not None and first[0] is again[0]
    with torch.no_grad():
        hf.transformer.h[0].attn.c_attn.weight.mul_(1.1)
    changed = basis.head_maps(0)
    assert changed is not None and not torch.equal(changed[0].q, first[0].q)
