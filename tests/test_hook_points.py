"""Who is called when a value passes a hook point, in which order, and with what effect on value and gradient?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lensbridge.hook_points
from lensbridge.hook_points import (
    HookFunction,
    HookIntrospectionMixin,
    HookPoint,
    LensHandle,
    ReadOnlyHook,
    as_predicate,
)
from lensbridge.hooked_root_module import HookedRootModule


def adding(amount: float) -> Callable:
    return lambda tensor, hook: tensor + amount


def times(factor: float) -> Callable:
    return lambda tensor, hook: tensor * factor


def point_named(name: str) -> HookPoint:
    point = HookPoint()
    point.name = name
    return point


# --- forward ---------------------------------------------------------------------------------------------------------


def test_without_hooks_a_point_is_the_identity() -> None:
    x = torch.ones(3)
    assert HookPoint()(x) is x


def test_hooks_run_in_order_of_addition_and_prepend_goes_first() -> None:
    point = HookPoint()
    point.add_hook(adding(1))
    point.add_hook(times(10))
    assert point(torch.tensor(1.0)) == 20
    point.add_hook(times(3), prepend=True)
    assert point(torch.tensor(1.0)) == 40
    assert [handle.user_hook for handle in point.fwd_hooks][0](torch.tensor(2.0), None) == 6


def test_none_keeps_the_tensor_and_edits_in_place_count() -> None:
    point, x = HookPoint(), torch.zeros(3)
    point.add_hook(lambda tensor, hook: tensor.__setitem__(0, 5.0))
    assert point(x) is x and x.tolist() == [5, 0, 0]


def test_the_point_is_passed_by_the_keyword_hook() -> None:
    point = point_named("blocks.4.hook_x")
    seen = []
    point.add_hook(lambda tensor, *, hook: seen.append(hook))
    point(torch.ones(1))
    assert seen == [point]
    point.add_hook(lambda tensor, other: None)
    with pytest.raises(TypeError):
        point(torch.ones(1))


def test_any_value_replaces_for_a_users_own_module() -> None:
    point = HookPoint()
    point.add_hook(lambda tensor, hook: "text")
    assert point(torch.ones(1)) == "text"


def test_a_direction_other_than_fwd_and_bwd_is_refused() -> None:
    point = HookPoint()
    for wrong in ("both", "forward", ""):
        with pytest.raises(ValueError, match="Invalid direction"):
            point.add_hook(adding(1), dir=wrong)  # type: ignore[arg-type]
    assert not point.has_hooks()
    for ask in (point.has_hooks, point.remove_hooks):
        with pytest.raises(ValueError, match="Invalid direction"):
            ask("forward")  # type: ignore[operator]


def test_the_protocol_recognises_functions() -> None:
    assert isinstance(adding(1), HookFunction)
    assert not isinstance(3, HookFunction)


# --- permanence, levels, removal -------------------------------------------------------------------------------------


def test_permanent_hooks_stay_until_removed_on_purpose() -> None:
    point = HookPoint()
    point.add_perma_hook(adding(1))
    point.add_perma_hook(adding(1), dir="bwd")
    point.add_hook(adding(2), level=1)
    point.remove_hooks("both")
    assert [handle.is_permanent for handle in (*point.fwd_hooks, *point.bwd_hooks)] == [True, True]
    point.remove_hooks("fwd", including_permanent=True)
    assert (point.fwd_hooks, len(point.bwd_hooks)) == ([], 1)
    point.remove_hooks("both", including_permanent=True, level=7)
    assert point.bwd_hooks == []


def test_removal_by_level_and_direction() -> None:
    point = HookPoint()
    for level in (None, 1, 2):
        point.add_hook(adding(1), level=level)
        point.add_hook(adding(1), dir="bwd", level=level)
    point.remove_hooks("fwd", level=1)
    assert [handle.context_level for handle in point.fwd_hooks] == [None, 2]
    assert len(point.bwd_hooks) == 3
    point.remove_hooks("bwd", level=2)
    assert [handle.context_level for handle in point.bwd_hooks] == [None, 1]
    point.remove_hooks()
    assert (point.fwd_hooks, len(point.bwd_hooks)) == ([], 2)


def test_has_hooks_asks_by_direction_permanence_and_level() -> None:
    point = HookPoint()
    assert not point.has_hooks()
    point.add_hook(adding(1), level=2)
    point.add_perma_hook(adding(1), dir="bwd")
    assert point.has_hooks() and point.has_hooks("fwd") and point.has_hooks("bwd")
    assert point.has_hooks(level=2) and not point.has_hooks(level=1)
    assert not point.has_hooks("bwd", including_permanent=False)
    assert point.has_hooks("both", including_permanent=False)


def test_a_handle_can_be_removed_by_itself() -> None:
    point = HookPoint()
    point.add_hook(adding(1))
    point.add_hook(adding(10))
    handle = point.fwd_hooks[0]
    assert isinstance(handle, LensHandle)
    handle.hook.remove()
    handle.hook.remove()
    assert point(torch.tensor(0.0)) == 10
    point.remove_hooks()
    assert point(torch.tensor(0.0)) == 0


def test_removing_a_hook_from_inside_a_hook() -> None:
    point = HookPoint()

    def once(tensor: Tensor, hook: HookPoint) -> Tensor:
        hook.remove_hooks()
        return tensor + 1

    point.add_hook(once)
    assert point(torch.tensor(0.0)) == 1
    assert point(torch.tensor(0.0)) == 0


def test_a_hook_that_removes_itself_does_not_make_the_next_be_passed_over() -> None:
    point = HookPoint()
    point.add_hook(lambda tensor, hook: hook.remove_hooks(level=1), level=1)
    point.add_hook(adding(1))
    assert point(torch.tensor(0.0)) == 1 and len(point.fwd_hooks) == 1


def test_the_same_function_may_be_attached_twice_and_removed_once() -> None:
    point, hook = HookPoint(), adding(1)
    point.add_hook(hook)
    point.add_hook(hook)
    assert point(torch.tensor(0.0)) == 2
    point.fwd_hooks[0].hook.remove()
    assert point(torch.tensor(0.0)) == 1


# --- what a point knows ----------------------------------------------------------------------------------------------


def test_ctx_persists_until_cleared() -> None:
    point = HookPoint()
    point.add_hook(lambda tensor, hook: hook.ctx.update(n=hook.ctx.get("n", 0) + 1))
    point(torch.ones(1))
    point(torch.ones(1))
    assert point.ctx == {"n": 2}
    point.clear_context()
    assert point.ctx == {}


def test_layer_is_read_off_the_name() -> None:
    assert point_named("blocks.11.attn.hook_q").layer() == 11
    for name, error in (("ln_final.hook_scale", ValueError), ("hook_embed", IndexError)):
        with pytest.raises(error):
            point_named(name).layer()
    with pytest.raises(ValueError, match="setup"):
        HookPoint().layer()


def test_repr_names_the_point_and_counts_hooks() -> None:
    point = point_named("hook_embed")
    assert repr(point) == "HookPoint(name='hook_embed')"
    point.add_hook(adding(1))
    point.add_hook(adding(1))
    point.add_hook(adding(1), dir="bwd")
    assert repr(point) == "HookPoint(name='hook_embed', 2 fwd, 1 bwd)"
    assert repr(HookPoint()) == "HookPoint()"


def test_aliases_call_the_hook_once_per_name() -> None:
    point = point_named("blocks.0.hook_old")
    seen = []

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        seen.append((hook.name, hook.layer(), float(tensor)))
        hook.ctx["seen"] = True
        return tensor * 2

    point.add_hook(hook, alias_names=["blocks.0.hook_a", "blocks.3.hook_b"])
    assert point(torch.tensor(1.0)) == 4
    assert seen == [("blocks.0.hook_a", 0, 1.0), ("blocks.3.hook_b", 3, 2.0)]
    assert point.ctx == {"seen": True} and point.name == "blocks.0.hook_old"
    assert point.fwd_hooks[0].user_hook is hook


def test_aliased_hooks_that_return_nothing_keep_the_tensor() -> None:
    point, x = HookPoint(), torch.ones(1)
    point.add_hook(lambda tensor, hook: None, alias_names=["a", "b"])
    assert point(x) is x


class Transposed:
    """A conversion as `enable_reshape` takes it."""

    def convert(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1)

    revert = convert


def test_a_reshape_stands_between_the_tensor_and_the_hooks() -> None:
    point, x, shapes = HookPoint(), torch.arange(6.0).reshape(2, 3), []

    def hook(tensor: Tensor, hook: HookPoint) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor * torch.tensor([1.0, 10.0])

    point.add_hook(hook)
    point.enable_reshape(Transposed())
    assert torch.equal(point(x), x * torch.tensor([[1.0], [10.0]]))
    point.enable_reshape()
    x_square = torch.ones(2, 2)
    assert torch.equal(point(x_square), x_square * torch.tensor([1.0, 10.0]))
    assert shapes == [(3, 2), (2, 2)]


def test_a_reshape_leaves_none_alone() -> None:
    point, x = HookPoint(), torch.ones(2, 3)
    point.add_hook(lambda tensor, hook: None)
    point.enable_reshape(Transposed())
    assert point(x) is x


# --- backward ---------------------------------------------------------------------------------------------------------


def gradient_of(point: HookPoint, x: Tensor, weight: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (point(leaf * 1.0) * weight).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


WEIGHT = torch.tensor([1.0, 2.0, 3.0])


def test_a_backward_hook_reads_the_gradient() -> None:
    point, seen = HookPoint(), []
    point.add_hook(lambda gradient, hook: seen.append(gradient.clone()), dir="bwd")
    assert torch.equal(gradient_of(point, torch.zeros(3), WEIGHT), WEIGHT)
    assert len(seen) == 1 and torch.equal(seen[0], WEIGHT)


@pytest.mark.parametrize("hook", [times(5), lambda gradient, hook: (gradient * 5,)], ids=["tensor", "tuple of one"])
def test_a_backward_hook_replaces_the_gradient(hook: Callable) -> None:
    point = HookPoint()
    point.add_hook(hook, dir="bwd")
    assert torch.equal(gradient_of(point, torch.zeros(3), WEIGHT), WEIGHT * 5)


def test_a_backward_hook_edits_the_gradient_in_place() -> None:
    point = HookPoint()

    def edit(gradient: Tensor, hook: HookPoint) -> None:
        gradient[0] = 7.0

    point.add_hook(edit, dir="bwd")
    assert gradient_of(point, torch.zeros(3), WEIGHT).tolist() == [7, 2, 3]


def test_forward_and_backward_hooks_on_one_point() -> None:
    point, seen = HookPoint(), []
    point.add_hook(times(10))
    point.add_hook(lambda gradient, hook: seen.append(gradient.clone()), dir="bwd")
    point.add_hook(lambda gradient, hook: gradient + 1, dir="bwd")
    # The hook sees the gradient of the output; what it returns is the gradient of the input, as for PyTorch's own
    # full backward hooks.
    assert torch.equal(gradient_of(point, torch.zeros(3), WEIGHT), WEIGHT + 1)
    assert torch.equal(seen[0], WEIGHT)


def test_backward_hooks_only_read_where_they_return_nothing() -> None:
    point = HookPoint()
    point.add_hook(times(10))
    point.add_hook(lambda gradient, hook: None, dir="bwd")
    assert torch.equal(gradient_of(point, torch.zeros(3), WEIGHT), WEIGHT * 10)


def test_every_backward_hook_is_shown_the_outputs_gradient_and_the_last_one_counts() -> None:
    point, seen = HookPoint(), []
    point.add_hook(lambda gradient, hook: seen.append(gradient.clone()) or gradient * 2, dir="bwd")
    point.add_hook(lambda gradient, hook: seen.append(gradient.clone()) or gradient * 3, dir="bwd")
    assert torch.equal(gradient_of(point, torch.zeros(3), WEIGHT), WEIGHT * 3)
    assert torch.equal(seen[0], seen[1])


def test_backward_hooks_do_nothing_where_no_gradient_flows() -> None:
    point, seen = HookPoint(), []
    point.add_hook(lambda gradient, hook: seen.append(gradient), dir="bwd")
    x = torch.ones(3)
    assert point(x) is x
    with torch.no_grad():
        leaf = torch.ones(3, requires_grad=True)
        assert point(leaf) is leaf
    assert seen == []


def test_backward_hooks_see_each_backward_pass() -> None:
    point, seen = HookPoint(), []
    point.add_hook(lambda gradient, hook: seen.append(float(gradient.sum())), dir="bwd")
    gradient_of(point, torch.zeros(3), WEIGHT)
    gradient_of(point, torch.zeros(3), WEIGHT * 2)
    assert seen == [6.0, 12.0]


# --- caches -----------------------------------------------------------------------------------------------------------


class Reader(ReadOnlyHook):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> None:
        self.seen.append(tensor)


def test_a_point_with_readers_only_says_so() -> None:
    point = HookPoint()
    assert point.only_reads
    point.add_hook(Reader())
    assert point.only_reads
    for change in (
        lambda: point.add_hook(adding(0)),
        lambda: point.add_hook(Reader(), dir="bwd"),
        lambda: point.register_forward_hook(lambda module, args, output: None),
    ):
        change()
        assert not point.only_reads
        point.remove_hooks("bwd")
        point.fwd_hooks[1:] = []
        assert len(point.fwd_hooks) == 1


def test_a_reader_is_handed_the_live_tensor() -> None:
    point, reader, x = HookPoint(), Reader(), torch.ones(2)
    point.add_hook(reader)
    assert point(x) is x and reader.seen[0] is x


def test_a_reader_has_to_say_what_it_does() -> None:
    with pytest.raises(TypeError, match="must define __call__"):
        ReadOnlyHook()(torch.ones(1), hook=HookPoint())


# --- the rest ---------------------------------------------------------------------------------------------------------


class Listed(HookIntrospectionMixin):
    def __init__(self) -> None:
        self.hook_dict = {name: point_named(name) for name in ("a.hook_x", "a.hook_y", "b.hook_x")}


def test_list_hooks_by_name_direction_and_permanence() -> None:
    model = Listed()
    assert model.list_hooks() == {}
    model.hook_dict["a.hook_x"].add_hook(adding(1))
    model.hook_dict["a.hook_x"].add_hook(adding(1), dir="bwd")
    model.hook_dict["b.hook_x"].add_perma_hook(adding(1))
    assert {name: len(handles) for name, handles in model.list_hooks().items()} == {"a.hook_x": 2, "b.hook_x": 1}
    assert set(model.list_hooks(including_permanent=False)) == {"a.hook_x"}
    assert set(model.list_hooks(dir="bwd")) == {"a.hook_x"}
    assert set(model.list_hooks(lambda name: name.startswith("b"))) == {"b.hook_x"}
    assert set(model.list_hooks("b.hook_x")) == {"b.hook_x"}
    assert model.list_hooks(["a.hook_y"]) == {}


def test_a_names_filter_of_any_kind_is_a_predicate() -> None:
    assert as_predicate(None)("anything")
    assert as_predicate("a")("a") and not as_predicate("a")("ab")
    assert as_predicate(["a", "b"])("b") and not as_predicate(["a", "b"])("c")
    assert as_predicate([])("a") is False
    assert as_predicate(str.isupper)("A")


def test_points_can_be_copied_and_pickled() -> None:
    point = point_named("hook_embed")
    assert pickle.loads(pickle.dumps(point)).name == "hook_embed"
    point.add_hook(times(2))
    twin = copy.deepcopy(point)
    twin.add_hook(adding(1))
    assert (twin(torch.tensor(1.0)), point(torch.tensor(1.0))) == (3, 2)
    twin.remove_hooks()
    assert (twin(torch.tensor(1.0)), point(torch.tensor(1.0))) == (1, 2)


def test_a_copy_follows_its_own_settings() -> None:
    point = HookPoint()
    point.add_hook(lambda tensor, hook: tensor * torch.tensor([1.0, 10.0]))
    twin = copy.deepcopy(point)
    twin.enable_reshape(Transposed())
    x = torch.ones(2, 2)
    assert torch.equal(point(x), torch.tensor([[1.0, 10.0], [1.0, 10.0]]))
    assert torch.equal(twin(x), torch.tensor([[1.0, 1.0], [10.0, 10.0]]))


def test_backward_scale_multiplies_what_backward_hooks_are_shown() -> None:
    point, seen = HookPoint(), []
    point.backward_scale = 3.0
    point.add_hook(lambda gradient, hook: seen.append(gradient.clone()), dir="bwd")
    assert torch.equal(gradient_of(point, torch.zeros(3), WEIGHT), WEIGHT)
    assert torch.equal(seen[0], WEIGHT * 3)


def test_the_root_module_is_found_here_too() -> None:
    assert lensbridge.hook_points.HookedRootModule is HookedRootModule
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lensbridge.hook_points.Nothing
