"""Do nnsight's traces and TransformerLens' hook points work on one model, with the numbers that each has by itself?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from lensbridge import HookPoint, points
from lensbridge.errors import (
    DisabledPointError,
    HookError,
    TraceError,
    UnknownArgumentError,
    UnknownPointError,
)

FLAGS = ("set_use_attn_result", "set_use_split_qkv_input", "set_use_attn_in", "set_use_hook_mlp_in")
NAMES = points.names(2)
#: An edit of hook_attn_in has no effect beside split inputs, as in TransformerLens.
EDITABLE = [name for name in NAMES if not name.startswith("blocks.1") and not name.endswith("hook_attn_in")]
#: Of the norm before attention a cache keeps the gradient of the last firing, a trace has the sum over all three.
WITH_ONE_GRADIENT = [name for name in EDITABLE if ".ln1." not in name]
POST, Z, PATTERN = "blocks.0.hook_resid_post", "blocks.0.attn.hook_z", "blocks.0.attn.hook_pattern"
TEXTS = ["The cat sat", "the dog saw Mary give John a drink"]
BASES = {"raw": {"raw": True}, "processed": {}, "refactored": {"refactor_factored_attn_matrices": True}}


@pytest.fixture(params=BASES)
def based(request: pytest.FixtureRequest, hf: Any, new_lens: Callable) -> Any:
    """A lens in each basis, with every point on."""
    lens = new_lens(hf, **BASES[request.param])
    for flag in FLAGS:
        getattr(lens, flag)(True)
    return lens


def close(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def changed(x: Tensor, hook: Any = None) -> Tensor:
    return 0.5 * x + 0.2


def overwrite(x: Tensor, hook: Any = None) -> None:
    x[:, 1:] = 0.75


# --- values -----------------------------------------------------------------------------------------------------------


def test_every_point_has_the_value_that_a_cache_has(based: Any, tokens: Tensor) -> None:
    _, cache = based.run_with_cache(tokens)
    with based.trace(tokens):
        values = nnsight.save({})
        for name in NAMES:
            values[name] = based.point(name).value
    assert list(values) == list(cache)
    assert all(close(values[name], cache[name]) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_point_alone(based: Any, tokens: Tensor, name: str) -> None:
    with based.trace(tokens):
        value = based.hook_dict[name].value.save()
    assert close(value, based.run_with_cache(tokens, names_filter=name)[1][name])


def test_points_are_found_by_path_by_name_and_by_short_name(lens: Any, tokens: Tensor) -> None:
    with lens.trace(tokens):
        by_path = lens.blocks[1].attn.hook_pattern.value.save()
        by_name = lens.hook_dict["blocks.1.attn.hook_pattern"].value.save()
        by_short_name = lens.point("pattern", 1).value.save()
    assert by_path is by_name is by_short_name
    assert lens.point("ln_final.hook_scale") is lens.point("scale") is lens.ln_final.hook_scale
    with pytest.raises(UnknownPointError, match=r"no hook point 'blocks.0.hook_resid'.*blocks.0.hook_resid_p"):
        lens.point("blocks.0.hook_resid")


def test_reading_changes_nothing(based: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    expected = hf(tokens).logits
    with based.trace(tokens) as tracer:
        for name in NAMES:
            based.point(name).value  # noqa: B018
        logits = tracer.result.logits.save()
    assert torch.equal(logits, expected)
    assert_untouched(hf, based)


def test_only_what_is_saved_leaves_the_body(lens: Any, tokens: Tensor) -> None:
    kept = lost = None
    with lens.trace(tokens):
        lost = lens.blocks[0].hook_resid_post.value
        kept = nnsight.save(lost[:, -1])
    assert lost is None
    assert kept is not None
    assert kept.shape == (2, 20)


def test_points_of_one_place_come_in_any_order(based: Any, tokens: Tensor) -> None:
    _, cache = based.run_with_cache(tokens)
    with based.trace(tokens):
        values = nnsight.save({})
        for short in ("v", "q", "k"):
            values[short] = based.point(short, 0).value
        for name in ("ln2.hook_normalized", "hook_mlp_in", "ln2.hook_scale", "hook_resid_mid"):
            values[name] = based.point(f"blocks.0.{name}").value
    for name, value in values.items():
        assert close(value, cache[name, 0] if len(name) == 1 else cache[f"blocks.0.{name}"]), name


# --- edits ------------------------------------------------------------------------------------------------------------


def as_shown(model: Any, hf_logits: Tensor, edited: str) -> Tensor:
    """HF's logits as the model shows them, but for those that were put there by an edit of them."""
    return hf_logits if edited == "unembed.hook_out" else model.interior.basis.logits(hf_logits)


