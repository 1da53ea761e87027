"""Do adding, ordering, scoping and removing hooks work as in 3.9.0?

Every fact is asserted on both models. What differs on purpose is marked ``ours_only``: a point asked for by name that
does not exist, or whose flag is off, is an error here wherever the name is given, where 3.9.0 is silent in some places.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from compat_tests.comparison import template
from compat_tests.conftest import Pairs
from compat_tests.test_points import POINTS, active_points

RESID = "blocks.1.hook_resid_pre"


def shift(amount: float) -> Any:
    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + amount

    return add


def unused(value: torch.Tensor, hook: Any) -> None:
    """A hook that only has to be attached."""


@pytest.fixture
def tokens(pairs: Pairs) -> torch.Tensor:
    return pairs.get().tokens()


def cached(model: Any, tokens: torch.Tensor, name: str) -> torch.Tensor:
    _, cache = model.run_with_cache(tokens, names_filter=name)
    return cache[name]


def test_the_point_is_passed_by_keyword(model: Any, tokens: torch.Tensor) -> None:
    def other_name(value: torch.Tensor, point: Any) -> None: ...

    with pytest.raises(TypeError):
        model.run_with_hooks(tokens, fwd_hooks=[(RESID, other_name)])
    seen = []
    model.run_with_hooks(tokens, fwd_hooks=[(RESID, lambda value, **keywords: seen.append(keywords["hook"].name))])
    assert seen == [RESID]


def test_what_may_be_a_hook(model: Any, tokens: torch.Tensor) -> None:
    """A partial, a bound method and a callable object, each given the point itself."""

    class Recorder:
        def __init__(self) -> None:
            self.points: list[Any] = []

        def method(self, value: torch.Tensor, hook: Any) -> None:
            self.points.append(hook)

        def __call__(self, value: torch.Tensor, hook: Any) -> None:
            self.points.append(hook)

    recorder = Recorder()

    def with_argument(value: torch.Tensor, hook: Any, head: int) -> None:
        recorder.points.append(hook)
        assert head == 3

    hooks = [(RESID, recorder), (RESID, recorder.method), (RESID, functools.partial(with_argument, head=3))]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert recorder.points == [model.hook_dict[RESID]] * 3


def test_none_keeps_and_rebinding_does_nothing(model: Any, tokens: torch.Tensor) -> None:
    def rebind(value: torch.Tensor, hook: Any) -> None:
        value = value * 0

    expected = model(tokens)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(RESID, rebind)]), expected)


def test_order_of_hooks(model: Any, tokens: torch.Tensor) -> None:
    """Order of addition, permanent and temporary ones in one row; ``prepend`` goes first."""
    order: list[str] = []

    def note(label: str) -> Any:
        def hook_function(value: torch.Tensor, hook: Any) -> None:
            order.append(label)

        return hook_function

    model.add_hook(RESID, note("added"))
    model.add_perma_hook(RESID, note("permanent"))
    model.add_hook(RESID, note("first"), prepend=True)
    with model.hooks(fwd_hooks=[(RESID, note("context"))]):
        model.run_with_hooks(tokens, fwd_hooks=[(RESID, note("run 1")), (RESID, note("run 2"))])
    assert order == ["first", "added", "permanent", "context", "run 1", "run 2"]
    model.reset_hooks(including_permanent=True)


def test_a_cache_holds_the_value_after_earlier_hooks(model: Any, tokens: torch.Tensor) -> None:
    before = cached(model, tokens, RESID)
    with model.hooks(fwd_hooks=[(RESID, shift(2.0))]):
        torch.testing.assert_close(cached(model, tokens, RESID), before + 2)
    assert not model.list_hooks()
    torch.testing.assert_close(cached(model, tokens, RESID), before)


def test_an_in_place_edit_shows_in_the_cache_of_its_point(model: Any, tokens: torch.Tensor) -> None:
    def set_zero(value: torch.Tensor, hook: Any) -> None:
        value[:, 2] = 0

    with torch.no_grad(), model.hooks(fwd_hooks=[(RESID, set_zero)]):
        value = cached(model, tokens, RESID)
    assert (value[:, 2] == 0).all()
    assert (value[:, 3] != 0).any()


def test_a_raising_hook_leaves_nothing_behind(model: Any, tokens: torch.Tensor) -> None:
    def fail(value: torch.Tensor, hook: Any) -> None:
        raise ZeroDivisionError("from the hook")

    expected = model(tokens)
    for name in active_points((), 2):
        with pytest.raises(ZeroDivisionError, match="from the hook"):
            model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", shift(1)), (name, fail)])
        assert model.list_hooks() == {}
        assert model.context_level == 0
    assert torch.equal(model(tokens), expected)


def test_a_bad_name_later_in_the_list_leaves_nothing_behind(model: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        model.run_with_hooks(tokens, fwd_hooks=[(RESID, unused), ("nowhere", unused)])
    with pytest.raises(KeyError), model.hooks(fwd_hooks=[(RESID, unused)], bwd_hooks=[("nowhere", unused)]):
        pass
    assert model.list_hooks() == {}
    assert model.context_level == 0


def test_number_of_calls_per_forward(model: Any, tokens: torch.Tensor) -> None:
    calls: dict[str, int] = {}

    def count(value: torch.Tensor, hook: Any) -> None:
        calls[hook.name] = calls.get(hook.name, 0) + 1

    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, count)])
    assert set(POINTS["fires_per_forward"].values()) == {3}
    assert calls == {name: POINTS["fires_per_forward"].get(template(name), 1) for name in active_points((), 2)}


def test_points_fire_in_the_order_of_the_computation(model: Any, tokens: torch.Tensor) -> None:
    fired: list[str] = []
    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, lambda value, hook: fired.append(hook.name))])
    assert list(dict.fromkeys(fired)) == active_points((), 2)
    norms = [name for name in fired if name.startswith("blocks.0.ln1") or name.startswith("blocks.0.attn")]
    assert norms[:6] == ["blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"] * 3


def test_filter_functions_see_the_names_in_hook_dict_order(model: Any, tokens: torch.Tensor) -> None:
    asked: list[str] = []

    def accept(name: str) -> bool:
        asked.append(name)
        return False

    model.run_with_hooks(tokens, fwd_hooks=[(accept, unused)])
    assert asked == list(model.hook_dict)


def test_a_filter_that_matches_nothing_is_silent(model: Any, tokens: torch.Tensor) -> None:
    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: False, unused)])


NOT_POINTS = ["blocks.0.attn", "embed", "ln_final"]


def test_errors_of_run_with_hooks(model: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(KeyError, match="blocks.7.hook_resid_pre"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.7.hook_resid_pre", unused)])
    for name in NOT_POINTS:
        with pytest.raises(TypeError):
            model.run_with_hooks(tokens, fwd_hooks=[(name, unused)])


def test_errors_of_add_hook(model: Any) -> None:
    with pytest.raises(KeyError):
        model.add_hook("blocks.0.attn.hook_qq", unused)
    for name in NOT_POINTS:
        with pytest.raises(AssertionError):
            model.add_hook(name, unused)
    with pytest.raises(TypeError):
        model.add_hook([RESID], unused)
    with pytest.raises(ValueError, match="sideways"):
        model.add_hook(RESID, unused, dir="sideways")
    assert model.list_hooks() == {}


BEHIND_FLAGS = ["attn.hook_result", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_attn_in"]


@pytest.mark.parametrize("name", BEHIND_FLAGS)
def test_add_hook_on_a_disabled_point(model: Any, name: str) -> None:
    with pytest.raises(AssertionError, match="use_"):
        model.add_hook(f"blocks.0.{name}", unused)
    assert model.list_hooks() == {}


@pytest.mark.ours_only
@pytest.mark.parametrize("name", BEHIND_FLAGS)
def test_a_disabled_point_is_an_error_everywhere(pairs: Pairs, tokens: torch.Tensor, name: str) -> None:
    """Where 3.9.0 takes the hook and never calls it."""
    from lensbridge.errors import DisabledPointError

    model = pairs.get().ours
    point = f"blocks.1.{name}"
    for call in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(point, unused)]),
        lambda: model.run_with_hooks(tokens, bwd_hooks=[(point, unused)]),
        lambda: model.hooks(fwd_hooks=[(point, unused)]).__enter__(),
        lambda: model.add_hook(point, unused),
        lambda: model.run_with_cache(tokens, names_filter=point),
        lambda: model.run_with_cache(tokens, names_filter=["hook_embed", point]),
        lambda: model.run_with_cache(tokens, names_filter=[point], incl_bwd=True, return_type="loss"),
    ):
        with pytest.raises(DisabledPointError, match="set_use_") as caught:
            call()
        assert isinstance(caught.value, KeyError)
        assert isinstance(caught.value, AssertionError)
        assert model.list_hooks() == {}
        assert model.context_level == 0


@pytest.mark.ours_only
@pytest.mark.parametrize("name", ["blocks.1.attn.hook_zz", "blocks.9.hook_resid_pre", "resid_pre", "hook_resid"])
def test_an_unknown_point_is_an_error_everywhere(pairs: Pairs, tokens: torch.Tensor, name: str) -> None:
    """Where 3.9.0 returns an empty cache."""
    from lensbridge.errors import UnknownPointError

    model = pairs.get().ours
    for call in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(name, unused)]),
        lambda: model.add_hook(name, unused),
        lambda: model.run_with_cache(tokens, names_filter=name),
        lambda: model.run_with_cache(tokens, names_filter=["hook_embed", name]),
    ):
        with pytest.raises(UnknownPointError) as caught:
            call()
        assert name in str(caught.value)
        assert isinstance(caught.value, KeyError)
        assert model.list_hooks() == {}


@pytest.mark.ours_only
def test_an_unknown_point_names_the_near_misses(pairs: Pairs, tokens: torch.Tensor) -> None:
    model = pairs.get().ours
    with pytest.raises(KeyError, match="blocks.1.attn.hook_z"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_zz", unused)])


@pytest.mark.ours_only
def test_a_filter_function_selects_among_the_points_that_are_on(pairs: Pairs, tokens: torch.Tensor) -> None:
    """3.9.0's ``add_hook`` raises at the first disabled point, after having attached the hook to those before."""
    model = pairs.get().ours
    model.add_hook(lambda name: True, unused)
    assert set(model.list_hooks()) == set(active_points((), 2))
    model.reset_hooks()


