"""Does a run visit what is listened to, in the right order and nothing else, in every mode and variant of attention?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import lensbridge.engine.run
from lensbridge import points
from lensbridge.architectures import BY_CLASS
from lensbridge.architectures.record import Softmax
from lensbridge.engine import stepping
from lensbridge.engine.passage import measure
from lensbridge.errors import SourceNotFoundError
from lensbridge.hook_points import HookPoint

MID = "blocks.0.hook_resid_mid"
POST = "blocks.0.hook_resid_post"


def keep(value: Tensor, hook: HookPoint) -> None:
    """A hook that could edit, and does not."""


def doubled(value: Tensor, hook: HookPoint) -> Tensor:
    return value * 2


# --- planning --------------------------------------------------------------------------------------------------------


def test_a_loop_over_one_set_of_hooks_plans_once(lens: Any) -> None:
    engine, one = lens.interior.engine, torch.tensor([[5]])
    for index in range(1000):
        lens.run_with_hooks(one, fwd_hooks=[("hook_embed", lambda value, hook, index=index: value + index)])
    assert engine.plans_made == 1
    lens.run_with_hooks(one, fwd_hooks=[("hook_pos_embed", keep)])
    assert engine.plans_made == 2


@torch.no_grad()
def test_a_plan_is_not_reused_where_it_would_be_wrong(lens: Any, tokens: Tensor) -> None:
    engine = lens.interior.engine
    pattern = [("blocks.0.attn.hook_pattern", lambda value, hook: value * 0.5)]

    def run(**arguments: Any) -> int:
        lens.run_with_hooks(tokens, fwd_hooks=pattern, **arguments)
        return engine.plans_made

    assert [run(), run(), run(stop_at_layer=1), run(), run(return_type=None)] == [1, 1, 2, 2, 3]
    lens.process_weights_(fold_ln=False)
    assert run() == 4
    lens.set_use_split_qkv_input(True)
    assert run() == 5
    lens.run_with_cache(tokens, names_filter="blocks.0.attn.hook_pattern")
    assert engine.plans_made == 6


@pytest.mark.parametrize("arguments", [{}, {"stop_at_layer": 1}, {"return_type": None}], ids=str)
def test_a_run_that_nobody_listens_to_is_no_trace(
    either: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, arguments: dict
) -> None:
    expected = either.run_with_hooks(tokens, fwd_hooks=[("hook_embed", keep)], **arguments)
    plans = either.interior.engine.plans_made
    monkeypatch.setattr(lensbridge.engine.run, "run_once", None)
    found = either(tokens, **arguments)
    assert found is expected is None or torch.equal(found, expected)
    assert either.interior.engine.plans_made == plans
    with pytest.raises(TypeError):
        either.run_with_hooks(tokens, fwd_hooks=[("hook_embed", keep)])


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nnsight tells a run that only fills a cache, from now on."""
    found: list[str] = []
    genuine = stepping._Watch.observe_selected

    def observe_selected(self: Any, location: str, value: Any) -> None:
        found.append(location.removeprefix("model."))
        genuine(self, location, value)

    monkeypatch.setattr(stepping._Watch, "observe_selected", observe_selected)
    return found


END = "lm_head.output"
SOFTMAX = "transformer.h.0.attn.source.attention_interface.softmax"


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("hook_embed", ["transformer.wte.output", END]),
        ("blocks.1.hook_resid_pre", ["transformer.h.1.input", END]),
        ("blocks.0.attn.hook_q", ["transformer.h.0.attn.c_attn.output", END]),
        ("blocks.0.attn.hook_attn_scores", [f"{SOFTMAX}.input", END]),
        ("blocks.1.mlp.hook_post", ["transformer.h.1.mlp.c_proj.input", END]),
        ("unembed.hook_out", [END]),
        # That the one follows from the other has to be seen.
        (
            ["blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"],
            [f"{SOFTMAX}.input", f"{SOFTMAX}.output", END],
        ),
        (
            ["blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"],
            [f"transformer.h.1.mlp.{at}" for at in ("c_fc.output", "act.input", "act.output", "c_proj.input")] + [END],
        ),
    ],
)
def test_a_cache_reads_the_places_of_its_points_only(
    raw: Any, tokens: Tensor, visits: list[str], name: str | list[str], places: list[str]
) -> None:
    raw.run_with_cache(tokens, names_filter=name)
    assert visits == places