def run_with_hook(model: Any, tokens: Tensor, name: str, edit: Callable) -> tuple[Tensor, Any]:
    with model.hooks([(name, edit)]):
        return model.run_with_cache(tokens)


@pytest.mark.parametrize("name", EDITABLE)
def test_an_assignment_is_what_a_hook_returns(based: Any, tokens: Tensor, name: str) -> None:
    expected, cache = run_with_hook(based, tokens, name, changed)
    with based.trace(tokens) as tracer:
        based.point(name).value = changed(based.point(name).value)
        now = based.point(name).value.save()
        end = based.blocks[1].hook_resid_post.value.save() if name.startswith("blocks") else nnsight.save(None)
        logits = based.unembed.hook_out.value.save()
        hf_logits = tracer.result.logits.save()
    assert close(logits, expected)
    assert close(now, cache[name])
    if name.startswith("blocks"):
        assert close(end, cache["blocks.1.hook_resid_post"])
    assert close(as_shown(based, hf_logits, name), expected)


@pytest.mark.parametrize("name", EDITABLE)
def test_an_edit_in_place_is_a_hooks(based: Any, tokens: Tensor, name: str) -> None:
    expected, cache = run_with_hook(based, tokens, name, overwrite)
    with based.trace(tokens):
        based.point(name).value[:, 1:] = 0.75
        logits = based.unembed.hook_out.value.save()
    assert close(logits, expected)


@pytest.mark.parametrize("name", EDITABLE)
def test_an_edit_by_the_last_statement_takes_effect(based: Any, tokens: Tensor, name: str) -> None:
    expected, _ = run_with_hook(based, tokens, name, changed)
    with based.trace() as tracer:
        with tracer.invoke(tokens):
            based.point(name).value = changed(based.point(name).value)
        with tracer.invoke():
            logits = tracer.result.logits.save()
    assert close(as_shown(based, logits, name), expected)


def test_edits_add_up_along_the_way(based: Any, tokens: Tensor) -> None:
    names = [
        "blocks.0.hook_resid_pre",
        PATTERN,
        "blocks.0.hook_mlp_out",
        "blocks.1.attn.hook_v",
        "unembed.hook_in",
    ]
    with based.hooks([(name, changed) for name in names]):
        expected, cache = based.run_with_cache(tokens)
    with based.trace(tokens):
        values = nnsight.save({})
        for name in NAMES:
            values[name] = based.point(name).value
            if name in names:
                based.point(name).value = values[name] = changed(values[name])
    assert all(close(values[name], cache[name]) for name in NAMES)
    assert close(values["unembed.hook_out"], expected)


def test_scores_that_are_edited_show_in_the_pattern(based: Any, tokens: Tensor) -> None:
    with based.trace(tokens):
        based.blocks[0].attn.hook_attn_scores.value[:, 2] = -torch.inf
        pattern = based.blocks[0].attn.hook_pattern.value.save()
        z = based.blocks[0].attn.hook_z.value.save()

    def mute(x: Tensor, hook: Any) -> None:
        x[:, 2] = -torch.inf

    _, cache = run_with_hook(based, tokens, "blocks.0.attn.hook_attn_scores", mute)
    assert pattern[:, 2].abs().max() == 0
    assert close(pattern, cache[PATTERN])
    assert close(z, cache[Z])


def test_ways_to_write_an_edit(lens: Any, tokens: Tensor) -> None:
    expected = lens.run_with_hooks(tokens, fwd_hooks=[(Z, lambda x, hook: x * 0)])
    outputs = []
    with lens.trace(tokens):
        lens.blocks[0].attn.hook_z.value *= 0
        outputs.append(lens.unembed.hook_out.value)
        nnsight.save(outputs)
    with lens.trace(tokens):
        lens.blocks[0].attn.hook_z.value = torch.zeros(1)
        outputs.append(lens.unembed.hook_out.value)
        nnsight.save(outputs)
    with lens.trace(tokens):
        z = lens.blocks[0].attn.hook_z.value
        z[:] = 7
        lens.blocks[0].attn.hook_z.value = nn.Parameter(torch.zeros_like(z))
        outputs.append(lens.unembed.hook_out.value)
        nnsight.save(outputs)
    with lens.trace(tokens):
        z = lens.blocks[0].attn.hook_z.value
        z.mul_(0.5)
        assert lens.blocks[0].attn.hook_z.value is z
        lens.blocks[0].attn.hook_z.value[:] = 0
        outputs.append(lens.unembed.hook_out.value)
        nnsight.save(outputs)
    assert len(outputs) == 4
    assert all(close(output, expected) for output in outputs)


