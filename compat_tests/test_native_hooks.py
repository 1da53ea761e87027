"""Do hooks in a native model do what they do in TransformerLens 3.9.0: edits, gradients, switches, half precision?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compat_tests.comparison import close, relative_difference
from compat_tests.native_models import NativePair, agree_in_a_run, agree_in_gradients, caching, native_pair
from lensbridge import HookPoint

TOKENS = torch.randint(0, 17, (2, 7), generator=torch.Generator().manual_seed(4))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"n_layers": 1, "use_hook_mlp_in": True, "use_attn_result": True},
    "RMS, rotary, groups, gated": {
        "n_layers": 1,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "n_key_value_heads": 1,
        "gated_mlp": True,
        "use_split_qkv_input": True,
    },
    "shortformer, solu_ln": {
        "n_layers": 1,
        "positional_embedding_type": "shortformer",
        "act_fn": "solu_ln",
        "use_attn_in": True,
    },
    "parallel": {"n_layers": 1, "parallel_attn_mlp": True, "normalization_type": "LNPre"},
}


def points_of(kind: str) -> list[str]:
    mine = native_pair(**KINDS[kind]).mine
    with caching(mine) as cache, torch.no_grad():
        mine(TOKENS)
    return list(cache)


EDITS = [(kind, point) for kind in KINDS for point in points_of(kind)]


def module_at(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def logits_of(pair: NativePair) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.mine(TOKENS).logits, pair.theirs(TOKENS)


def scaled(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    return tensor * 0.7


def scaled_in_place(tensor: torch.Tensor, hook: Any) -> None:
    tensor[:, -1] *= 1.5


class OnSecondCall:
    """Replaces the value on one of the calls of a run only: queries, keys and values pass ``ln1`` in this order."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: torch.Tensor, hook: Any) -> torch.Tensor | None:
        self.calls += 1
        return tensor * 0.5 if self.calls == 2 else None


@pytest.mark.parametrize(
    "make", [lambda: scaled, lambda: scaled_in_place, OnSecondCall], ids=["new", "in place", "2nd"]
)
@pytest.mark.parametrize(("kind", "point"), EDITS)
def test_an_edit_at_every_point(kind: str, point: str, make: Any) -> None:
    pair = native_pair(**KINDS[kind])
    hooks = []
    for model in (pair.mine, pair.theirs):
        hooks.append(make())
        module_at(model, point).add_hook(hooks[-1])
    with torch.no_grad():
        mine, theirs = logits_of(pair)
    close("logits", mine, theirs)
    if isinstance(hooks[0], OnSecondCall):
        assert hooks[0].calls == hooks[1].calls


@pytest.mark.parametrize(("kind", "point"), EDITS)
def test_the_gradient_at_every_point(kind: str, point: str) -> None:
    """What backward hooks are given, and what becomes of the parameters when they scale it."""
    pair = native_pair(**KINDS[kind])
    seen: list[list[torch.Tensor]] = []
    for model in (pair.mine, pair.theirs):
        found: list[torch.Tensor] = []
        seen.append(found)

        def hook(gradient: torch.Tensor, hook: Any, found: list[torch.Tensor] = found) -> torch.Tensor:
            found.append(gradient.clone())
            return gradient * 0.5

        module_at(model, point).add_hook(hook, dir="bwd")
    agree_in_gradients(pair, TOKENS)
    mine, theirs = seen
    assert len(mine) == len(theirs) > 0
    # Two calls of one point (queries and keys at ln1) may come back in either order.
    largest = max(gradient.abs().max() for gradient in theirs)
    for gradient in theirs:
        assert (
            min(relative_difference(other, gradient) for other in mine) < 1e-4 or gradient.abs().max() < 1e-4 * largest
        )


def test_what_is_captured_in_a_norm_has_a_gradient() -> None:
    pair = native_pair(n_layers=1)
    gradients = []
    for model, run in ((pair.mine, lambda: pair.mine(TOKENS).logits), (pair.theirs, lambda: pair.theirs(TOKENS))):
        captured: list[torch.Tensor] = []
        for name in ("blocks.0.ln2.hook_normalized", "ln_final.hook_scale"):
            module_at(model, name).add_hook(lambda tensor, hook, captured=captured: captured.append(tensor))
        loss = run().square().sum()
        gradients.append(torch.autograd.grad(loss, captured))
    for mine, theirs in zip(*gradients, strict=True):
        close("gradient", mine, theirs)


def test_switches_work_between_runs() -> None:
    pair = native_pair()
    for flags in (
        {"use_attn_result": True},
        {"use_split_qkv_input": True},
        {"use_split_qkv_input": False, "use_attn_in": True},
        {"use_attn_in": False, "use_hook_mlp_in": True},
        {"use_attn_result": False},
    ):
        pair.set(**flags)
        agree_in_a_run(pair, TOKENS)
    pair = native_pair(n_heads=4, n_key_value_heads=2)
    for value in (True, False):
        pair.set(ungroup_grouped_query_attention=value)
        agree_in_a_run(pair, TOKENS)


@pytest.mark.parametrize("point", ["attn.hook_attn_scores", "attn.hook_q", "attn.hook_pattern", "hook_resid_pre"])
def test_values_that_are_no_numbers(point: str) -> None:
    pair = native_pair(n_layers=1)

    def spoil(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0, 1, 2] = torch.nan
        return tensor

    for model in (pair.mine, pair.theirs):
        module_at(model, f"blocks.0.{point}").add_hook(spoil)
    agree_in_a_run(pair, TOKENS)


def test_rows_without_any_key() -> None:
    pair = native_pair()
    agree_in_a_run(pair, TOKENS, torch.tensor([[0] * 7, [0, 0, 1, 1, 0, 1, 1]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Dtypes agree at every point, and values are as near to those in float32 as TransformerLens' are."""
    pair = native_pair(**KINDS[kind], dtype=dtype)
    exact = native_pair(**KINDS[kind])
    exact.mine.load_state_dict(pair.mine.state_dict())
    with caching(pair.mine) as mine, caching(exact.mine) as true, torch.no_grad():
        pair.mine(TOKENS)
        exact.mine(TOKENS)
    _, theirs = pair.theirs.run_with_cache(TOKENS)
    assert list(mine) == list(theirs.cache_dict)
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        # Where the two round is chance; three times the other's error is within it.
        allowed = 3 * relative_difference(value, true[name]) + torch.finfo(dtype).eps
        assert relative_difference(mine[name], true[name]) <= allowed, name


def test_looking_changes_no_bit() -> None:
    mine = native_pair().mine
    with torch.no_grad():
        alone = mine(TOKENS).logits
        with caching(mine):
            watched = mine(TOKENS).logits
    assert torch.equal(alone, watched)
    assert not any(point.has_hooks() for point in mine.modules() if isinstance(point, HookPoint))