def test_handles_are_only_where_a_run_goes(hf: Any, lens: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    handled: list[str] = []

    def hook(value: Tensor, hook: HookPoint) -> None:
        handled[:] = [name for name, module in hf.named_modules() if "__nnsight__" in module.__dict__]

    lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_post", hook)])
    assert "transformer.h.1.mlp.c_proj" in handled and "transformer.h.0.mlp.c_proj" not in handled
    assert_untouched(hf, lens)


# --- order -----------------------------------------------------------------------------------------------------------


class MLPFirst(GPT2Block):
    """A block that runs its MLP before its attention."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        kwargs.pop("encoder_hidden_states", None)
        kwargs = {
            name: kwargs[name] for name in ("attention_mask", "past_key_values", "position_ids") if name in kwargs
        }
        return hidden_states + self.attn(self.ln_1(hidden_states), *args, **kwargs)[0]


def test_the_order_of_places_is_measured(
    hf: Any, lens: Any, raw: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    plain = list(raw.run_with_cache(tokens)[1])
    for block in hf.transformer.h:
        block.__class__ = MLPFirst
    expected = hf(tokens).logits
    # A lens that has measured the order before notices that it is another one, and measures again.
    with pytest.raises(SourceNotFoundError, match="run once more"):
        raw.run_with_cache(tokens)
    assert_untouched(hf, raw)
    logits, cache = raw.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert sorted(cache) == sorted(plain) and list(cache) != plain
    assert list(cache).index("blocks.0.mlp.hook_post") < list(cache).index("blocks.0.attn.hook_q")
    zeroed = [(lambda name: "mlp.hook_post" in name, lambda value, hook: value * 0)]
    # One that sees the model for the first time is right at once.
    found = lens.run_with_hooks(tokens, fwd_hooks=zeroed)
    for block in hf.transformer.h:
        nn.init.zeros_(block.mlp.c_proj.weight)
    assert torch.allclose(lens(tokens), found, atol=1e-5)


def test_measuring_leaves_the_model_and_the_random_state_alone(hf: Any) -> None:
    hf.train()
    state = torch.random.get_rng_state()
    attentions = ["transformer.h.0.attn", "transformer.h.1.attn"]
    order, overwritten, _ = measure(hf, attentions, {"input_ids": torch.zeros(1, 2).long()})
    assert not overwritten
    assert torch.equal(torch.random.get_rng_state(), state)
    assert hf.training and not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    inside = ["transformer.h.0.attn"] * 3
    ranks = [order[path, side, 0] for path, side in zip(inside, ("input", "softmax", "output"), strict=True)]
    assert ranks == sorted(ranks) and ranks[2] < order["transformer.h.0.mlp", "input", 0]


def test_a_softmax_that_is_not_there_is_an_error_that_says_where_it_was_looked_for(
    hf: Any, new_lens: Callable, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, assert_untouched: Callable
) -> None:
    record = BY_CLASS["GPT2LMHeadModel"]
    elsewhere = replace(record, block=replace(record.block, softmax=Softmax(operation="sparsemax")))
    monkeypatch.setitem(BY_CLASS, "GPT2LMHeadModel", elsewhere)
    lens = new_lens(hf)
    lens.run_with_cache(tokens, names_filter="blocks.0.attn.hook_z")
    for name in ("scores", "pattern"):
        with pytest.raises(SourceNotFoundError, match="no 'sparsemax' inside a call of 'attention_interface'"):
            lens.run_with_cache(tokens, names_filter=lambda point, name=name: point.endswith(name))
    assert_untouched(hf, lens)


# --- parts of the model ----------------------------------------------------------------------------------------------


@contextmanager
def computing(hf: nn.Module) -> Iterator[list[str]]:
    """The modules without parts that compute something meanwhile, in order."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
        for name, module in hf.named_modules()
        if not list(module.children())
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("hook", [None, "hook_embed", "blocks.0.attn.hook_pattern"])
@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ({"stop_at_layer": 0}, "transformer.h.0"),
        ({"stop_at_layer": 1}, "transformer.h.1"),
        ({"stop_at_layer": -1}, "transformer.h.1"),
        ({"stop_at_layer": 2}, "transformer.ln_f"),
        ({"stop_at_layer": 9}, "transformer.ln_f"),
        ({"return_type": None}, "lm_head"),
    ],
    ids=str,
)
def test_later_layers_do_not_run(
    hf: Any, either: Any, tokens: Tensor, hook: str | None, arguments: dict, end: str
) -> None:
    hooks = [] if hook is None else [(hook, keep)]
    either.run_with_hooks(tokens, fwd_hooks=hooks)
    with computing(hf) as whole:
        hf(tokens)
    before_end = whole[: [name.startswith(end) for name in whole].index(True)]
    with computing(hf) as ran:
        out = either.run_with_hooks(tokens, fwd_hooks=hooks, **arguments)
    if out is None and hooks:
        # The final norm is left by an exception after it has computed, which a module hook does not see.
        ran.append("transformer.ln_f")
    assert ran == before_end
    if "stop_at_layer" in arguments:
        layer = len(range(2)[: arguments["stop_at_layer"]])
        name = f"blocks.{layer}.hook_resid_pre" if layer < 2 else "blocks.1.hook_resid_post"
        assert torch.allclose(out, either.run_with_cache(tokens)[1][name], atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 2, -1])
