"""Do hooks get onto a user's own module, and off it again?

The module is a small MLP that knows nothing of transformers: what is tested is `HookedRootModule` by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookedRootModule, HookPoint
from lensbridge.errors import LensbridgeError, UnknownPointError
from lensbridge.utilities.slice import Slice


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_post(torch.tanh(self.hook_pre(self.linear(x))))


class SmallMLP(HookedRootModule):
    """Two layers on [batch, pos, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.hook_out = HookPoint()
        self.setup()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.hook_out(x * scale)


NAMES = ["layers.0.hook_pre", "layers.0.hook_post", "layers.1.hook_pre", "layers.1.hook_post", "hook_out"]


@pytest.fixture
def model() -> SmallMLP:
    return SmallMLP()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def zero(tensor: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(tensor)


def failing(tensor: Tensor, hook: HookPoint) -> None:
    raise ZeroDivisionError("in a hook")


def clean(model: HookedRootModule) -> bool:
    return not model.list_hooks() and model.context_level == 0


def test_setup_names_every_module_and_finds_the_points(model: SmallMLP) -> None:
    assert set(model.hook_dict) == set(NAMES)
    assert set(model.mod_dict) == {name for name, _ in model.named_modules() if name}
    assert all(model.mod_dict[name].name == name for name in model.mod_dict)
    assert list(model.hook_points()) == list(model.hook_dict.values())


def test_setup_again_finds_what_was_added(model: SmallMLP) -> None:
    model.hook_late = HookPoint()
    assert "hook_late" not in model.hook_dict
    model.setup()
    assert model.hook_dict["hook_late"].name == "hook_late"


# --- running ---------------------------------------------------------------------------------------------------------


def test_run_with_hooks_changes_the_run_and_nothing_after_it(model: SmallMLP, x: Tensor) -> None:
    before = model(x)
    out = model.run_with_hooks(x, scale=2.0, fwd_hooks=[("layers.1.hook_post", lambda t, hook: t + 1)])
    assert torch.allclose(out, 2 * (before + 1))
    assert torch.equal(model(x), before) and clean(model)


def test_a_predicate_hooks_every_point_it_accepts(model: SmallMLP, x: Tensor) -> None:
    seen: list[str] = []
    hook = lambda t, hook: seen.append(hook.name)  # noqa: E731
    model.run_with_hooks(x, fwd_hooks=[(lambda name: name.endswith("post"), hook)])
    assert seen == ["layers.0.hook_post", "layers.1.hook_post"]
    model.run_with_hooks(x, fwd_hooks=[(lambda name: False, failing)])


def test_contexts_nest_and_remove_only_their_own_hooks(model: SmallMLP, x: Tensor) -> None:
    seen: list[int] = []
    model.add_hook("hook_out", lambda t, hook: seen.append(0))
    with model.hooks([("hook_out", lambda t, hook: seen.append(1))]) as inside:
        assert inside is model and model.context_level == 1
        with model.hooks([("hook_out", lambda t, hook: seen.append(2))]):
            model(x)
        model.run_with_hooks(x, fwd_hooks=[("hook_out", lambda t, hook: seen.append(3))])
        assert model.context_level == 1
    model(x)
    assert seen == [0, 1, 2, 0, 1, 3, 0]
    model.reset_hooks()
    assert clean(model)


def test_hooks_may_outlive_their_context_on_request(model: SmallMLP, x: Tensor) -> None:
    with model.hooks([("hook_out", zero)], reset_hooks_end=False):
        pass
    assert model(x).abs().sum() == 0 and model.context_level == 0
    # They belong to level 1, so the next context of that level takes them away.
    model.run_with_hooks(x)
    assert model(x).abs().sum() > 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_a_hook_leaves_no_hooks(model: SmallMLP, x: Tensor, error: type[BaseException]) -> None:
    def hook(tensor: Tensor, hook: HookPoint) -> None:
        raise error("stop")

    before = model(x)
    for run in (
        lambda: model.run_with_hooks(x, fwd_hooks=[("hook_out", hook)]),
        lambda: model.run_with_hooks(x, fwd_hooks=[("layers.0.hook_pre", zero), ("layers.1.hook_pre", hook)]),
    ):
        with pytest.raises(error):
            run()
        assert clean(model) and torch.equal(model(x), before)


def test_a_bad_name_later_in_the_list_leaves_no_hooks(model: SmallMLP, x: Tensor) -> None:
    with pytest.raises(KeyError):
        model.run_with_hooks(x, fwd_hooks=[("hook_out", zero), ("hook_oout", zero)])
    assert clean(model)
    with pytest.raises(KeyError), model.hooks(fwd_hooks=[("hook_out", zero)], bwd_hooks=[("nowhere", zero)]):
        pass
    assert clean(model)


def test_an_exception_in_a_cached_run_leaves_no_hooks(model: SmallMLP) -> None:
    with pytest.raises(RuntimeError):
        model.run_with_cache(torch.zeros(2, 3, 5))
    assert clean(model) and not model.is_caching


def test_contexts_of_points_are_cleared_on_request(model: SmallMLP, x: Tensor) -> None:
    keep = ("hook_out", lambda t, hook: hook.ctx.update(seen=True))
    model.run_with_hooks(x, fwd_hooks=[keep])
    assert model.hook_out.ctx == {"seen": True}
    model.run_with_hooks(x, fwd_hooks=[keep], clear_contexts=True)
    assert model.hook_out.ctx == {}
    model.hook_out.ctx["a"] = 1
    model.reset_hooks(clear_contexts=False)
    assert model.hook_out.ctx == {"a": 1}
    model.reset_hooks()
    assert model.hook_out.ctx == {}


# --- attaching -------------------------------------------------------------------------------------------------------


def test_add_hook_stays_until_reset(model: SmallMLP, x: Tensor) -> None:
    model.add_hook("hook_out", lambda t, hook: t * 0 + 1)
    model.add_hook("hook_out", lambda t, hook: t + 1, prepend=True)
    model.run_with_hooks(x)
    assert torch.equal(model(x), torch.ones(2, 3, 4))
    model.reset_hooks()
    assert clean(model)


def test_permanent_hooks_survive_a_reset(model: SmallMLP) -> None:
    model.add_perma_hook("hook_out", zero)
    model.add_perma_hook(lambda name: "pre" in name, zero, dir="bwd")
    model.reset_hooks()
    assert set(model.list_hooks()) == {"hook_out", "layers.0.hook_pre", "layers.1.hook_pre"}
    assert model.list_hooks(including_permanent=False) == {}
    model.reset_hooks(direction="bwd", including_permanent=True)
    assert set(model.list_hooks()) == {"hook_out"}
    model.remove_all_hook_fns(including_permanent=True)
    assert clean(model)


def test_removal_by_level(model: SmallMLP) -> None:
    for level in (1, 2):
        model.add_hook("hook_out", zero, level=level)
    model.reset_hooks(level=2)
    assert [handle.context_level for handle in model.hook_out.fwd_hooks] == [1]


def test_a_subclass_can_refuse_a_hook(x: Tensor) -> None:
    class Strict(SmallMLP):
        def check_hooks_to_add(self, hook_point: HookPoint, hook_point_name: str, *rest: Any, **more: Any) -> None:
            if hook_point_name == "hook_out":
                raise AssertionError("not here")

    model = Strict()
    for run in (
        lambda: model.add_hook("hook_out", zero),
        lambda: model.run_with_hooks(x, fwd_hooks=[("hook_out", zero)]),
        lambda: model.run_with_cache(x, names_filter="hook_out"),
    ):
        with pytest.raises(AssertionError, match="not here"):
            run()
        assert clean(model)
    model.add_hook("layers.0.hook_pre", zero)
    model.reset_hooks()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["layers.0.hook_pree", "layer.0.hook_pre", "layers.5.hook_pre"])
def test_an_unknown_name_is_an_error_that_names_the_closest(model: SmallMLP, x: Tensor, wrong: str) -> None:
    for ask in asks(model, x, wrong):
        with pytest.raises(UnknownPointError) as caught:
            ask()
        assert isinstance(caught.value, KeyError) and clean(model)
        assert f"SmallMLP has no hook point {wrong!r}. Closest: layers." in str(caught.value)
        assert "layers.0.hook_pre" in str(caught.value)


def asks(model: SmallMLP, x: Tensor, name: str) -> list[Callable]:
    return [
        lambda: model.add_hook(name, zero),
        lambda: model.add_perma_hook(name, zero),
        lambda: model.run_with_hooks(x, fwd_hooks=[(name, zero)]),
        lambda: model.run_with_hooks(x, bwd_hooks=[(name, zero)]),
        lambda: model.hooks([(name, zero)]).__enter__(),
        lambda: model.run_with_cache(x, names_filter=name),
        lambda: model.run_with_cache(x, names_filter=["hook_out", name]),
        lambda: model.add_caching_hooks(name),
    ]


def test_a_module_that_is_no_hook_point_is_an_error(model: SmallMLP, x: Tensor) -> None:
    for error, ask in (
        (AssertionError, lambda: model.add_hook("layers.0.linear", zero)),
        (TypeError, lambda: model.run_with_hooks(x, fwd_hooks=[("layers.0.linear", zero)])),
        (AssertionError, lambda: model.run_with_cache(x, names_filter="layers.0.linear")),
    ):
        with pytest.raises(error, match="is a Linear, not a hook point"):
            ask()
        assert clean(model)


def test_other_wrong_arguments(model: SmallMLP, x: Tensor) -> None:
    with pytest.raises(TypeError, match="a name or to a predicate"):
        model.add_hook(["hook_out"], zero)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid direction"):
        model.add_hook("hook_out", zero, dir="both")  # type: ignore[arg-type]
    for wrong in (("hook_out",), {"hook_out"}, 3):
        with pytest.raises(ValueError, match="names_filter must be"):
            model.run_with_cache(x, names_filter=wrong)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="names_filter must be"):
            model.add_caching_hooks(wrong)  # type: ignore[arg-type]
    assert clean(model)