def test_filter_functions_of_add_hook(model: Any) -> None:
    model.add_hook(lambda name: name.endswith("hook_z"), unused)
    assert list(model.list_hooks()) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    model.reset_hooks()


def test_run_with_hooks_does_not_call_the_module(model: Any, tokens: torch.Tensor) -> None:
    """It calls ``forward``, so torch hooks on the root do not run; ``run_with_cache`` calls the module."""
    calls = []
    handle = model.register_forward_hook(lambda *arguments: calls.append(1))
    model.run_with_hooks(tokens)
    assert calls == []
    model.run_with_cache(tokens, names_filter="hook_embed")
    model(tokens)
    assert calls == [1, 1]
    handle.remove()


def test_list_hooks(model: Any) -> None:
    model.add_hook(RESID, unused)
    model.add_hook("hook_embed", unused, dir="bwd")
    model.add_perma_hook("hook_embed", unused)
    everything = model.list_hooks()
    assert {name: len(handles) for name, handles in everything.items()} == {"hook_embed": 2, RESID: 1}
    assert list(model.list_hooks("hook_embed")) == ["hook_embed"]
    assert list(model.list_hooks([RESID, "hook_pos_embed"])) == [RESID]
    assert len(model.list_hooks(dir="bwd")["hook_embed"]) == 1
    assert len(model.list_hooks(including_permanent=False)["hook_embed"]) == 1
    handle = everything[RESID][0]
    assert (handle.is_permanent, handle.context_level, handle.user_hook) == (False, None, unused)
    model.reset_hooks(including_permanent=True)
    assert model.list_hooks() == {}


