"""Can users put modules of their own into the model, and classes of their own around it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookedRootModule, HookedTransformer, HookPoint
from lensbridge.errors import UnknownPointError

OUT, Z, PRE = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"


class Coder(HookedRootModule):
    """Encodes the last axis and back, with points of its own."""

    def __init__(self, width: int, latents: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        self.encode = nn.Parameter(torch.randn(width, latents, generator=generator) * width**-0.5)
        self.decode = nn.Parameter(torch.randn(latents, width, generator=generator) * latents**-0.5)
        self.hook_in = HookPoint()
        self.hook_acts = HookPoint()
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_acts((self.hook_in(x) @ self.encode).relu()) @ self.decode


class Taking(HookedTransformer):
    """A model that modules can be put into."""

    def put(self, name: str, module: nn.Module) -> nn.Module:
        parent, _, last = name.rpartition(".")
        setattr(self.mod_dict[parent] if parent else self, last, module)
        self.setup()
        return module


@pytest.fixture(params=[False, True], ids=["raw", "processed"])
def taking(request: pytest.FixtureRequest, hf: Any, new_lens: Callable) -> Any:
    return new_lens(hf, raw=not request.param, cls=Taking)


def close(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_root_module_of_ones_own() -> None:
    coder = Coder(6)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    output, cache = coder.run_with_cache(x)
    assert list(cache) == ["hook_in", "hook_acts"]
    assert torch.equal(cache["hook_acts"] @ coder.decode, output)
    assert coder.run_with_hooks(x, fwd_hooks=[("hook_acts", lambda acts, hook: acts * 0)]).abs().max() == 0
    assert coder.list_hooks() == {}


@pytest.mark.parametrize("name", [OUT, Z, PRE, "hook_embed", "blocks.1.attn.hook_pattern", "unembed.hook_in"])
def test_a_module_does_what_a_hook_does(taking: Any, tokens: Tensor, name: str) -> None:
    """It gets the point's value in the active basis, and what it returns takes its place."""
    width = taking.run_with_cache(tokens)[1][name].shape[-1]
    coder = Coder(width)
    with taking.hooks([(name, lambda x, hook: coder(x))]):
        expected, cache = taking.run_with_cache(tokens)
    taking.put(name, coder)
    logits, mine = taking.run_with_cache(tokens)
    assert close(logits, expected)
    inner = [f"{name}.hook_in", f"{name}.hook_acts"]
    assert set(mine) == set(cache) - {name} | set(inner)
    assert all(close(mine[other], cache[other]) for other in mine if other not in inner)
    assert close(mine[inner[1]] @ coder.decode, cache[name])


def test_it_is_taken_off_again(taking: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    expected, before = taking.run_with_cache(tokens)
    taking.put(OUT, Coder(20))
    assert not close(taking(tokens), expected)
    taking.put(OUT, HookPoint())
    logits, after = taking.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert list(after) == list(before)
    assert_untouched(hf, taking)


def test_hooks_on_the_points_inside(taking: Any, tokens: Tensor) -> None:
    coder = taking.put(OUT, Coder(20))
    seen: list[tuple[int, str]] = []
    hooks = [
        (lambda name: name.endswith("hook_acts"), lambda x, hook: seen.append((x.shape[-1], hook.name))),
        (f"{OUT}.hook_acts", lambda x, hook: x * 0),
    ]
    with taking.hooks(hooks):
        _, cache = taking.run_with_cache(tokens)
    assert seen == [(11, f"{OUT}.hook_acts")]
    assert cache[f"{OUT}.hook_acts"].abs().max() == 0
    assert coder.hook_acts.name == f"{OUT}.hook_acts"
    with pytest.raises(UnknownPointError, match="hook_acts"):
        taking.run_with_hooks(tokens, fwd_hooks=[(f"{OUT}.hook_act", lambda x, hook: None)])


def test_gradients_reach_its_parameters_and_its_points(taking: Any, tokens: Tensor) -> None:
    coder = Coder(5)
    taking.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(Z, lambda x, hook: coder(x))]).backward()
    expected = [parameter.grad for parameter in coder.parameters()]
    coder.zero_grad()
    taking.put(Z, coder)
    _, cache = taking.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert all(close(p.grad, grad) for p, grad in zip(coder.parameters(), expected, strict=True))
    assert cache[f"{Z}.hook_acts_grad"].shape == cache[f"{Z}.hook_acts"].shape == (2, 7, 4, 11)
    assert [name for name, _ in taking.named_parameters()][-2:] == [f"{Z}.encode", f"{Z}.decode"]


def test_two_modules_and_plain_hooks_together(taking: Any, tokens: Tensor) -> None:
    first, second = Coder(20), Coder(5)
    halve = ("blocks.1.hook_mlp_out", lambda x, hook: x * 0.5)
    with taking.hooks([(OUT, lambda x, hook: first(x)), (Z, lambda x, hook: second(x)), halve]):
        expected = taking(tokens)
    taking.put(OUT, first)
    taking.put(Z, second)
    assert close(taking.run_with_hooks(tokens, fwd_hooks=[halve]), expected)


def test_a_point_for_the_mlps_input(taking: Any, tokens: Tensor) -> None:
    """As SAELens adds it: the same value in a run of the model and when the component is called by itself."""
    for block in taking.blocks:
        mlp, forward = block.mlp, block.mlp.forward
        mlp.hook_in = HookPoint()
        mlp.forward = lambda x, mlp=mlp, forward=forward: forward(mlp.hook_in(x))
    taking.setup()
    _, cache = taking.run_with_cache(tokens)
    expected = taking.blocks[1].ln2(cache["resid_mid", 1])
    assert close(cache["blocks.1.mlp.hook_in"], expected)
    names = list(cache)
    assert names.index("blocks.1.ln2.hook_normalized") < names.index("blocks.1.mlp.hook_in")
    assert names.index("blocks.1.mlp.hook_in") < names.index("blocks.1.mlp.hook_pre")
    assert close(taking.blocks[1].mlp(expected), cache["mlp_out", 1])
    only = taking.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_in")[1]
    assert close(only["blocks.1.mlp.hook_in"], expected)
    other = cache["blocks.0.mlp.hook_in"]
    moved = taking.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_in", lambda x, hook: other)])
    out = taking.blocks[1].mlp(other)
    assert close(moved, taking.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: out)]))
    with taking.trace(tokens):
        taking.blocks[1].mlp.hook_in.value = other
        traced = taking.unembed.hook_out.value.save()
    assert close(traced, moved)


def test_a_subclass_with_a_signature_of_its_own(hf: Any, new_lens: Callable, tokens: Tensor) -> None:
    class Own(HookedTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hook_own = HookPoint()
            self.runs = 0
            self.setup()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.runs += 1
            return self.hook_own(super().forward(*args, **kwargs))

    model = new_lens(hf, cls=Own)
    assert type(model) is Own
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache["hook_own"], cache["unembed.hook_out"])
    doubled = model.run_with_hooks(tokens, fwd_hooks=[("hook_own", lambda x, hook: 2 * x)])
    assert torch.equal(doubled, 2 * model(tokens))
    assert model.runs == 3
