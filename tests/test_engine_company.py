"""Does a run leave the HuggingFace model and everyone else on it as they were, whatever a hook does?"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from torch import Tensor

from lensbridge import points
from lensbridge.errors import HookError, SourceNotFoundError
from lensbridge.hook_points import HookPoint

MID = "blocks.0.hook_resid_mid"
POST = "blocks.0.hook_resid_post"


def keep(value: Tensor, hook: HookPoint) -> None:
    """A hook that could edit, and does not."""


def doubled(value: Tensor, hook: HookPoint) -> Tensor:
    return value * 2


# --- exceptions ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


POINTS_OF_ALL_KINDS = [
    "hook_embed",
    "blocks.0.ln2.hook_scale",
    "blocks.0.attn.hook_q",
    "blocks.1.attn.hook_pattern",
    MID,
    "unembed.hook_out",
]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
@pytest.mark.parametrize("name", POINTS_OF_ALL_KINDS)
def test_an_exception_in_a_hook_leaves_nothing_behind(
    new_hf: Callable,
    new_lens: Callable,
    tokens: Tensor,
    error: type[BaseException],
    name: str,
    assert_untouched: Callable,
) -> None:
    hf = new_hf(attention="sdpa")
    lens = new_lens(hf)
    before, cached = lens(tokens), lens.run_with_cache(tokens)

    def hook(value: Tensor, hook: HookPoint) -> None:
        raise error("why")

    with pytest.raises(error, match="why"):
        lens.run_with_hooks(tokens, fwd_hooks=[("hook_embed", doubled), (name, hook)])
    assert_untouched(hf, lens)
    assert hf.config._attn_implementation == "sdpa"
    assert torch.equal(lens(tokens), before) and torch.equal(hf(tokens).logits, hf(tokens).logits)
    logits, cache = lens.run_with_cache(tokens)
    assert torch.equal(logits, cached[0]) and all(torch.equal(cache[key], cached[1][key]) for key in cache)


@pytest.mark.parametrize("arguments", [{}, {"stop_at_layer": 2}, {"return_type": None}], ids=str)
@pytest.mark.parametrize("hooks", [[], [("blocks.1.attn.hook_pattern", keep)]], ids=["no hooks", "hooks"])
def test_an_exception_in_the_hf_model_leaves_nothing_behind(
    hf: Any, lens: Any, tokens: Tensor, arguments: dict, hooks: list, assert_untouched: Callable
) -> None:
    expected = lens.run_with_cache(tokens)[0]

    def fail(*_: Any) -> None:
        raise Stop("in the model")

    handle = hf.transformer.h[1].mlp.register_forward_pre_hook(fail)
    for run in (lambda: lens.run_with_hooks(tokens, fwd_hooks=hooks, **arguments), lambda: lens.run_with_cache(tokens)):
        with pytest.raises(Stop, match="in the model"):
            run()
    handle.remove()
    assert_untouched(hf, lens)
    assert torch.equal(lens.run_with_cache(tokens)[0], expected)


def test_an_input_that_the_hf_model_refuses_leaves_nothing_behind(
    hf: Any, lens: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    expected = lens.run_with_cache(tokens)[0]
    for run in (lens.run_with_cache, lens):
        with pytest.raises((IndexError, RuntimeError)):
            run(torch.full((1, 3), 100_000))
    assert_untouched(hf, lens)
    assert torch.equal(lens.run_with_cache(tokens)[0], expected)


# --- what hooks may return -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["text", 3.0, (1, 2), [torch.ones(1)], np.zeros(3), {}], ids=lambda x: type(x).__name__
)
def test_what_is_no_tensor_is_refused(
    hf: Any, lens: Any, tokens: Tensor, wrong: Any, assert_untouched: Callable
) -> None:
    with pytest.raises(HookError, match=f"a hook at '{POST}' returned {type(wrong).__name__}; return a tensor"):
        lens.run_with_hooks(tokens, fwd_hooks=[(POST, lambda value, hook: wrong)])
    assert_untouched(hf, lens)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (
            POST,
            lambda value: value[:, :3],
            r"returned \[2, 3, 20\] float32 on cpu, where the activation is \[2, 7, 20\]",
        ),
        (POST, lambda value: value[..., :3], r"\[2, 7, 3\]"),
        (
            "hook_embed",
            lambda value: value.double(),
            r"\[2, 7, 20\] float64 on cpu, where the activation is .* float32",
        ),
        ("blocks.0.attn.hook_pattern", lambda value: value.to("meta"), "float32 on meta"),
        ("blocks.0.attn.hook_q", lambda value: value[:, :, :2], r"\[2, 7, 2, 5\]"),
        ("blocks.0.mlp.hook_post", lambda value: value.long(), "int64"),
    ],
)
def test_a_tensor_of_another_kind_is_named_when_the_run_fails_on_it(
    hf: Any, lens: Any, tokens: Tensor, name: str, change: Callable, what: str, assert_untouched: Callable
) -> None:
    with pytest.raises(HookError, match=f"a hook at '{name}' .*{what}") as caught:
        lens.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: change(value))])
    assert isinstance(caught.value, RuntimeError) and caught.value.__cause__ is not None
    assert_untouched(hf, lens)


def test_a_users_own_error_is_not_blamed_on_a_hook(lens: Any, tokens: Tensor) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        lens.run_with_hooks(tokens, fwd_hooks=[("hook_embed", doubled), (POST, fail)])


@pytest.mark.parametrize(
    "change", [lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand_as(x)], ids=["strides", "expanded"]
)
def test_a_tensor_may_have_any_strides(either: Any, tokens: Tensor, change: Callable) -> None:
    either.set_use_attn_result(True)
    either.set_use_hook_mlp_in(True)
    for name in points.names(2):
        if either._is_on(name):
            given = either.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: change(value))])
            plain = either.run_with_hooks(
                tokens,
                fwd_hooks=[(name, lambda value, hook: change(value).clone(memory_format=torch.contiguous_format))],
            )
            assert torch.allclose(given, plain, atol=1e-5), name


def test_a_tensor_that_broadcasts_is_let_through(lens: Any, tokens: Tensor) -> None:
    one_row = lens.run_with_hooks(tokens, fwd_hooks=[(MID, lambda value, hook: value[:1])])
    both = lens.run_with_hooks(tokens, fwd_hooks=[(MID, lambda value, hook: value[:1].expand(2, -1, -1))])
    assert torch.equal(one_row, both)


# --- runs inside runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*POINTS_OF_ALL_KINDS, "blocks.0.mlp.hook_post"])
def test_a_hook_may_run_anything(
    hf: Any, lens: Any, raw: Any, tokens: Tensor, name: str, assert_untouched: Callable
) -> None:
    x = torch.randn(1, 3, 20, generator=torch.Generator().manual_seed(0))
    other = tokens.flip(0)[:1, :4]
    runs: dict[str, Callable[[], Any]] = {
        "model": lambda: lens(other),
        "stopped": lambda: lens(other, stop_at_layer=1),
        "started": lambda: lens(x, start_at_layer=1),
        "hooked": lambda: lens.run_with_hooks(other, fwd_hooks=[("blocks.0.attn.hook_pattern", doubled)]),
        "mlp": lambda: lens.blocks[0].mlp(x),
        "attention": lambda: lens.blocks[1].attn(x),
        "block": lambda: lens.blocks[0](x),
        "unembedding": lambda: lens.unembed(lens.ln_final(x)),
        "weights": lambda: lens.W_Q.sum() + lens.b_U.sum(),
        "another lens": lambda: raw(other),
        "another lens' cache": lambda: raw.run_with_cache(other)[1]["blocks.1.attn.hook_pattern"],
        "the HF model": lambda: hf(other).logits,
        "a part of the HF model": lambda: hf.transformer.h[0].mlp(x),
    }
    expected = {label: run() for label, run in runs.items()}
    for label, run in runs.items():
        found: list[Tensor] = []

        def hook(value: Tensor, hook: HookPoint, run: Callable = run, found: list = found) -> Tensor:
            hook.remove_hooks()  # or the run inside would call it again
            found.append(run())
            return value * 1.5

        plain = lens.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value * 1.5)])
        outer = lens.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
        assert torch.equal(found[0], expected[label]), label
        assert torch.equal(outer, plain), label
        assert_untouched(hf, lens)
        assert_untouched(hf, raw)


def test_a_cache_inside_a_hook_is_whole_and_the_outer_one_too(lens: Any, tokens: Tensor) -> None:
    expected, inner = lens.run_with_cache(tokens)[1], []

    def hook(value: Tensor, hook: HookPoint) -> None:
        hook.remove_hooks()
        inner.append(lens.run_with_cache(tokens)[1])

    with lens.hooks([("blocks.0.attn.hook_pattern", hook)]):
        outer = lens.run_with_cache(tokens)[1]
    for cache in (inner[0], outer):
        assert list(cache) == list(expected) and all(torch.equal(cache[name], expected[name]) for name in expected)


def test_hooks_may_call_each_other_down_to_a_bottom(
    hf: Any, lens: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    expected, depth = lens(tokens), []

    def hook(value: Tensor, hook: HookPoint) -> None:
        depth.append(len(depth))
        if len(depth) < 4:
            assert torch.equal(lens(tokens), expected)

    assert torch.equal(lens.run_with_hooks(tokens, fwd_hooks=[(POST, hook)]), expected)
    assert depth == [0, 1, 2, 3]
    assert_untouched(hf, lens)


def test_an_exception_in_an_inner_run_may_be_caught(
    hf: Any, lens: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    expected = lens(tokens)

    def fail(value: Tensor, hook: HookPoint) -> None:
        raise Stop

    def hook(value: Tensor, hook: HookPoint) -> None:
        hook.remove_hooks()
        with pytest.raises(Stop):
            lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", fail)])

    assert torch.equal(lens.run_with_hooks(tokens, fwd_hooks=[(POST, hook)]), expected)
    assert_untouched(hf, lens)


# --- company ---------------------------------------------------------------------------------------------------------


def test_two_lenses_on_one_hf_model_do_not_disturb_each_other(
    hf: Any, lens: Any, raw: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    expected = [model.run_with_cache(tokens) for model in (lens, raw)]
    edits = [[("blocks.0.attn.hook_v", doubled)]] * 2
    edited = [model.run_with_hooks(tokens, fwd_hooks=e) for model, e in zip((lens, raw), edits, strict=True)]
    assert not torch.allclose(edited[0].log_softmax(-1), edited[1].log_softmax(-1))
    with lens.hooks([(POST, doubled)]):
        for model, (logits, cache), was in zip((lens, raw), expected, edited, strict=True):
            if model is raw:
                again, seen = model.run_with_cache(tokens)
                assert torch.equal(again, logits) and all(torch.equal(seen[name], cache[name]) for name in cache)
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=edits[0]), was)
    assert torch.equal(lens.run_with_hooks(tokens, fwd_hooks=edits[0]), edited[0])
    assert_untouched(hf, lens)


@pytest.mark.parametrize("first", ["lens", "nnsight"])
def test_a_users_own_nnsight_wrapper_goes_on_working(hf: Any, raw: Any, tokens: Tensor, first: str) -> None:
    expected = hf(tokens).logits
    if first == "lens":
        edited = raw.run_with_hooks(tokens, fwd_hooks=[(POST, doubled)])
    wrapped = nnsight.NNsight(hf)
    if first == "nnsight":
        edited = raw.run_with_hooks(tokens, fwd_hooks=[(POST, doubled)])
    for _ in range(2):
        with wrapped.trace(input_ids=tokens):
            read = nnsight.save(wrapped.lm_head.output)
        with wrapped.trace(input_ids=tokens):
            wrapped.transformer.h[0].output = wrapped.transformer.h[0].output * 2
            theirs = nnsight.save(wrapped.lm_head.output)
        logits, cache = raw.run_with_cache(tokens)
        assert torch.equal(read, expected) and torch.equal(theirs, edited)
        assert torch.equal(logits, expected) and "blocks.1.attn.hook_pattern" in cache
        assert torch.equal(raw.run_with_hooks(tokens, fwd_hooks=[(POST, doubled)]), edited)


def test_a_users_nnsight_trace_inside_a_hook(hf: Any, raw: Any, tokens: Tensor) -> None:
    raw.run_with_cache(tokens)
    wrapped, read = nnsight.NNsight(hf), []

    def trace() -> Tensor:
        with wrapped.trace(input_ids=tokens):
            logits = nnsight.save(wrapped.lm_head.output)
        return logits

    expected, edited = hf(tokens).logits, raw.run_with_hooks(tokens, fwd_hooks=[(POST, doubled)])
    hooks = [(POST, lambda value, hook: read.append(trace()) or value * 2)]
    assert torch.equal(raw.run_with_hooks(tokens, fwd_hooks=hooks), edited)
    assert torch.equal(read[0], expected)


def test_a_users_own_module_hooks_go_on_working(hf: Any, raw: Any, tokens: Tensor) -> None:
    plain = raw.run_with_cache(tokens)[0]
    seen: list[int] = []
    handle = hf.transformer.h[0].register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    expected = hf(tokens).logits
    logits, cache = raw.run_with_cache(tokens)
    handle.remove()
    assert torch.equal(logits, expected) and len(seen) == 2 and not torch.equal(plain, expected)
    # The lens sees what the block's output is before that hook, and the next block what it is after.
    assert torch.allclose(cache[POST] * 2, cache["blocks.1.hook_resid_pre"])


def test_a_forward_that_was_replaced_after_a_run_is_the_one_that_runs(hf: Any, raw: Any, tokens: Tensor) -> None:
    raw.run_with_cache(tokens)
    mlp = hf.transformer.h[0].mlp
    original = mlp.forward
    mlp.forward = lambda hidden: original(hidden) * 3
    expected = hf(tokens).logits
    assert torch.equal(raw.run_with_cache(tokens)[0], expected)
    assert torch.equal(raw.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", keep)]), expected)
    assert mlp.forward(torch.ones(1, 20)).equal(original(torch.ones(1, 20)) * 3)
    del mlp.forward
    assert torch.equal(raw.run_with_cache(tokens)[0], hf(tokens).logits)


def test_a_module_that_was_replaced_after_a_run_is_found_by_the_next_but_one(
    hf: Any, raw: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    raw.run_with_cache(tokens)
    hf.transformer.h[0].mlp = copy.deepcopy(hf.transformer.h[0].mlp)
    with torch.no_grad():
        hf.transformer.h[0].mlp.c_proj.weight.mul_(2)
    with pytest.raises(SourceNotFoundError, match="were replaced or changed"):
        raw.run_with_cache(tokens)
    assert_untouched(hf, raw)
    logits, cache = raw.run_with_cache(tokens)
    assert torch.equal(logits, hf(tokens).logits) and "blocks.0.mlp.hook_post" in cache


def test_the_hf_model_can_be_copied_and_pickled_after_runs(hf: Any, lens: Any, tokens: Tensor) -> None:
    lens.run_with_cache(tokens)
    expected = hf(tokens).logits
    for twin in (copy.deepcopy(hf), pickle.loads(pickle.dumps(hf))):
        assert torch.equal(twin(tokens).logits, expected) and twin is not hf


def test_a_lens_can_be_copied_and_saved_after_runs(hf: Any, lens: Any, tokens: Tensor) -> None:
    expected, cache = lens.run_with_cache(tokens)
    file = io.BytesIO()
    torch.save(lens, file)
    file.seek(0)
    for twin in (copy.deepcopy(lens), torch.load(file, weights_only=False)):
        assert twin.hf_model is not hf and twin.blocks[0].interior is twin.interior
        logits, seen = twin.run_with_cache(tokens)
        assert torch.equal(logits, expected) and all(torch.equal(seen[name], cache[name]) for name in cache)
        with torch.no_grad():
            twin.hf_model.transformer.wte.weight.zero_()
        assert not torch.allclose(twin.run_with_cache(tokens)[0], expected)
        assert torch.equal(lens.run_with_cache(tokens)[0], expected)
        twin.add_hook(POST, doubled)
        assert lens.list_hooks() == {}


def test_lenses_and_their_models_can_be_forgotten(new_hf: Callable, new_lens: Callable, tokens: Tensor) -> None:
    import gc
    import weakref

    hf = new_hf()
    lens = new_lens(hf)
    lens.run_with_cache(tokens)
    gone = weakref.ref(hf), weakref.ref(lens)
    del hf, lens
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


# --- other packages --------------------------------------------------------------------------------------------------


def test_anyio_can_be_imported_afterwards() -> None:
    """It looks at the attributes of its own classes, and nnsight gives every object one."""
    pytest.importorskip("anyio", reason="an optional dependency of huggingface_hub")
    code = "import lensbridge, anyio.abc, anyio.streams.tls, anyio.streams.file; anyio.abc.SocketAttribute"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nnsight_may_be_imported_before() -> None:
    done = subprocess.run([sys.executable, "-c", "import nnsight, lensbridge"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