# --- caches ----------------------------------------------------------------------------------------------------------


def test_run_with_cache_keeps_every_activation(model: SmallMLP, x: Tensor) -> None:
    out, cache = model.run_with_cache(x, scale=3.0)
    assert list(cache) == NAMES
    assert torch.equal(out, model(x, scale=3.0)) and torch.equal(cache["hook_out"], out)
    assert torch.equal(cache["layers.0.hook_pre"], model.layers[0].linear(x))
    assert out.requires_grad and not any(value.requires_grad for value in cache.values())
    assert clean(model)


@pytest.mark.parametrize(
    ("names_filter", "kept"),
    [
        (None, NAMES),
        ("hook_out", ["hook_out"]),
        (["hook_out", "layers.0.hook_pre"], ["layers.0.hook_pre", "hook_out"]),
        (lambda name: "post" in name, ["layers.0.hook_post", "layers.1.hook_post"]),
        ([], []),
        (lambda name: False, []),
    ],
)
def test_names_filter(model: SmallMLP, x: Tensor, names_filter: Any, kept: list[str]) -> None:
    assert list(model.run_with_cache(x, names_filter=names_filter)[1]) == kept


def test_gradients_are_cached_with_incl_bwd(model: SmallMLP, x: Tensor) -> None:
    model.register_forward_hook(lambda module, args, out: out.sum())
    loss, cache = model.run_with_cache(x, incl_bwd=True)
    assert list(cache) == NAMES + [f"{name}_grad" for name in reversed(NAMES)]
    assert torch.equal(cache["hook_out_grad"], torch.ones(2, 3, 4))
    expected = torch.ones(2, 3, 4) * (1 - cache["layers.1.hook_post"] ** 2)
    assert torch.allclose(cache["layers.1.hook_pre_grad"], expected)
    assert clean(model) and model.layers[0].linear.weight.grad is not None