def test_activation_patching_by_hand(lens: Any, tokens: Tensor) -> None:
    """A value of one trace put into another, at one position."""
    clean, corrupted = tokens[:1], tokens[1:]
    _, cache = lens.run_with_cache(clean)
    with lens.session():
        with lens.trace(clean):
            source = lens.blocks[0].hook_resid_post.value
        with lens.trace(corrupted):
            lens.blocks[0].hook_resid_post.value[:, 3] = source[:, 3]
            logits = lens.unembed.hook_out.value.save()

    def patch(x: Tensor, hook: Any) -> None:
        x[:, 3] = cache[POST][:, 3]

    assert close(logits, lens.run_with_hooks(corrupted, fwd_hooks=[(POST, patch)]))


# --- nnsight's own paths ----------------------------------------------------------------------------------------------


def test_paths_of_nnsight_give_what_module_hooks_see(based: Any, hf: Any, tokens: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    paths = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.act", "transformer.h.1.mlp", "lm_head"]
    handles = [
        hf.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: seen.update({path: out}))
        for path in paths
    ]
    logits = hf(tokens).logits
    for handle in handles:
        handle.remove()
    with based.trace(tokens):
        values = nnsight.save({})
        based.blocks[0].hook_resid_pre.value  # noqa: B018
        values[paths[0]] = based.envoy.transformer.h[0].attn.c_attn.output
        values["k"] = based.blocks[0].attn.hook_k.value
        values[paths[1]] = based.envoy.transformer.h[0].mlp.act.output
        values["post"] = based.blocks[0].mlp.hook_post.value
        values[paths[2]] = based.envoy.transformer.h[1].mlp.output
        values[paths[3]] = based.envoy.lm_head.output
        values["logits"] = based.envoy.output.logits
    assert all(torch.equal(values[path], seen[path]) for path in paths)
    assert torch.equal(values["logits"], logits)
    _, cache = based.run_with_cache(tokens)
    assert close(values["k"], cache["k", 0])
    assert torch.equal(values["post"], values[paths[1]])


def test_an_edit_at_a_path_shows_at_the_point_and_the_other_way_round(raw: Any, tokens: Tensor) -> None:
    with raw.trace(tokens):
        raw.envoy.transformer.h[0].mlp.output = torch.ones(2, 7, 20)
        out = raw.blocks[0].hook_mlp_out.value.save()
        raw.blocks[0].hook_resid_post.value = torch.full((2, 7, 20), 2.0)
        block = raw.envoy.transformer.h[0].output.save()
        after = raw.envoy.transformer.h[1].input.save()
    assert (out == 1).all()
    assert (block == 2).all()
    assert (after == 2).all()


def test_what_was_read_at_a_place_is_read_anew_after_an_edit_there(raw: Any, tokens: Tensor) -> None:
    with raw.trace(tokens):
        before = raw.blocks[0].attn.hook_q.value.save()
        raw.envoy.transformer.h[0].attn.c_attn.output = torch.zeros(2, 7, 60)
        after = raw.blocks[0].attn.hook_k.value.save()
    assert before.abs().max() > 0
    assert after.abs().max() == 0


