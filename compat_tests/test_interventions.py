"""Does an edit at any point change everything downstream as it does in 3.9.0?"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from compat_tests.comparison import caches_close, close
from compat_tests.conftest import Pair, Pairs
from compat_tests.edits import EDITS, Hook, add_in_place, halve, in_place, noise, replace, shares_memory_with, zero
from compat_tests.rough_models import PROCESSINGS
from compat_tests.test_points import FLAGS, POINTS, active_points

DEFAULT_POINTS = active_points((), 2)
FLAG_POINTS = [name for name in active_points(FLAGS, 2) if name not in DEFAULT_POINTS]
#: An in-place edit there is checked with and without autograd: both kinds of run are common.
IN_PLACE = ("in place", "add in place")


def compare_runs(
    pair: Pair, hooks: list[tuple[str, tuple[Hook, Hook]]], tokens: torch.Tensor, unless: set[str] | None = None
) -> None:
    """Run both models under the hooks (ours, theirs) while caching everything, and compare all of it."""
    results = []
    for index, model in enumerate(pair.both):
        with model.hooks(fwd_hooks=[(name, both[index]) for name, both in hooks]):
            results.append(model.run_with_cache(tokens))
    mine, theirs = results
    caches_close(mine[1], theirs[1], unless or ())
    close("logits", mine[0], theirs[0])


def finite(point: str, edit: str) -> bool:
    """A scale set to zero divides by zero; that has a test of its own."""
    return not (edit == "zero" and point.endswith("hook_scale"))


def expressible(shape: str, processing: str, point: str) -> bool:
    """False where an edit can reach a direction that only the processed model has.

    With one head as wide as the model, centring leaves W_O one rank short of d_head. Refactoring then gives v and z a
    coordinate of singular value zero, whose direction is arbitrary and which HuggingFace's values cannot hold. What an
    edit puts there moves only the mean of the stream, so the logits still agree.
    """
    return not (shape == "one" and processing == "refactored" and point.endswith(("hook_v", "hook_z")))


def compare_edit(pair: Pair, point: str, edit: Hook, unless: set[str] | None = None) -> None:
    compare_runs(pair, [(point, (edit, edit))], pair.tokens(), unless)


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize(
    ("point", "edit"), [case for case in itertools.product(DEFAULT_POINTS, EDITS) if finite(*case)]
)
def test_edit_at_every_point(pairs: Pairs, point: str, edit: str, processing: str) -> None:
    pair = pairs.get("two", processing)
    shared = shares_memory_with(point, processing != "raw") if edit in IN_PLACE else set()
    for gradients in (True, False) if edit in IN_PLACE else (True,):
        with torch.set_grad_enabled(gradients):
            compare_edit(pair, point, EDITS[edit], shared)


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("point", DEFAULT_POINTS)
def test_patch_from_another_run(pairs: Pairs, point: str, processing: str) -> None:
    pair = pairs.get("two", processing)
    sources = [model.run_with_cache(pair.tokens(seed=1))[1] for model in pair.both]
    compare_runs(pair, [(point, (replace(sources[0]), replace(sources[1])))], pair.tokens())


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("point", FLAG_POINTS)
def test_edit_at_points_behind_flags(pairs: Pairs, point: str, edit: str, processing: str) -> None:
    flag = POINTS["needs_flag"][point.replace("0", "{l}").replace("1", "{l}")]
    compare_edit(pairs.get("two", processing, (flag,)), point, EDITS[edit])


@pytest.mark.parametrize("edit", [halve, noise, in_place])
@pytest.mark.parametrize("point", active_points(FLAGS, 2))
def test_edit_at_every_point_with_all_flags_on(pairs: Pairs, point: str, edit: Hook) -> None:
    """Among them: with split inputs and attn_in both on, an edit at hook_attn_in has no effect, as in 3.9.0."""
    shared = shares_memory_with(point, folded=True) if edit is in_place else set()
    compare_edit(pairs.get("two", "default", FLAGS), point, edit, shared)


@pytest.mark.slow
@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shape", ["one", "three", "relu", "exact gelu", "eps"])
@pytest.mark.parametrize("flags", [(), *((flag,) for flag in FLAGS), FLAGS], ids="+".join)
def test_edit_at_every_point_of_other_shapes(
    pairs: Pairs, shape: str, flags: tuple[str, ...], edit: str, processing: str
) -> None:
    pair = pairs.get(shape, processing, flags)
    for point in active_points(flags, pair.shape.n_layers):
        if not finite(point, edit) or not expressible(shape, processing, point):
            continue
        shared = shares_memory_with(point, processing != "raw") if edit in IN_PLACE else set()
        compare_edit(pair, point, EDITS[edit], shared)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("point", ["blocks.0.attn.hook_v", "blocks.0.attn.hook_z"])
def test_edit_where_refactoring_is_short_of_a_rank(pairs: Pairs, point: str, edit: str) -> None:
    """The case that `expressible` leaves out: the logits agree all the same."""
    pair = pairs.get("one", "refactored")
    assert not expressible("one", "refactored", point)
    hooks = [(point, EDITS[edit])]
    close("logits", *(model.run_with_hooks(pair.tokens(), fwd_hooks=hooks) for model in pair.both))


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize("point", ["blocks.1.attn.hook_v", "blocks.0.attn.hook_pattern", "blocks.0.hook_resid_mid"])
def test_several_hooks_on_one_point_run_in_order(pairs: Pairs, point: str, processing: str) -> None:
    pair = pairs.get("two", processing)
    for chain in itertools.permutations([halve, noise, add_in_place]):
        compare_runs(pair, [(point, (edit, edit)) for edit in chain], pair.tokens())


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_hooks_on_several_points_at_once(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    for names in [
        ["hook_embed", "blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post"],
        ["blocks.0.attn.hook_v", "blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.hook_resid_pre"],
        ["blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized", "ln_final.hook_scale", "unembed.hook_in"],
        ["blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v", "unembed.hook_out"],
        ["blocks.0.hook_resid_mid", "blocks.0.ln2.hook_normalized", "blocks.0.mlp.hook_pre", "blocks.0.hook_mlp_out"],
    ]:
        compare_runs(pair, [(name, (noise, noise)) for name in names], pair.tokens())


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_noise_at_every_point_at_once(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    compare_runs(pair, [(name, (noise, noise)) for name in DEFAULT_POINTS], pair.tokens())


@pytest.mark.parametrize("edit", [noise, zero, in_place])
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_filter_function_edits_every_layer(pairs: Pairs, processing: str, edit: Hook) -> None:
    pair = pairs.get("three", processing)
    for ending in ("hook_z", "hook_pattern", "hook_resid_mid", "mlp.hook_post"):
        results = [
            model.run_with_hooks(pair.tokens(), fwd_hooks=[(lambda name, e=ending: name.endswith(e), edit)])
            for model in pair.both
        ]
        close("logits", *results)


@pytest.mark.parametrize("point", ["blocks.1.ln1.hook_normalized", "blocks.0.ln1.hook_scale"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_ln1_points_fire_for_q_k_and_v_in_turn(pairs: Pairs, point: str, which: int, processing: str) -> None:
    """Three calls per forward pass: a hook acting on one of them changes only that one of q, k and v."""
    pair = pairs.get("two", processing)

    def on_one_call() -> Hook:
        calls = itertools.count()

        def edit(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
            return value * 0.5 if next(calls) == which else None

        return edit

    compare_runs(pair, [(point, (on_one_call(), on_one_call()))], pair.tokens())


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize("point", ["hook_embed", "blocks.0.hook_attn_out", "blocks.1.hook_resid_pre"])
def test_a_replacement_that_is_an_expanded_view(pairs: Pairs, point: str, processing: str) -> None:
    """Mean ablation as it is usually written: the result has stride 0 over batch and position."""
    pair = pairs.get("two", processing)

    def mean_ablation(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.mean((0, 1), keepdim=True).expand_as(value)

    compare_edit(pair, point, mean_ablation)


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_nan_in_scores_zeroes_the_row(pairs: Pairs, processing: str) -> None:
    """3.9.0 turns NaN after the softmax into 0 before hook_pattern."""
    pair = pairs.get("two", processing)

    def nan_row(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, 1, 3] = torch.nan
        return value

    compare_edit(pair, "blocks.0.attn.hook_attn_scores", nan_row)
    for model in pair.both:
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", nan_row)]):
            _, cache = model.run_with_cache(pair.tokens())
        assert (cache["pattern", 0][:, 1, 3] == 0).all()


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("point", [name for name in DEFAULT_POINTS if name.endswith("hook_scale")])
def test_a_zero_scale_spoils_the_same_positions(pairs: Pairs, point: str, processing: str) -> None:
    """A division by zero gives infinities and NaN, in a mix that depends on the order of operations in either model."""
    pair = pairs.get("two", processing)

    def zero_at_three(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, 3] = 0
        return value

    spoilt = [
        ~model.run_with_hooks(pair.tokens(), fwd_hooks=[(point, zero_at_three)]).isfinite().any(-1)
        for model in pair.both
    ]
    assert torch.equal(spoilt[0], spoilt[1])
    assert spoilt[0][:, 3].all()


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_nan_in_the_pattern_propagates(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)

    def nan_row(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, 1, 3] = torch.nan
        return value

    for model in pair.both:
        logits = model.run_with_hooks(pair.tokens(), fwd_hooks=[("blocks.1.attn.hook_pattern", nan_row)])
        assert logits[:, 3].isnan().all()
        assert logits[:, 4:].isfinite().all()


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_edits_do_not_outlive_the_run(pairs: Pairs, attention: str, processing: str) -> None:
    pair = pairs.get("two", processing, attention=attention)
    tokens = pair.tokens()
    before = pair.ours(tokens)
    for point in DEFAULT_POINTS:
        edited = pair.ours.run_with_hooks(tokens, fwd_hooks=[(point, noise)])
        assert not torch.equal(edited, before), point
    assert torch.equal(pair.ours(tokens), before)


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_edits_with_a_shorter_run(pairs: Pairs, processing: str) -> None:
    """stop_at_layer and start_at_layer see the edits at the points they pass."""
    pair = pairs.get("three", processing)
    residual = torch.randn(2, 5, 27, generator=torch.Generator().manual_seed(3))
    hooks = [(name, noise) for name in ("blocks.0.hook_attn_out", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v")]
    for call in ({"stop_at_layer": 2}, {"start_at_layer": 1, "input": residual}):
        results = []
        for model in pair.both:
            with ExitStack() as stack:
                stack.enter_context(model.hooks(fwd_hooks=hooks))
                results.append(
                    model.run_with_cache(
                        call.get("input", pair.tokens()),
                        **{name: value for name, value in call.items() if name != "input"},
                    )
                )
        close("logits", results[0][0], results[1][0])
        caches_close(results[0][1], results[1][1])