def test_remove_batch_dim_keeps_the_first_row(model: SmallMLP, x: Tensor) -> None:
    whole, first = model.run_with_cache(x)[1], model.run_with_cache(x, remove_batch_dim=True)[1]
    assert all(torch.equal(first[name], whole[name][0]) for name in NAMES)


@pytest.mark.parametrize(
    ("pos_slice", "index"),
    [(1, slice(1, 2)), ((1, 3), slice(1, 3)), ([0, 2], [0, 2]), (Slice(1), 1), (-1, slice(2, 3)), (None, slice(None))],
)
def test_positions_are_sliced_on_the_second_axis_from_the_end(
    model: SmallMLP, x: Tensor, pos_slice: Any, index: Any
) -> None:
    whole, some = model.run_with_cache(x)[1], model.run_with_cache(x, pos_slice=pos_slice)[1]
    assert all(torch.equal(some[name], whole[name][:, index]) for name in NAMES)


def test_device_moves_the_copies(model: SmallMLP, x: Tensor) -> None:
    cache = model.run_with_cache(x, device="meta")[1]
    assert {value.device.type for value in cache.values()} == {"meta"}


def test_caching_hooks_fill_on_every_run_until_reset(model: SmallMLP, x: Tensor) -> None:
    mine: dict[str, Tensor] = {}
    cache = model.add_caching_hooks(["hook_out"], cache=mine)
    assert cache is mine and model.is_caching
    model(x)
    first = cache["hook_out"]
    model(x * 2)
    assert not torch.equal(cache["hook_out"], first)
    model.reset_hooks()
    assert clean(model) and not model.is_caching