def test_operations_inside_a_forward(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    """Also where a point looks into the same forward."""
    _, cache = lens.run_with_cache(tokens)
    assert "attention_interface_1" in str(lens.envoy.transformer.h[1].attn.source)
    assert_untouched(hf, lens)
    for _ in range(2):
        with lens.trace(tokens):
            first = lens.envoy.transformer.h[0].attn.source.attention_interface_1.output[0].save()
            pattern = lens.blocks[1].attn.hook_pattern.value.save()
            act = lens.envoy.transformer.h[1].mlp.source.self_act_0.output.save()
        with lens.trace(tokens):
            also = lens.blocks[0].attn.hook_pattern.value.save()
            again = lens.envoy.transformer.h[0].attn.c_proj.input.save()
        assert torch.equal(first.flatten(-2), again)
        assert close(pattern, cache["pattern", 1])
        assert close(also, cache["pattern", 0])
        assert close(act, cache["post", 1])
        assert_untouched(hf, lens)


def test_a_trace_of_a_part(lens: Any, hf: Any, assert_untouched: Callable) -> None:
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    with lens.envoy.transformer.h[0].mlp.trace(x) as tracer:
        pre = lens.envoy.transformer.h[0].mlp.c_fc.output.save()
        out = tracer.result.save()
    assert torch.equal(pre, hf.transformer.h[0].mlp.c_fc(x))
    assert torch.equal(out, hf.transformer.h[0].mlp(x))
    assert_untouched(hf, lens)


def test_edits_that_nnsight_keeps(lens: Any, tokens: Tensor) -> None:
    expected = lens.run_with_hooks(tokens, fwd_hooks=[(Z, changed)])
    with lens.envoy.edit() as (tracer, edited):
        lens.blocks[0].attn.hook_z.value = changed(lens.blocks[0].attn.hook_z.value)
    for _ in range(2):
        with edited.trace(tokens):
            logits = lens.unembed.hook_out.value.save()
        assert close(logits, expected)
    with lens.trace(tokens):
        plain = lens.unembed.hook_out.value.save()
    assert close(plain, lens(tokens))


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("input", [TEXTS[0], TEXTS, TEXTS[::-1]], ids=["text", "texts", "longer first"])
def test_texts_become_what_forward_makes_of_them(lens: Any, input: Any, bos: bool | None, side: Any) -> None:
    expected, cache = lens.run_with_cache(input, prepend_bos=bos, padding_side=side)
    with lens.trace(input, prepend_bos=bos, padding_side=side):
        embed = lens.hook_embed.value.save()
        pattern = lens.blocks[0].attn.hook_pattern.value.save()
        logits = lens.unembed.hook_out.value.save()
    assert close(embed, cache["embed"])
    assert close(pattern, cache[PATTERN])
    assert close(logits, expected)
    assert lens.tokenizer.padding_side == "right"


def test_tokens_and_masks(lens: Any, tokens: Tensor) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for input, options in [(tokens, {}), (tokens[0], {}), (tokens, {"attention_mask": mask})]:
        with lens.trace(input, **options):
            logits = lens.unembed.hook_out.value.save()
        assert close(logits, lens(input, **options))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("a", "b"), {}, TypeError, "one input, not 2"),
        (("a",), {"remote": True}, UnknownArgumentError, "remote: a trace takes an input, and prepend_bos"),
        ((3,), {}, TypeError, "text or a tensor"),
        ((torch.zeros(1, 4),), {}, TypeError, "floats"),
        ((torch.ones(1, 30, dtype=torch.long),), {}, IndexError, "30 tokens long"),
        (("a",), {"attention_mask": torch.ones(1, 9)}, AssertionError, "attention_mask has shape"),
        ((), {}, TraceError, r"of `with tracer.invoke\(input\):` inside a trace without input"),
    ],
)
def test_inputs_that_are_refused(
    lens: Any, hf: Any, assert_untouched: Callable, arguments: Any, options: Any, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words), lens.trace(*arguments, **options):
        lens.blocks[0].hook_resid_post.value  # noqa: B018
    assert_untouched(hf, lens)


# --- several inputs in one pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_invoke_sees_its_rows(based: Any, side: Any) -> None:
    expected, cache = based.run_with_cache(TEXTS, padding_side=side)
    with based.trace(padding_side=side) as tracer:
        with tracer.invoke(TEXTS[0]):
            first = nnsight.save({})
            for name in NAMES:
                first[name] = based.point(name).value
        with tracer.invoke(TEXTS[1]):
            second = nnsight.save({})
            for name in NAMES:
                second[name] = based.point(name).value
        with tracer.invoke():
            whole = based.unembed.hook_out.value.save()
    assert close(whole, expected)
    for name in NAMES:
        assert close(first[name], cache[name][:1]), name
        assert close(second[name], cache[name][1:]), name


