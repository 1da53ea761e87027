"""Are gradients, read, edited or accumulated in parameters, those of 3.9.0 and of HuggingFace?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from compat_tests.comparison import caches_close, close, relative_difference, weights_close
from compat_tests.conftest import Pair, Pairs
from compat_tests.edits import Hook, halve, in_place, noise
from compat_tests.rough_models import PROCESSINGS, SHAPES, rough_gpt2
from compat_tests.test_points import FLAGS, active_points

DEFAULT_POINTS = active_points((), 2)


def compare_gradients(
    pair: Pair,
    tokens: torch.Tensor,
    bwd_hooks: Sequence[tuple[str, Hook]] = (),
    fwd_hooks: Sequence[tuple[str, Hook]] = (),
) -> None:
    """Cache every activation and every gradient of the loss under these hooks, and compare all of them."""
    results = []
    for model in pair.both:
        with model.hooks(fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks)):
            results.append(model.run_with_cache(tokens, return_type="loss", incl_bwd=True))
        model.zero_grad()
    mine, theirs = results
    close("loss", mine[0], theirs[0])
    caches_close(mine[1], theirs[1], order=False)


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_at_every_point(pairs: Pairs, shape: str, processing: str) -> None:
    pair = pairs.get(shape, processing)
    compare_gradients(pair, pair.tokens())


@pytest.mark.parametrize("processing", ["raw", "default"])
@pytest.mark.parametrize("flags", [*((flag,) for flag in FLAGS), FLAGS], ids="+".join)
def test_gradient_at_points_behind_flags(pairs: Pairs, flags: tuple[str, ...], processing: str) -> None:
    pair = pairs.get("two", processing, flags)
    compare_gradients(pair, pair.tokens())


@pytest.mark.parametrize("point", DEFAULT_POINTS)
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_gradient_of_one_point_alone(pairs: Pairs, point: str, processing: str) -> None:
    """With a single listener most points are not touched, so this is another way through the engine."""
    pair = pairs.get("two", processing)
    grads = []
    for model in pair.both:
        _, cache = model.run_with_cache(pair.tokens(), names_filter=point, return_type="loss", incl_bwd=True)
        assert list(cache.keys()) == [point, f"{point}_grad"]
        grads.append(cache[f"{point}_grad"])
        model.zero_grad()
    close(f"{point}_grad", *grads)


def test_gradients_come_after_the_activations_in_backward_order(pairs: Pairs) -> None:
    pair = pairs.get()
    orders = []
    for model in pair.both:
        _, cache = model.run_with_cache(pair.tokens(), return_type="loss", incl_bwd=True)
        names = list(cache.keys())
        assert names[: len(DEFAULT_POINTS)] == DEFAULT_POINTS
        assert sorted(names[len(DEFAULT_POINTS) :]) == sorted(f"{name}_grad" for name in DEFAULT_POINTS)
        orders.append([name for name in names if name.endswith("resid_post_grad") or name.endswith("mlp_out_grad")])
        model.zero_grad()
    assert orders[0] == orders[1]


@pytest.mark.parametrize("return_type", ["logits", "both", None])
def test_incl_bwd_needs_a_scalar(model: Any, return_type: str | None, pairs: Pairs) -> None:
    expected = RuntimeError if return_type == "logits" else AttributeError
    with pytest.raises(expected):
        model.run_with_cache(pairs.get().tokens(), return_type=return_type, incl_bwd=True)
    assert not model.list_hooks()


def run_with_backward_hooks(model: Any, tokens: torch.Tensor, hooks: list[tuple[str, Hook]]) -> None:
    with model.hooks(bwd_hooks=hooks):
        model(tokens, return_type="loss").backward()
    model.zero_grad()


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("point", DEFAULT_POINTS)
def test_backward_hook_reads_the_gradient(pairs: Pairs, point: str, processing: str) -> None:
    pair = pairs.get("two", processing)
    seen: list[list[torch.Tensor]] = []
    for model in pair.both:
        calls: list[torch.Tensor] = []

        def keep(grad: torch.Tensor, hook: Any, calls: list[torch.Tensor] = calls) -> None:
            assert isinstance(grad, torch.Tensor)
            assert hook.name == point
            calls.append(grad.detach().clone())

        run_with_backward_hooks(model, pair.tokens(), [(point, keep)])
        seen.append(calls)
    assert len(seen[0]) == len(seen[1])
    for mine, theirs in zip(*seen, strict=True):
        close(f"{point}_grad", mine, theirs)


def double(grad: torch.Tensor, hook: Any) -> torch.Tensor:
    return grad * 2


def double_in_a_tuple(grad: torch.Tensor, hook: Any) -> tuple[torch.Tensor]:
    return (grad * 2,)


def cut_positions(grad: torch.Tensor, hook: Any) -> torch.Tensor:
    grad = grad.clone()
    grad[:, 2:4] = 0
    return grad


BACKWARD_EDITS: dict[str, Hook] = {
    "double": double,
    "cut positions": cut_positions,
    "noise": lambda grad, hook: noise(grad, hook) * 0.01 + grad,
}
FORWARD_EDITS: dict[str, Hook] = {"halve": halve, "noise": noise}


def cases(edits: Iterable[str]) -> list[Any]:
    """Every edit under every processing; those without noise, unless the processing is the default, are slow tests."""
    return [
        pytest.param(edit, processing, marks=() if edit == "noise" or processing == "default" else pytest.mark.slow)
        for edit in edits
        for processing in PROCESSINGS
    ]


@pytest.mark.parametrize(("edit", "processing"), cases(BACKWARD_EDITS))
@pytest.mark.parametrize("point", DEFAULT_POINTS)
def test_backward_hook_edits_the_gradient(pairs: Pairs, point: str, edit: str, processing: str) -> None:
    """An edited gradient flows on to every point before it."""
    pair = pairs.get("two", processing)
    compare_gradients(pair, pair.tokens(), bwd_hooks=[(point, BACKWARD_EDITS[edit])])


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_backward_hook_may_return_a_tuple_or_edit_in_place(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)

    def double_in_place(grad: torch.Tensor, hook: Any) -> None:
        grad *= 2

    for point in ("blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"):
        for edit in (double_in_a_tuple, double_in_place):
            compare_gradients(pair, pair.tokens(), bwd_hooks=[(point, edit)])


@pytest.mark.parametrize("point", DEFAULT_POINTS)
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_forward_and_backward_edit_at_the_same_point(pairs: Pairs, point: str, processing: str) -> None:
    """In 3.9.0 an edited gradient goes on from before the forward edit, whose own derivative does not enter."""
    pair = pairs.get("two", processing)
    compare_gradients(pair, pair.tokens(), fwd_hooks=[(point, halve)], bwd_hooks=[(point, double)])


@pytest.mark.ours_only
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_forward_in_place_and_backward_reading_at_the_same_point(pairs: Pairs, processing: str) -> None:
    """A RuntimeError in 3.9.0; here the gradients are those of an edit that returns a new tensor."""
    pair = pairs.get("two", processing)

    def not_in_place(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, 1:] = 0.75
        return value

    def read(grad: torch.Tensor, hook: Any) -> None:
        grad.sum()

    for point in ("hook_embed", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_v", "blocks.1.mlp.hook_post"):
        caches = []
        for edit in (in_place, not_in_place):
            with pair.ours.hooks(fwd_hooks=[(point, edit)], bwd_hooks=[(point, read)]):
                _, cache = pair.ours.run_with_cache(pair.tokens(), return_type="loss", incl_bwd=True)
            caches.append(cache)
        caches_close(*caches)


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_several_backward_hooks_run_in_order(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    point = "blocks.1.hook_mlp_out"
    shift: Hook = lambda grad, hook: grad + 0.01  # noqa: E731 (two one-line hooks, used once)
    for chain in ([double, shift], [shift, double]):
        compare_gradients(pair, pair.tokens(), bwd_hooks=[(point, edit) for edit in chain])


@pytest.mark.parametrize(("edit", "processing"), cases(FORWARD_EDITS))
@pytest.mark.parametrize("point", DEFAULT_POINTS)
def test_gradients_through_a_forward_edit(pairs: Pairs, point: str, edit: str, processing: str) -> None:
    pair = pairs.get("two", processing)
    compare_gradients(pair, pair.tokens(), fwd_hooks=[(point, FORWARD_EDITS[edit])])


@pytest.mark.parametrize(("edit", "processing"), cases(["noise"]))
@pytest.mark.parametrize("point", active_points(FLAGS, 2))
def test_gradients_through_an_edit_with_all_flags_on(pairs: Pairs, point: str, edit: str, processing: str) -> None:
    pair = pairs.get("two", processing, FLAGS)
    compare_gradients(pair, pair.tokens(), fwd_hooks=[(point, FORWARD_EDITS[edit])])


@pytest.mark.parametrize("point", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "unembed.hook_in"])
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_gradient_with_respect_to_what_a_hook_puts_in(pairs: Pairs, point: str, processing: str) -> None:
    """Optimising a steering vector: a leaf tensor enters through a hook and gets its gradient."""
    pair = pairs.get("two", processing)
    grads = []
    for model in pair.both:
        width = 5 if point.endswith("hook_z") else 20
        leaf = torch.linspace(-1, 1, width).requires_grad_()
        loss = model.run_with_hooks(
            pair.tokens(), return_type="loss", fwd_hooks=[(point, lambda value, hook, leaf=leaf: value + leaf)]
        )
        loss.backward()
        grads.append(leaf.grad)
        model.zero_grad()
    close("gradient of a vector added by a hook", *grads)


@pytest.mark.parametrize("processing", ["raw", "default"])
def test_forward_hook_in_place_then_backward(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    for point in ("hook_embed", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_v", "blocks.0.attn.hook_z"):
        losses, grads = [], []
        for model in pair.both:
            vector = torch.ones(20, requires_grad=True)

            def add(value: torch.Tensor, hook: Any, vector: torch.Tensor = vector) -> torch.Tensor:
                return value + vector

            hooks = [("hook_pos_embed", add), (point, in_place)]
            loss = model.run_with_hooks(pair.tokens(), return_type="loss", fwd_hooks=hooks)
            loss.backward()
            losses.append(loss.detach())
            grads.append(vector.grad)
            model.zero_grad()
        close("loss", *losses)
        close("gradient behind an in-place edit", *grads)


def test_backward_hooks_of_run_with_hooks(model: Any, pairs: Pairs, caplog: Any) -> None:
    """3.9.0 warns that they are removed before a backward pass can occur; the graph still calls them."""
    calls: list[str] = []
    hooks = [(name, lambda grad, hook: calls.append(hook.name)) for name in ("hook_embed", "blocks.1.attn.hook_z")]
    loss = model.run_with_hooks(pairs.get().tokens(), return_type="loss", bwd_hooks=hooks)
    assert any("backward" in entry.getMessage() for entry in caplog.records)
    assert not model.list_hooks()
    loss.backward()
    assert calls == ["blocks.1.attn.hook_z", "hook_embed"]


def hf_gradients(hf: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in hf.named_parameters() if parameter.grad is not None}


@pytest.mark.ours_only
@pytest.mark.parametrize("reading", ["no hooks", "reading hooks everywhere", "full cache"])
@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", ["two", "one"])
def test_huggingface_parameters_get_huggingface_gradients(
    pairs: Pairs, shape: str, processing: str, reading: str
) -> None:
    pair = pairs.get(shape, processing)
    tokens = pair.tokens()
    alone = rough_gpt2(pair.shape)
    alone(tokens, labels=tokens).loss.backward()
    hooks = [(lambda name: True, lambda value, hook: None)] if reading == "reading hooks everywhere" else []
    with pair.ours.hooks(fwd_hooks=hooks, bwd_hooks=hooks):
        if reading == "full cache":
            pair.ours.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        else:
            pair.ours(tokens, return_type="loss").backward()
    weights_close(hf_gradients(pair.hf), hf_gradients(alone))


#: (name of the HF parameter, its gradient put together from those of 3.9.0's unprocessed parameters)
GRADIENT_MAP: list[tuple[str, Callable[[Any], torch.Tensor]]] = [
    ("transformer.wte.weight", lambda model: model.embed.W_E.grad),
    ("transformer.wpe.weight", lambda model: model.pos_embed.W_pos.grad),
    ("transformer.h.1.ln_1.weight", lambda model: model.blocks[1].ln1.w.grad),
    ("transformer.h.0.attn.c_proj.weight", lambda model: model.blocks[0].attn.W_O.grad.flatten(0, 1)),
    ("transformer.h.0.mlp.c_fc.weight", lambda model: model.blocks[0].mlp.W_in.grad),
    ("transformer.h.1.mlp.c_proj.bias", lambda model: model.blocks[1].mlp.b_out.grad),
    ("transformer.ln_f.bias", lambda model: model.ln_final.b.grad),
    ("lm_head.weight", lambda model: model.unembed.W_U.grad.T),
]


@pytest.mark.ours_only
@pytest.mark.parametrize("point", DEFAULT_POINTS)
def test_parameter_gradients_under_an_edit(pairs: Pairs, point: str) -> None:
    """Without processing, a parameter's gradient under an edit is the one that 3.9.0's own parameter gets."""
    pair = pairs.get("two", "raw")
    for model in pair.both:
        model.run_with_hooks(pair.tokens(), return_type="loss", fwd_hooks=[(point, noise)]).backward()
    for name, theirs in GRADIENT_MAP:
        mine = pair.hf.get_parameter(name).grad
        expected = theirs(pair.theirs)
        if expected is None or not expected.any():
            assert mine is None or mine.abs().max() < 1e-7, name
        else:
            assert relative_difference(mine, expected) < 1e-4, name


@pytest.mark.ours_only
def test_gradients_of_processed_weight_views_reach_huggingface(pairs: Pairs) -> None:
    """A function of a weight view is a function of the HF parameter, so it can be trained through."""
    for processing in ("raw", "default"):
        pair = pairs.get("two", processing)
        pair.ours.W_in.pow(2).sum().backward()
        assert pair.hf.transformer.h[1].mlp.c_fc.weight.grad.abs().max() > 0
        pair.hf.zero_grad()