def test_earlier_layers_do_not_run(hf: Any, either: Any, tokens: Tensor, start: int) -> None:
    logits, cache = either.run_with_cache(tokens)
    layer = range(2)[start:]
    first = layer[0] if len(layer) else 2
    residual = cache[f"blocks.{first}.hook_resid_pre"] if first < 2 else cache["blocks.1.hook_resid_post"]
    with computing(hf) as ran:
        found = either(residual, start_at_layer=start)
    assert torch.allclose(found, logits, atol=1e-4)
    assert [name for name in ran if name.startswith(tuple(f"transformer.h.{layer}." for layer in range(first)))] == []
    assert "transformer.wte" not in ran and ran[-1] == "lm_head"


def test_a_span_in_the_middle(either: Any, tokens: Tensor) -> None:
    cache = either.run_with_cache(tokens)[1]
    found, inner = either.run_with_cache(cache["blocks.0.hook_resid_pre"], start_at_layer=0, stop_at_layer=1)
    assert torch.allclose(found, cache[POST], atol=1e-5)
    assert list(inner) == [name for name in cache if name.startswith("blocks.0.")]
    assert torch.equal(
        either(found, start_at_layer=1, stop_at_layer=1), either(found, start_at_layer=1, stop_at_layer=0)
    )


# --- attention implementations ---------------------------------------------------------------------------------------


@pytest.fixture
def sdpa(new_hf: Callable, new_lens: Callable, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[str]]:
    """(HF model with sdpa attention, lens, the implementations it is switched to)."""
    hf, switched = new_hf(attention="sdpa"), []
    lens = new_lens(hf)
    lens.interior.engine.order  # noqa: B018 (measured once, with eager attention)
    genuine = type(hf).set_attn_implementation
    monkeypatch.setattr(
        type(hf), "set_attn_implementation", lambda self, name: switched.append(name) or genuine(self, name)
    )
    return hf, lens, switched