@pytest.mark.parametrize("name", EDITABLE)
def test_an_edit_reaches_the_rows_of_its_invoke_only(based: Any, tokens: Tensor, name: str) -> None:
    plain = based(tokens)
    expected = based.run_with_hooks(tokens[1:], fwd_hooks=[(name, changed)])
    with based.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            first = based.unembed.hook_out.value.save()
        with tracer.invoke(tokens[1:]):
            based.point(name).value = changed(based.point(name).value)
            second = based.unembed.hook_out.value.save()
        with tracer.invoke():
            whole = tracer.result.logits.save()
    assert close(first, plain[:1])
    assert close(second, expected)
    if name != "unembed.hook_out":
        assert close(as_shown(based, whole, name), torch.cat([first, second]))


def test_a_value_of_one_prompt_put_into_another(lens: Any) -> None:
    _, cache = lens.run_with_cache(TEXTS)
    with lens.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(TEXTS[0]):
            source = lens.blocks[0].hook_resid_post.value
            barrier()
        with tracer.invoke(TEXTS[1]):
            barrier()
            lens.blocks[0].hook_resid_post.value[:, 2] = source[:, 2]
            logits = lens.unembed.hook_out.value.save()

    def patch(x: Tensor, hook: Any) -> None:
        x[1, 2] = cache[POST][0, 2]

    assert close(logits, lens.run_with_hooks(TEXTS, fwd_hooks=[(POST, patch)])[1:])


