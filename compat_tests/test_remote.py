"""Runs on a server of NDIF's kind give what they give here, byte for byte, and only what was asked for travels.

The server is the stand-in of `compat_tests.ndif`, in a process of its own that has neither lensbridge nor jaxtyping.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer

from compat_tests.ndif.stand_in import StandIn, serving
from compat_tests.rough_models import TOY_DIR
from lensbridge import HookedTransformer, patching
from lensbridge.errors import HookError, ReadOnlyWeightError, RemoteRunError, UnsupportedModelError
from lensbridge.hook_points import HookPoint
from lensbridge.tiny import tiny_family, tiny_tokens

RAW = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


class Twins:
    """One model here and on the server."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        options = {"tokenizer": AutoTokenizer.from_pretrained(TOY_DIR), **options}
        self.here = HookedTransformer.from_pretrained(name, **options)
        self.there = HookedTransformer.from_pretrained(name, remote=True, **options)
        self.tokens = self.here.to_tokens("When Mary and John went to the store, John gave a drink to")

    def both(self, run: Callable[[HookedTransformer], Any]) -> tuple[Any, Any]:
        """What a run gives here and there."""
        with torch.no_grad():
            return run(self.here), run(self.there)


@pytest.fixture(params=["gpt2", "gpt2 raw", "llama", "llama raw"])
def twins(request: pytest.FixtureRequest, ndif: StandIn) -> Twins:
    family, _, raw = request.param.partition(" ")
    return Twins(ndif.directories[f"stand-in/{family}"], RAW if raw else {})


@pytest.fixture
def gpt2(ndif: StandIn) -> Twins:
    return Twins(ndif.directories["stand-in/gpt2"], {})


def same(a: Any, b: Any) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(a.nan_to_num(), b.nan_to_num()), float((a - b).nan_to_num().abs().max())


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for rounding: a sweep here goes on from an earlier run, say, and there from the tokens."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def same_caches(a: Any, b: Any) -> None:
    assert list(a) == list(b)
    for name in a:
        same(a[name], b[name])


# --- runs -------------------------------------------------------------------------------------------------------------


def test_no_weight_is_loaded(twins: Twins) -> None:
    twins.there(twins.tokens)
    assert all(parameter.is_meta for parameter in twins.there.hf_model.parameters())
    assert {str(twins.there.cfg.device), twins.there.cfg.n_layers} == {"cpu", twins.here.cfg.n_layers}


@pytest.mark.parametrize("return_type", ["logits", "loss", None])
def test_forward(twins: Twins, return_type: str | None) -> None:
    a, b = twins.both(lambda model: model(twins.tokens, return_type=return_type))
    assert a is b is None or not same(a, b)


def test_both_and_loss_per_token(twins: Twins) -> None:
    a, b = twins.both(lambda model: model(twins.tokens, return_type="both", loss_per_token=True))
    same(a.logits, b.logits)
    same(a.loss, b.loss)


def test_padded_text(twins: Twins) -> None:
    texts = ["Mary gave John", "The cat sat on the mat and slept"]
    same(*twins.both(lambda model: model(texts, padding_side="left")))


def test_parts(twins: Twins) -> None:
    a, b = twins.both(lambda model: model(twins.tokens, stop_at_layer=1))
    same(a, b)
    same(*twins.both(lambda model: model(a, start_at_layer=1)))


def test_everything_cached(twins: Twins) -> None:
    (a, ours), (b, theirs) = twins.both(lambda model: model.run_with_cache(twins.tokens))
    same(a, b)
    same_caches(ours, theirs)


@pytest.mark.parametrize(
    "point",
    ["hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_pattern", "attn.hook_z", "mlp.hook_post"],
)
def test_a_hook_set_travels_in_ten_kilobytes(twins: Twins, ndif: StandIn, point: str) -> None:
    def halve(x: Tensor, hook: Any) -> Tensor:
        return x * 0.5

    twins.there.run_with_hooks(twins.tokens, fwd_hooks=[(lambda name: name.endswith(point), halve)], return_type=None)
    assert ndif.last["payload_bytes"] < 10 * 1024


@pytest.mark.parametrize("pos_slice", [-1, (2, 3)], ids=str)
def test_only_what_was_asked_for_travels(twins: Twins, ndif: StandIn, pos_slice: Any) -> None:
    def run(model: HookedTransformer) -> Any:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
        return model.run_with_cache(
            twins.tokens, names_filter=names, pos_slice=pos_slice, remove_batch_dim=True, return_type=None
        )

    (_, ours), (_, theirs) = twins.both(run)
    same_caches(ours, theirs)
    kept = sum(value.nbytes for value in theirs.values())
    # torch.save takes some hundred bytes for each tensor.
    assert ndif.last["result_raw_bytes"] < kept + 1000 * (len(theirs) + 2)
    twins.there(twins.tokens, return_type="loss")
    assert ndif.last["result_raw_bytes"] < 4000