def test_only_runs_that_touch_scores_or_pattern_switch_to_eager(sdpa: Any, tokens: Tensor) -> None:
    hf, lens, switched = sdpa
    reachable = [
        name for name in lens.hook_dict if "scores" not in name and "pattern" not in name and lens._is_on(name)
    ]
    lens(tokens)
    lens.run_with_cache(tokens, names_filter=reachable)
    lens.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", doubled), ("blocks.0.attn.hook_v", doubled)])
    assert switched == []
    for name in ("scores", "pattern"):
        point = f"blocks.1.attn.hook_{'attn_' if name == 'scores' else ''}{name}"
        seen: list[str] = []

        def look(value: Tensor, hook: HookPoint, seen: list[str] = seen) -> None:
            seen.append(hf.config._attn_implementation)

        lens.run_with_hooks(tokens, fwd_hooks=[(point, look)])
        assert (switched, seen, hf.config._attn_implementation) == (["eager", "sdpa"], ["eager"], "sdpa")
        switched.clear()


def test_both_implementations_give_the_same_numbers(
    sdpa: Any, new_hf: Callable, new_lens: Callable, tokens: Tensor
) -> None:
    _, lens, _ = sdpa
    logits, cache = lens.run_with_cache(tokens)
    expected, reference = new_lens(new_hf()).run_with_cache(tokens)
    assert torch.allclose(logits, expected, atol=1e-5) and list(cache) == list(reference)
    assert all(torch.allclose(cache[name], reference[name], atol=1e-5) for name in cache)
    halved = [("blocks.0.attn.hook_pattern", lambda value, hook: value / 2)]
    assert torch.allclose(
        lens.run_with_hooks(tokens, fwd_hooks=halved),
        new_lens(new_hf()).run_with_hooks(tokens, fwd_hooks=halved),
        atol=1e-4,
    )


@pytest.mark.parametrize("mask", [False, True])
def test_one_layers_pattern_leaves_the_others_as_they_were_chosen(
    sdpa: Any, new_hf: Callable, new_lens: Callable, tokens: Tensor, mask: bool
) -> None:
    hf, lens, switched = sdpa
    options = {"attention_mask": torch.tensor([0, 1, 1, 1, 1, 1, 1]).expand(2, -1)} if mask else {}
    config = [block.attn.config for block in hf.transformer.h]
    plain = lens.run_with_cache(tokens, names_filter=lambda name: name.endswith("resid_post"), **options)[1]
    eager = new_lens(new_hf()).run_with_cache(tokens, **options)[1]
    for layer, others in ((0, []), (1, ["blocks.0.hook_resid_post"])):
        names = [f"blocks.{layer}.attn.hook_{name}" for name in ("pattern", "attn_scores")]
        logits, cache = lens.run_with_cache(tokens, names_filter=[*names, *others], **options)
        # What comes before is the same, so that the first layer's square is to the last bit.
        same = torch.equal if layer == 0 else partial(torch.allclose, atol=1e-5)
        assert all(same(cache[name], eager[name]) for name in names)
        assert all(torch.equal(cache[name], plain[name]) for name in others)
        # Where nothing may be attended to, the implementations differ.
        assert torch.allclose(logits[:, mask:], lens(tokens, **options)[:, mask:], atol=1e-4)
    assert switched == [] and all(block.attn.config is hf.config for block in hf.transformer.h)
    assert [block.attn.config for block in hf.transformer.h] == config
    assert not any(block.attn._forward_pre_hooks for block in hf.transformer.h)