def test_invokes_of_different_kinds(lens: Any, tokens: Tensor) -> None:
    """Texts and tokens, with and without BOS, with a mask: each gives what it gives alone."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    with lens.trace() as tracer:
        with tracer.invoke(TEXTS):
            texts = lens.unembed.hook_out.value.save()
        with tracer.invoke(TEXTS[1], prepend_bos=False):
            no_bos = lens.unembed.hook_out.value.save()
        with tracer.invoke(tokens[0], attention_mask=mask):
            masked = lens.unembed.hook_out.value.save()
    assert (texts.shape[0], no_bos.shape[0], masked.shape[0]) == (2, 1, 1)
    alone = [lens(TEXTS), lens(TEXTS[1], prepend_bos=False), lens(tokens[0], attention_mask=mask)]
    assert close(texts[:, : alone[0].shape[1]][1], alone[0][1])
    assert close(no_bos[:, : alone[1].shape[1]], alone[1])
    assert close(masked[:, 1:7], alone[2][:, 1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_inside_an_invoke_and_around_it(lens: Any, side: Any) -> None:
    longest = "and then the dog saw Mary give John a drink."
    expected = lens([*TEXTS, longest], padding_side=side)
    with lens.trace(padding_side=side) as tracer:
        with tracer.invoke(TEXTS):
            first = lens.unembed.hook_out.value.save()
        with tracer.invoke(longest):
            second = lens.unembed.hook_out.value.save()
    assert close(torch.cat([first, second]), expected)


def test_invokes_of_different_lengths_need_a_pad_token(hf: Any, new_lens: Callable, tokens: Tensor) -> None:
    lens = new_lens(hf, tokenizer=None)
    lens.tokenizer = None
    with pytest.raises(ValueError, match="need a pad token"), lens.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            lens.blocks[0].hook_resid_post.value  # noqa: B018
        with tracer.invoke(tokens[1:, :4]):
            lens.blocks[0].hook_resid_post.value  # noqa: B018
    with lens.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            first = lens.unembed.hook_out.value.save()
        with tracer.invoke(tokens[1:]):
            second = lens.unembed.hook_out.value.save()
    assert close(torch.cat([first, second]), lens(tokens))


# --- the way through the model ----------------------------------------------------------------------------------------


def test_stopping_early(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    ran: list[int] = []
    expected = lens.run_with_cache(tokens)[1]["mlp_out", 0]
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in hf.transformer.h]
    with lens.trace(tokens) as tracer:
        value = lens.blocks[0].hook_mlp_out.value.save()
        tracer.stop()
    for handle in handles:
        handle.remove()
    assert close(value, expected)
    assert ran == []
    assert_untouched(hf, lens)


@pytest.mark.parametrize(
    "first",
    [lambda m: m.blocks[1].hook_resid_mid.value, lambda m: m.envoy.transformer.h[1].output],
    ids=["point", "path"],
)
def test_asking_too_late_is_an_error_that_says_so(
    lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable, first: Callable
) -> None:
    words = r"'blocks.0.hook_resid_post' was asked for too late.*docs/hook-points.md"
    with pytest.raises(TraceError, match=words), lens.trace(tokens):
        first(lens)
        lens.blocks[0].hook_resid_post.value  # noqa: B018
    assert_untouched(hf, lens)


def test_asking_nnsight_too_late_is_nnsights_error(
    lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    with pytest.raises(OutOfOrderError, match=r"transformer.h.0.output"), lens.trace(tokens):
        lens.blocks[1].hook_resid_mid.value  # noqa: B018
        lens.envoy.transformer.h[0].output  # noqa: B018
    assert_untouched(hf, lens)


def test_a_point_that_the_pass_never_comes_by(lens: Any, tokens: Tensor) -> None:
    words = r"'blocks.1.mlp.hook_pre' was asked for, but.*never comes by"
    with pytest.raises(TraceError, match=words), lens.trace(tokens):
        lens.envoy.transformer.h[1].mlp.skip(torch.zeros(2, 7, 20))
        lens.blocks[1].mlp.hook_pre.value  # noqa: B018


def test_values_exist_in_traces_only(lens: Any, tokens: Tensor) -> None:
    point = lens.blocks[0].hook_resid_post
    with pytest.raises(TraceError, match=r"'blocks.0.hook_resid_post' has a value only while a trace runs"):
        point.value  # noqa: B018
    with pytest.raises(TraceError, match="only while a trace runs"):
        point.value = torch.zeros(1)
    with pytest.raises(TraceError, match="None has a value only"):
        HookPoint().value  # noqa: B018
    with pytest.raises(TraceError, match=r"Before `with loss.backward\(\):`, read those"), lens.trace(tokens):
        loss = lens.unembed.hook_out.value.sum()
        with loss.backward():
            point.value.grad  # noqa: B018


def test_points_of_others_are_refused(lens: Any, raw: Any, tokens: Tensor) -> None:
    with pytest.raises(TraceError, match="of another model"), lens.trace(tokens):
        raw.blocks[0].hook_resid_post.value  # noqa: B018
    with pytest.raises(DisabledPointError, match="set_use_attn_result"), lens.trace(tokens):
        lens.blocks[0].attn.hook_result.value  # noqa: B018


@pytest.mark.parametrize(
    ("value", "words"),
    [(3, "was set to int"), (torch.zeros(3, 7, 20), r"\[3, 7, 20\], where the activation has \[2, 7, 20\]")],
)
def test_what_cannot_take_a_values_place_is_refused(lens: Any, tokens: Tensor, value: Any, words: str) -> None:
    with pytest.raises(HookError, match=words), lens.trace(tokens):
        lens.blocks[0].hook_resid_post.value = value


def test_an_exception_in_the_body_is_the_users(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    with pytest.raises(KeyError, match="mine"), lens.trace(tokens):
        lens.blocks[0].hook_resid_post.value[:] = 0
        raise KeyError("mine")
    assert_untouched(hf, lens)
    with lens.trace(tokens):
        logits = lens.unembed.hook_out.value.save()
    assert close(logits, lens(tokens))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_ONE_GRADIENT)
def test_the_gradient_at_every_point(based: Any, tokens: Tensor, name: str) -> None:
    _, cache = based.run_with_cache(tokens, names_filter=name, return_type="loss", incl_bwd=True)
    with based.trace(tokens):
        x = based.point(name).value
        loss = based.loss_fn(based.unembed.hook_out.value, tokens)
        with loss.backward():
            gradient = x.grad.save()
    based.zero_grad()
    assert close(gradient, cache[f"{name}_grad"])


def test_an_edited_gradient_flows_on(lens: Any, tokens: Tensor) -> None:
    with lens.trace(tokens):
        early = lens.blocks[0].attn.hook_z.value
        late = lens.blocks[0].hook_attn_out.value
        loss = lens.unembed.hook_out.value.square().mean()
        with loss.backward():
            late.grad = late.grad * 0
            gradient = early.grad.save()
    lens.zero_grad()
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("wanted", [True, None])
def test_gradients_after_the_trace(lens: Any, hf: Any, tokens: Tensor, wanted: bool | None) -> None:
    _, cache = lens.run_with_cache(tokens, names_filter=POST, return_type="loss", incl_bwd=True)
    lens.zero_grad()
    with lens.trace(tokens, gradients=wanted) as tracer:
        x = lens.blocks[0].hook_resid_post.value.save()
        logits = lens.unembed.hook_out.value.save()
        hf_logits = tracer.result.logits.save()
    loss = lens.loss_fn(logits, tokens)
    if wanted:
        (gradient,) = torch.autograd.grad(loss, x)
        assert close(gradient, cache[f"{POST}_grad"])
    else:
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(loss, x)
        assert torch.equal(hf_logits, hf(tokens).logits)


def test_gradients_of_several_prompts(lens: Any, tokens: Tensor) -> None:
    _, cache = lens.run_with_cache(tokens, names_filter=POST, return_type="loss", incl_bwd=True)
    lens.zero_grad()
    with lens.trace() as tracer:
        barrier = tracer.barrier(3)
        with tracer.invoke(tokens[:1]):
            barrier()
        with tracer.invoke(tokens[1:]):
            second = lens.blocks[0].hook_resid_post.value
            barrier()
        with tracer.invoke():
            barrier()
            loss = lens.loss_fn(lens.unembed.hook_out.value, tokens)
            with loss.backward():
                gradient = second.grad.save()
    lens.zero_grad()
    assert close(gradient, cache[f"{POST}_grad"][1:])


def test_parameters_get_their_gradients(lens: Any, tokens: Tensor) -> None:
    """Through what a body puts in, and through the rest of the model."""
    vector = torch.zeros(20, requires_grad=True)
    with lens.trace(tokens):
        lens.blocks[0].hook_resid_post.value += vector
        loss = lens.loss_fn(lens.unembed.hook_out.value, tokens).save()
    loss.backward()
    grads = vector.grad, lens.hf_model.lm_head.weight.grad.clone()
    lens.zero_grad()
    again = torch.zeros(20, requires_grad=True)
    lens.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(POST, lambda x, hook: x + again)]).backward()
    assert grads[0] is not None and again.grad is not None
    assert close(grads[0], again.grad)
    assert close(grads[1], lens.hf_model.lm_head.weight.grad)


# --- company ----------------------------------------------------------------------------------------------------------


def test_hooks_on_the_model_fire_in_traces(based: Any, tokens: Tensor) -> None:
    """Before the body has the value, also at points that the body does not ask for."""
    names = [Z, "blocks.1.hook_resid_mid", "unembed.hook_in"]
    with based.hooks([(name, changed) for name in names]):
        expected, cache = based.run_with_cache(tokens)
        with based.trace(tokens) as tracer:
            z = based.blocks[0].attn.hook_z.value.save()
            logits = tracer.result.logits.save()
        with based.trace(tokens):
            based.blocks[0].attn.hook_z.value = z
            mid = based.blocks[1].hook_resid_mid.value.save()
    assert close(z, cache[Z])
    assert close(mid, cache["blocks.1.hook_resid_mid"])
    assert close(based.interior.basis.logits(logits), expected)


def test_hooks_run_once_for_each_row_of_a_batch(lens: Any, tokens: Tensor) -> None:
    rows: list[int] = []
    with lens.hooks([(Z, lambda x, hook: rows.append(x.shape[0]) or x * 0)]):
        expected = lens(tokens)
        with lens.trace() as tracer:
            with tracer.invoke(tokens[:1]):
                first = lens.unembed.hook_out.value.save()
            with tracer.invoke(tokens[1:]):
                second = lens.unembed.hook_out.value.save()
            with tracer.invoke():
                whole = lens.unembed.hook_out.value.save()
    assert rows == [2, 1, 1]
    assert close(torch.cat([first, second]), expected)
    assert close(whole, expected)


def test_an_error_in_a_hook_is_the_hooks(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    """`nn.Module` would take an AttributeError for a missing attribute of the point."""

    def broken(x: Tensor, hook: Any) -> None:
        x.no_such_thing()  # type: ignore[operator]

    with (
        lens.hooks([(Z, broken)]),
        pytest.raises(TraceError, match="serving 'blocks.0.attn.hook_z' failed.*no_such_thing"),
        lens.trace(tokens),
    ):
        lens.blocks[0].attn.hook_z.value  # noqa: B018
    assert_untouched(hf, lens)


class Halving(nn.Module):
    """Takes a point's place."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_inside = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_inside(0.5 * x)