def points(model: HookedTransformer) -> list[str]:
    """All points around one layer."""
    return [name for name in model.hook_dict if model._is_on(name) and not name.startswith("blocks.0.")]


def test_an_edit_at_every_point(twins: Twins) -> None:
    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, 2] = x[:, 2] * 0.5 + 0.1
        return x

    def runs(model: HookedTransformer) -> list[Tensor]:
        return list(model.run_sweep(twins.tokens, [[(name, edit)] for name in points(model)], batch_size=1))

    plain = twins.here(twins.tokens)
    for name, a, b in zip(points(twins.here), *twins.both(runs), strict=True):
        close(a, b)
        # The input of the softmax, say, is masked in the rows that come before.
        assert not torch.equal(a, plain) or name.endswith("hook_rot_k"), name


def test_flags(twins: Twins) -> None:
    for model in (twins.here, twins.there):
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)

    def halve(x: Tensor, hook: Any) -> Tensor:
        return x * 0.5

    for name in ("blocks.1.attn.hook_result", "blocks.1.hook_k_input", "blocks.0.hook_q_input"):
        same(*twins.both(lambda model, name=name: model.run_with_hooks(twins.tokens, fwd_hooks=[(name, halve)])))


def test_refactored(ndif: StandIn) -> None:
    twins = Twins(ndif.directories["stand-in/gpt2"], {"refactor_factored_attn_matrices": True})

    def halve(x: Tensor, hook: Any) -> Tensor:
        return x * 0.5

    for name in ("blocks.1.attn.hook_q", "blocks.0.attn.hook_z"):
        same(*twins.both(lambda model, name=name: model.run_with_hooks(twins.tokens, fwd_hooks=[(name, halve)])))


# --- hooks ------------------------------------------------------------------------------------------------------------

SCALE = torch.tensor(0.25)


def recursive(x: Tensor, depth: int) -> Tensor:
    return x if depth == 0 else recursive(x * 0.9, depth - 1)