def test_layer_of_a_point(model: Any) -> None:
    assert model.hook_dict["blocks.1.attn.hook_q"].layer() == 1
    with pytest.raises(ValueError, match=".+"):
        model.hook_dict["ln_final.hook_scale"].layer()
    with pytest.raises(IndexError):
        model.hook_dict["hook_embed"].layer()


def test_repr_of_a_point(model: Any) -> None:
    point = model.hook_dict[RESID]
    assert repr(point) == f"HookPoint(name='{RESID}')"
    model.add_hook(RESID, unused)
    model.add_hook(RESID, unused, dir="bwd")
    assert repr(point) == f"HookPoint(name='{RESID}', 1 fwd, 1 bwd)"
    assert (point.has_hooks(), point.has_hooks("bwd"), point.has_hooks(level=1)) == (True, True, False)
    model.reset_hooks()


def test_context_dictionary(model: Any, tokens: torch.Tensor) -> None:
    """``hook.ctx`` persists over runs until a reset clears it."""

    def count(value: torch.Tensor, hook: Any) -> None:
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1

    point = model.hook_dict[RESID]
    model.run_with_hooks(tokens, fwd_hooks=[(RESID, count)])
    model.run_with_hooks(tokens, fwd_hooks=[(RESID, count)])
    model.run_with_cache(tokens, names_filter=RESID)
    assert point.ctx == {"runs": 2}
    model.run_with_hooks(tokens, fwd_hooks=[(RESID, count)], clear_contexts=True, reset_hooks_end=False)
    assert point.ctx == {"runs": 3}
    model.reset_hooks(clear_contexts=False)
    assert point.ctx == {"runs": 3}
    model.run_with_hooks(tokens, clear_contexts=True)
    assert point.ctx == {}
    point.ctx["kept"] = True
    model.reset_hooks()
    assert point.ctx == {}