def test_a_module_in_a_points_place_runs_in_traces(lens: Any, tokens: Tensor) -> None:
    lens.blocks[0].hook_mlp_out = Halving()
    lens.setup()
    expected, cache = lens.run_with_cache(tokens)
    with lens.trace(tokens):
        post = lens.blocks[0].hook_resid_post.value.save()
        logits = lens.unembed.hook_out.value.save()
    assert close(post, cache[POST])
    assert close(logits, expected)
    with pytest.raises(TraceError, match="in a module that was put in a hook point's place"), lens.trace(tokens):
        lens.blocks[0].hook_mlp_out.hook_inside.value  # noqa: B018


def test_the_model_runs_in_the_body_of_a_trace(
    lens: Any, raw: Any, hf: Any, tokens: Tensor, assert_untouched: Callable
) -> None:
    """Runs, traces and another lens on the same HF model leave the trace around them alone."""
    other = tokens.flip(1)
    cache, expected, theirs = lens.run_with_cache(tokens)[1], lens.run_with_cache(other)[1], raw(other)
    block = lens.blocks[1](cache[POST])
    with lens.trace(tokens):
        before = lens.blocks[0].attn.hook_pattern.value.save()
        inner = lens.run_with_cache(other)[1].cache_dict.save()
        plain = lens(other).save()
        through = lens.blocks[1](cache[POST]).save()
        with lens.trace(other):
            traced = lens.blocks[1].attn.hook_z.value.save()
            path = lens.envoy.transformer.h[1].attn.c_proj.input.save()
        hooked = lens.run_with_hooks(other, fwd_hooks=[(Z, changed)]).save()
        from_raw = raw(other).save()
        after = lens.blocks[1].attn.hook_z.value.save()
        here = lens.envoy.transformer.h[1].attn.c_proj.input.save()
    assert close(before, cache[PATTERN])
    assert close(inner["blocks.1.attn.hook_q"], expected["q", 1])
    assert close(plain, expected["unembed.hook_out"])
    assert close(through, block)
    assert close(traced, expected["z", 1])
    assert not close(path, here)
    assert close(hooked, lens.run_with_hooks(other, fwd_hooks=[(Z, changed)]))
    assert close(from_raw, theirs)
    assert close(after, cache["z", 1])
    assert_untouched(hf, lens)