class Editor:
    """A callable object with something to remember."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls: list[str] = []

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        self.calls.append(hook.name or "")
        return x * self.factor

    def method(self, x: Tensor, hook: HookPoint) -> None:
        x[:, 1] = self.factor


def annotated(x: Float[Tensor, "batch pos d_model"], hook: HookPoint, by: float = 0.5) -> Float[Tensor, "batch pos d"]:
    scaled: Float[Tensor, "batch pos d_model"] = x * by
    return recursive(scaled, 2)


def with_global(x: Tensor, hook: Any) -> Tensor:
    return x * SCALE + torch.from_numpy(np.ones(1, dtype=np.float32))


def with_inner(x: Tensor, hook: Any) -> Tensor:
    def inner(y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return y + 1

    return inner(x)


def hooks() -> Iterator[tuple[str, Callable]]:
    offset = torch.linspace(-1, 1, 128)
    yield "closure", lambda x, hook: x + offset
    yield "annotated", annotated
    yield "global and numpy", with_global
    yield "partial", functools.partial(annotated, by=0.1)
    yield "object", Editor(0.5)
    yield "method in place", Editor(0.3).method
    yield "inner function", with_inner


@pytest.mark.parametrize(("kind", "hook"), [pytest.param(*each, id=each[0]) for each in hooks()])
def test_hooks_of_every_kind(gpt2: Twins, kind: str, hook: Callable) -> None:
    pairs = [("blocks.1.hook_resid_pre", hook)]
    same(*gpt2.both(lambda model: model.run_with_hooks(gpt2.tokens, fwd_hooks=pairs)))


def test_side_effects_come_back(gpt2: Twins) -> None:
    def run(model: HookedTransformer) -> list[Any]:
        means, by_name, norms, seen = [], {"old": 1}, torch.zeros(model.cfg.n_layers), {"none"}
        last, counts, array, editor = deque([0], maxlen=3), Counter[str](), np.zeros(4), Editor(1.0)

        def note(x: Tensor, hook: HookPoint) -> None:
            means.append(x.mean())
            by_name[hook.name] = (x[0, 0, :2].clone(), hook.layer())
            norms[hook.layer()] = x.norm()
            seen.add(hook.layer())
            last.append(hook.layer())
            counts["calls"] += 1
            array[hook.layer()] = float(x.sum())
            hook.ctx["first"] = x[0, 0, 0].item()

        names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
        model.run_with_hooks(gpt2.tokens, fwd_hooks=[*((name, note) for name in names), ("hook_embed", editor)])
        ctx = [model.hook_dict[name].ctx["first"] for name in names]
        model.clear_contexts()
        return [means, by_name, norms, seen, last, counts, array, editor.calls, ctx]

    here, there = gpt2.both(run)
    assert len(there[0]) == gpt2.here.cfg.n_layers
    same(here.pop(2), there.pop(2))
    assert here.pop(2) == there.pop(2) and str(here) == str(there)


def test_lists_keep_their_identity(gpt2: Twins) -> None:
    inner: list[float] = []
    outer = [inner, torch.zeros(2)]
    tensor = outer[1]

    def note(x: Tensor, hook: Any) -> None:
        outer[0].append(x.mean().item())  # type: ignore[union-attr]
        outer[1][0] = 7.0  # type: ignore[index]
        outer.append("more")  # type: ignore[arg-type]

    gpt2.there.run_with_hooks(gpt2.tokens, fwd_hooks=[("hook_embed", note)])
    assert outer[0] is inner and outer[1] is tensor and outer[2] == "more"
    assert len(inner) == 1 and tensor.tolist() == [7.0, 0.0]


def test_permanent_hooks_and_caches(gpt2: Twins) -> None:
    def run(model: HookedTransformer) -> Any:
        model.add_perma_hook("hook_embed", annotated)
        cache = model.add_caching_hooks(["blocks.0.hook_resid_post"])
        logits = model(gpt2.tokens)
        model.reset_hooks(including_permanent=True)
        return logits, cache

    (a, ours), (b, theirs) = gpt2.both(run)
    same(a, b)
    same_caches(ours, theirs)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients(twins: Twins) -> None:
    seen: list[Tensor] = []

    def run(model: HookedTransformer) -> Any:
        seen.clear()

        def halve(gradient: Tensor, hook: Any) -> tuple[Tensor]:
            seen.append(gradient.norm())
            return (gradient * 0.5,)

        with model.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", halve)]):
            loss, cache = model.run_with_cache(twins.tokens, return_type="loss", incl_bwd=True)
        return loss, cache, list(seen)

    (a, ours, first), (b, theirs, second) = run(twins.here), run(twins.there)
    same(a.detach(), b)
    same_caches(ours, theirs)
    same(torch.stack(first), torch.stack(second))
    assert "hook_embed_grad" in theirs
    assert all(parameter.grad is None for parameter in twins.there.hf_model.parameters())


def test_what_has_no_graph_says_so(gpt2: Twins) -> None:
    assert not gpt2.there(gpt2.tokens).requires_grad
    with pytest.raises(HookError, match="incl_bwd=True"):
        gpt2.there.run_with_hooks(gpt2.tokens, bwd_hooks=[("hook_embed", lambda gradient, hook: None)])


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_generation_is_one_job(twins: Twins, ndif: StandIn, use_past_kv_cache: bool) -> None:
    def halve(x: Tensor, hook: Any) -> Tensor:
        return x * 0.5

    def run(model: HookedTransformer) -> Any:
        return model.generate(
            twins.tokens,
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_past_kv_cache,
            return_cache=True,
            fwd_hooks=[("blocks.1.hook_mlp_out", halve)],
            verbose=False,
        )

    (a, ours), (b, theirs) = twins.both(run)
    assert ndif.jobs == 1 and torch.equal(a, b)
    same_caches(ours, theirs)


def test_generation_from_texts_with_sampling(gpt2: Twins) -> None:
    def run() -> Any:
        torch.manual_seed(3)
        return gpt2.there.generate(["Mary and", "The cat sat on the"], max_new_tokens=5, verbose=False)

    first = run()
    assert first == run() and len(first) == 2
    output = gpt2.there.generate(gpt2.tokens, max_new_tokens=3, output_logits=True, do_sample=False, verbose=False)
    assert len(output.logits) == 3 and output.sequences.shape[1] == gpt2.tokens.shape[1] + 3


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_patching_sweep_is_one_job(twins: Twins, ndif: StandIn) -> None:
    clean = twins.tokens.roll(1, 1)
    target = int(clean[0, -1])

    def run(model: HookedTransformer) -> Tensor:
        _, cache = twins.here.run_with_cache(clean, names_filter=lambda name: name.endswith("resid_pre"))
        return patching.get_act_patch_resid_pre(
            model, twins.tokens, cache, lambda logits: logits[0, -1, target] - logits[0, -1].mean()
        )

    a, b = twins.both(run)
    assert ndif.jobs == 1
    close(a, b)
    assert ndif.last["result_raw_bytes"] < 20_000


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_come_when_they_are_asked_for(twins: Twins, ndif: StandIn) -> None:
    names = ["W_U", "W_E", "W_Q", "W_O", "b_out", "W_in"]
    for name in names:
        a, b = twins.both(lambda model, name=name: getattr(model, name))
        same(a, b)
    jobs = ndif.jobs
    assert jobs <= len(names)
    for name in names:
        getattr(twins.there, name)
    assert ndif.jobs == jobs
    with pytest.raises(ReadOnlyWeightError):
        twins.there.blocks[0].attn.W_O[0] = 0.0


def test_analysis_with_weights(twins: Twins) -> None:
    def run(model: HookedTransformer) -> Any:
        _, cache = model.run_with_cache(twins.tokens)
        residual = cache.accumulated_resid(layer=-1, incl_mid=False)
        return cache.apply_ln_to_stack(residual, layer=-1) @ model.W_U, model.unembed(model.ln_final(residual[-1]))

    for a, b in zip(*twins.both(run), strict=True):
        same(a, b)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_errors_carry_the_users_own_line(gpt2: Twins, ndif: StandIn) -> None:
    def fails(x: Tensor, hook: Any) -> Tensor:
        y = x + 1
        return y / [][0]  # this very line

    with pytest.raises(
        RemoteRunError, match=r"IndexError: list index out of range\n +in fails, .*test_remote.py:\d+"
    ) as at:
        gpt2.there.run_with_hooks(gpt2.tokens, fwd_hooks=[("hook_embed", fails)])
    assert "return y / [][0]" in str(at.value)
    assert at.value.remote_traceback and "fails" in at.value.remote_traceback
    same(*gpt2.both(lambda model: model(gpt2.tokens)))


def test_a_wrong_result_of_a_hook_is_the_same_error(gpt2: Twins) -> None:
    with pytest.raises(HookError, match="returned int"):
        gpt2.there.run_with_hooks(gpt2.tokens, fwd_hooks=[("hook_embed", lambda x, hook: 3)])


def test_what_cannot_travel_is_refused_before_it_is_sent(gpt2: Twins, ndif: StandIn) -> None:
    model, count = gpt2.there, 0

    def reads_the_model(x: Tensor, hook: Any) -> Tensor:
        return x + model.W_E[0]

    def rebinds(x: Tensor, hook: Any) -> None:
        nonlocal count
        count += 1

    with pytest.raises(HookError, match="reads 'model'"):
        model.run_with_hooks(gpt2.tokens, fwd_hooks=[("hook_embed", reads_the_model)])
    with pytest.raises(HookError, match="assigns to count"):
        model.run_with_hooks(gpt2.tokens, fwd_hooks=[("hook_embed", rebinds)])
    with pytest.raises(UnsupportedModelError, match="run_with_hooks"), model.trace(gpt2.tokens):
        pass
    with pytest.raises(UnsupportedModelError, match="weights are elsewhere"):
        model(gpt2.tokens, remote=False)
    with pytest.raises(UnsupportedModelError, match="weights are here"):
        gpt2.here(gpt2.tokens, remote=True)
    with pytest.raises(UnsupportedModelError, match="first_n_layers"):
        HookedTransformer.from_pretrained(TOY_DIR, remote=True, first_n_layers=1)
    assert ndif.jobs == 0


def test_a_package_that_the_server_lacks(gpt2: Twins) -> None:
    import einops

    def rearranges(x: Tensor, hook: Any) -> Tensor:
        import jaxtyping

        return einops.rearrange(x, "b p d -> b p d") if jaxtyping else x

    with pytest.raises(RemoteRunError, match="The server has no package"):
        gpt2.there.run_with_hooks(gpt2.tokens, fwd_hooks=[("hook_embed", rearranges)])


def test_another_attention_implementation(ndif: StandIn) -> None:
    options = {"attn_implementation": "sdpa"}
    twins = Twins(ndif.directories["stand-in/gpt2"], options)
    same(*twins.both(lambda model: model(twins.tokens)))
    assert ndif.last["env"]["attn_implementation"] == "sdpa"
    (_, ours), (_, theirs) = twins.both(
        lambda model: model.run_with_cache(twins.tokens, names_filter="blocks.1.attn.hook_pattern")
    )
    # Here only the layer that is looked into goes without sdpa, and on a server all of them do.
    close(ours["blocks.1.attn.hook_pattern"], theirs["blocks.1.attn.hook_pattern"])
    assert ndif.last["env"]["attn_implementation"] == "eager"


def test_a_mixture_of_experts_is_measured_by_a_job(tmp_path: Path) -> None:
    """Which token goes where cannot be asked of a model without weights."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_DIR)
    tiny_family("mixtral").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with serving({"stand-in/mixtral": tmp_path}) as server, server.pointed():
        here = HookedTransformer.from_pretrained(str(tmp_path), tokenizer=tokenizer)
        there = HookedTransformer.from_pretrained(str(tmp_path), tokenizer=tokenizer, remote=True)
        (a, ours), (b, theirs) = (model.run_with_cache(tiny_tokens()) for model in (here, there))
        same(a.detach(), b)
        same_caches(ours, theirs)
        assert server.jobs == 2 and server.left_behind == []