def test_levels(model: Any, tokens: torch.Tensor) -> None:
    """A context removes the hooks of its own level only; hooks of no level survive runs."""
    model.add_hook(RESID, unused)
    model.add_hook(RESID, unused, level=1)
    with model.hooks(fwd_hooks=[("hook_embed", unused)]) as inside:
        assert inside is model
        assert model.context_level == 1
        with model.hooks(fwd_hooks=[("hook_embed", unused)]):
            assert model.context_level == 2
            levels = [handle.context_level for handle in model.list_hooks()["hook_embed"]]
            assert levels == [1, 2]
        assert [handle.context_level for handle in model.list_hooks()["hook_embed"]] == [1]
    assert [handle.context_level for handle in model.list_hooks()[RESID]] == [None]
    model.reset_hooks()


def test_hooks_left_by_one_run_are_removed_by_the_next(model: Any, tokens: torch.Tensor) -> None:
    model.run_with_hooks(tokens, fwd_hooks=[(RESID, shift(1))], reset_hooks_end=False)
    assert [handle.context_level for handle in model.list_hooks()[RESID]] == [1]
    shifted = model(tokens)
    model.run_with_cache(tokens, names_filter="hook_embed")
    assert model.list_hooks() == {}
    assert not torch.equal(model(tokens), shifted)


def test_permanent_hooks(model: Any, tokens: torch.Tensor) -> None:
    expected = model(tokens)
    model.add_perma_hook("blocks.0.mlp.hook_post", shift(0.5))
    changed = model(tokens)
    assert not torch.equal(changed, expected)
    model.reset_hooks()
    model.run_with_hooks(tokens, fwd_hooks=[(RESID, unused)])
    assert torch.equal(model(tokens), changed)
    model.reset_hooks(including_permanent=True, level=5)
    assert torch.equal(model(tokens), expected)


def test_reset_hooks_by_direction(model: Any) -> None:
    model.add_hook(RESID, unused)
    model.add_hook(RESID, unused, dir="bwd")
    model.reset_hooks(direction="fwd")
    assert repr(model.hook_dict[RESID]) == f"HookPoint(name='{RESID}', 1 bwd)"
    model.remove_all_hook_fns()
    assert model.list_hooks() == {}


def test_hooks_of_the_points_themselves(model: Any, tokens: torch.Tensor) -> None:
    """A point is reached as an attribute, and hooks can be added to and removed from it alone."""
    expected = model(tokens)
    point = model.blocks[0].attn.hook_z
    assert point is model.hook_dict["blocks.0.attn.hook_z"]
    point.add_hook(lambda value, hook: value * 0)
    point.add_perma_hook(unused)
    assert not torch.equal(model(tokens), expected)
    point.remove_hooks()
    assert torch.equal(model(tokens), expected)
    point.remove_hooks("both", including_permanent=True)
    assert not point.has_hooks()


def test_caching_inside_a_context_sees_edits_and_keeps_them(model: Any, tokens: torch.Tensor) -> None:
    with model.hooks(fwd_hooks=[(RESID, shift(1))]):
        _, cache = model.run_with_cache(tokens)
        assert list(model.list_hooks()) == [RESID]
    _, plain = model.run_with_cache(tokens)
    torch.testing.assert_close(cache[RESID], plain[RESID] + 1)


def test_default_arguments_of_a_hook_may_hold_other_values(model: Any, tokens: torch.Tensor) -> None:
    """Lambdas with bound loop variables, the usual way to hook every layer."""
    seen = []
    hooks = [
        (f"blocks.{layer}.hook_resid_post", lambda value, hook, layer=layer: seen.append(layer)) for layer in range(2)
    ]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert seen == [0, 1]


def test_a_hook_may_run_another_forward(model: Any, tokens: torch.Tensor) -> None:
    """Nested use: a hook calls one of the model's components on the value it got."""
    out = []
    hook = lambda value, hook: out.append(model.unembed(model.ln_final(value)))  # noqa: E731
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", hook)])
    assert out[0].shape == (2, 9, 320)