def test_a_trace_inside_a_hook(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable) -> None:
    other = tokens.flip(1)
    expected, seen = lens.run_with_cache(other)[1], []

    def look(x: Tensor, hook: Any) -> None:
        with lens.trace(other) as tracer:
            value = lens.blocks[0].hook_resid_mid.value.save()
            tracer.stop()
        seen.append(value)

    logits = lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_mid", look)])
    assert close(seen[0], expected["resid_mid", 0])
    assert close(logits, lens(tokens))
    assert_untouched(hf, lens)


def test_attention_is_eager_in_traces_only(new_hf: Callable, new_lens: Callable, tokens: Tensor) -> None:
    hf = new_hf(attention="sdpa")
    lens = new_lens(hf)
    with lens.trace(tokens):
        pattern = lens.blocks[1].attn.hook_pattern.value.save()
        inside = nnsight.save(str(hf.config._attn_implementation))
    assert (inside, hf.config._attn_implementation) == ("eager", "sdpa")
    assert close(pattern, lens.run_with_cache(tokens)[1]["pattern", 1])


def test_modules_that_were_replaced_are_found_by_the_next_trace(lens: Any, hf: Any, tokens: Tensor) -> None:
    stale = lens.envoy
    with lens.trace(tokens):
        before = lens.blocks[0].hook_mlp_out.value.save()
    new = copy.deepcopy(hf.transformer.h[0].mlp)
    with torch.no_grad():
        new.c_proj.weight.mul_(2)
    hf.transformer.h[0].mlp = new
    with lens.trace(tokens):
        after = lens.blocks[0].hook_mlp_out.value.save()
    assert not close(before, after)
    assert close(after, lens.run_with_cache(tokens)[1]["mlp_out", 0])
    with pytest.raises(TraceError, match=r"use model.envoy anew"), stale.trace(tokens):
        lens.blocks[0].hook_mlp_out.value  # noqa: B018


def test_an_envoy_does_not_keep_its_model(new_lens: Callable) -> None:
    import gc

    envoy = new_lens().envoy
    gc.collect()
    with pytest.raises(TraceError, match="is gone"):
        envoy.trace(torch.zeros(1, 3, dtype=torch.long)).execute(None)