@pytest.mark.parametrize("option", ["reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"])
def test_variants_of_attention(new_hf: Callable, new_lens: Callable, tokens: Tensor, option: str) -> None:
    hf = new_hf(**{option: True})
    lens = new_lens(hf, raw=True)
    logits, cache = lens.run_with_cache(tokens)
    assert torch.equal(logits, hf(tokens).logits)
    q, k, v = (cache[f"blocks.1.attn.hook_{letter}"] for letter in "qkv")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 5**0.5 / (2 if option.startswith("scale") else 1)
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert torch.allclose(cache["blocks.1.attn.hook_attn_scores"], scores, atol=1e-5)
    assert torch.allclose(cache["blocks.1.attn.hook_pattern"], scores.softmax(-1), atol=1e-6)
    assert torch.allclose(
        cache["blocks.1.attn.hook_z"], torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), atol=1e-5
    )


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_mode_gives_the_same_numbers(either: Any, tokens: Tensor, mode: Any) -> None:
    def in_place(value: Tensor, hook: HookPoint) -> None:
        value[:, 2:] = 0.5

    edits = [
        ("hook_embed", in_place),
        (MID, in_place),
        ("blocks.1.attn.hook_q", doubled),
        ("blocks.1.attn.hook_z", in_place),
    ]
    edits += [("blocks.0.attn.hook_pattern", in_place), (POST, doubled), ("blocks.1.ln2.hook_normalized", in_place)]
    logits, cache = either.run_with_cache(tokens)
    edited = either.run_with_hooks(tokens, fwd_hooks=edits)
    with mode():
        again, seen = either.run_with_cache(tokens)
        assert torch.equal(again, logits) and all(torch.equal(seen[name], cache[name]) for name in cache)
        assert torch.equal(either.run_with_hooks(tokens, fwd_hooks=edits), edited)
        assert again.requires_grad == (mode is torch.enable_grad)


def test_autocast_reaches_the_hf_model(raw: Any, hf: Any, tokens: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = hf(tokens).logits
        logits, cache = raw.run_with_cache(tokens)
        edited = raw.run_with_hooks(tokens, fwd_hooks=[(MID, doubled), ("blocks.0.attn.hook_v", doubled)])
    assert torch.equal(logits, expected) and logits.dtype == torch.bfloat16
    assert cache["blocks.0.attn.hook_q"].dtype == torch.bfloat16 and edited.dtype == torch.bfloat16


def test_dropout_in_training_is_hfs(hf: Any, raw: Any, tokens: Tensor) -> None:
    raw.train()
    assert hf.training
    torch.manual_seed(0)
    expected = hf(tokens).logits
    for run in (raw, lambda tokens: raw.run_with_hooks(tokens, fwd_hooks=[(POST, keep)])):
        torch.manual_seed(0)
        assert torch.equal(run(tokens), expected)
    raw.eval()
    assert not hf.training and not torch.equal(raw(tokens), expected)


def test_gradients_reach_what_a_hook_puts_in(lens: Any, hf: Any, tokens: Tensor) -> None:
    hf.requires_grad_(False)
    for name in points.names(2):
        if lens._is_on(name) and not name.startswith("blocks.0"):
            vector = torch.zeros((), requires_grad=True)

            def tilted(value: Tensor, hook: HookPoint, vector: Tensor = vector) -> Tensor:
                return value + vector * torch.linspace(-1, 2, value.shape[-1])

            lens.run_with_hooks(tokens, fwd_hooks=[(name, tilted)], return_type="loss").backward()
            assert vector.grad is not None and vector.grad.isfinite() and vector.grad != 0, name


def test_edits_are_refused_where_gradients_would_leave_them_out(hf: Any, raw: Any, tokens: Tensor) -> None:
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    edit = {"fwd_hooks": [("blocks.0.attn.hook_z", doubled)]}
    raw.run_with_hooks(tokens, **edit)
    raw.train()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        raw.run_with_hooks(tokens, **edit)
    with torch.no_grad():
        raw.run_with_hooks(tokens, **edit)
    raw.run_with_cache(tokens)
    raw(tokens, return_type="loss").backward()
    hf.gradient_checkpointing_disable()
    raw.run_with_hooks(tokens, **edit)
    assert raw.list_hooks() == {}