def test_get_caching_hooks_are_for_a_context(model: SmallMLP, x: Tensor) -> None:
    cache, forward, backward = model.get_caching_hooks("hook_out", incl_bwd=True)
    with model.hooks(forward, backward):
        model(x).sum().backward()
    assert set(cache) == {"hook_out", "hook_out_grad"}
    assert model.get_caching_hooks("hook_out")[2] == []


def test_the_old_caching_methods_still_work(model: SmallMLP, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    everything: dict[str, Tensor] = {}
    some: dict[str, Tensor] = {}
    with caplog.at_level(logging.WARNING):
        model.cache_all(everything)
        model.cache_some(some, lambda name: name == "hook_out")
    assert caplog.text.count("deprecated") == 2
    model(x)
    assert (list(everything), list(some)) == (NAMES, ["hook_out"])


def test_a_cache_holds_the_value_after_earlier_hooks(model: SmallMLP, x: Tensor) -> None:
    model.add_hook("layers.0.hook_post", zero)
    assert model.run_with_cache(x)[1]["layers.0.hook_post"].abs().sum() == 0
    model.reset_hooks()


# --- backward --------------------------------------------------------------------------------------------------------


def test_backward_hooks_work_in_a_context_and_warn_in_a_run(
    model: SmallMLP, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    halved = [("layers.1.hook_post", lambda gradient, hook: gradient / 2)]
    model(x).sum().backward()
    plain = model.layers[0].linear.weight.grad.clone()
    model.zero_grad()
    with caplog.at_level(logging.WARNING), model.hooks(bwd_hooks=halved):
        loss = model(x).sum()
        loss.backward()
    assert torch.allclose(model.layers[0].linear.weight.grad, plain / 2)
    assert caplog.text == "" and clean(model)
    with caplog.at_level(logging.WARNING):
        model.run_with_hooks(x, bwd_hooks=halved)
    assert "before a backward pass can run" in caplog.text


def test_everything_raised_on_purpose_has_one_base(model: SmallMLP) -> None:
    with pytest.raises(LensbridgeError):
        model.add_hook("nothing", zero)
