"""Does generation write what HuggingFace writes, may hooks act on every step, and is its cache that of one run?"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import ActivationCache, HookPoint, decoding, inputs
from lensbridge.errors import DisabledPointError, UnknownArgumentError, UnknownPointError
from lensbridge.generation_cache import GenerationRecording
from tests.conftest import build_hf

TEXTS = ["The cat sat", "Mary", "John a drink"]
QUIET = {"verbose": False}
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False}
#: To the end, whatever comes.
ON = GREEDY | {"stop_at_eos": False}


def hf_generate(hf: Any, tokens: Tensor, mask: Tensor | None = None, new: int = 8, **arguments: Any) -> Any:
    """HuggingFace's own greedy generation, with its logits."""
    mask = torch.ones_like(tokens) if mask is None else mask
    return hf.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )


def close(mine: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# --- HuggingFace's text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("hooked", [False, True], ids=["unseen", "hooked"])
def test_logits_are_huggingfaces_to_the_last_bit(
    new_lens: Callable[..., Any], tokens: Tensor, attention: str, hooked: bool
) -> None:
    hf = build_hf(attention=attention)
    raw = new_lens(hf, raw=True)
    hooks = [("blocks.1.hook_resid_pre", lambda value, hook: None)] if hooked else []
    expected = hf_generate(hf, tokens, eos_token_id=-1)
    mine = raw.generate(tokens, 8, fwd_hooks=hooks, output_logits=True, **ON)
    assert torch.equal(mine.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(mine.logits, expected.logits, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_texts_of_different_lengths(new_lens: Callable[..., Any], attention: str) -> None:
    hf = build_hf(attention=attention)
    raw = new_lens(hf, raw=True)
    tokens = raw.to_tokens(TEXTS, padding_side="left")
    mask = torch.ones_like(tokens)
    for row, text in zip(mask, TEXTS, strict=True):
        row[: tokens.shape[1] - raw.to_tokens(text).shape[1]] = 0
    assert not mask.all()
    expected = hf_generate(hf, tokens, mask, eos_token_id=-1)
    mine = raw.generate(TEXTS, 8, output_logits=True, **ON)
    assert torch.equal(mine.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(mine.logits, expected.logits, strict=True))


def test_each_text_of_a_batch_goes_on_as_it_does_alone(either: Any) -> None:
    alone = [either.generate(text, 8, **ON) for text in TEXTS]
    assert either.generate(TEXTS, 8, **ON) == alone
    assert either.generate(TEXTS, 8, use_past_kv_cache=False, **ON) == alone


def test_greedy_text_with_processing(lens: Any, hf: Any, tokens: Tensor) -> None:
    assert torch.equal(lens.generate(tokens, 8, **ON), hf_generate(hf, tokens, eos_token_id=-1).sequences)


def test_stopping_is_huggingfaces(either: Any, hf: Any, tokens: Tensor) -> None:
    stops = hf_generate(hf, tokens, eos_token_id=-1).sequences[:, 9].tolist()
    expected = hf_generate(hf, tokens, eos_token_id=stops).sequences
    assert expected.shape[1] < 15
    assert torch.equal(either.generate(tokens, 8, eos_token_id=stops, **GREEDY), expected)


def test_nobody_looks_so_nothing_is_converted(either: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a TransformerLens cache nor a trace is made, and HF's last layer sees one position."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was not needed")

    monkeypatch.setattr(inputs, "hf_cache", refuse)
    monkeypatch.setattr(inputs, "append_new", refuse)
    monkeypatch.setattr(either.interior.engine, "wrapped", refuse)
    shapes = []
    handle = either.hf_model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    try:
        either.generate(tokens, 3, **ON)
    finally:
        handle.remove()
    assert shapes == [(2, 1, 290)] * 3


def test_each_position_is_run_once(either: Any, tokens: Tensor) -> None:
    lengths: list[int] = []
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: lengths.append(value.shape[1]))
    either.generate(tokens, 4, fwd_hooks=[hook], **ON)
    assert lengths == [7, 1, 1, 1]
    lengths.clear()
    either.generate(tokens, 4, fwd_hooks=[hook], use_past_kv_cache=False, **ON)
    assert lengths == [7, 8, 9, 10]


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_keys_and_values_are_kept_where_they_are_used(either: Any, tokens: Tensor, use_past_kv_cache: bool) -> None:
    given: list[bool] = []
    handle = either.hf_model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["use_cache"]), with_kwargs=True
    )
    try:
        either.generate(tokens, 3, use_past_kv_cache=use_past_kv_cache, **ON)
    finally:
        handle.remove()
    assert given == [use_past_kv_cache] * 3


def test_whoever_looks_at_the_logits_sees_them_all(either: Any, tokens: Tensor) -> None:
    """And what is returned does not keep them all in memory."""
    lengths: list[int] = []
    hook = ("unembed.hook_out", lambda value, hook: lengths.append(value.shape[1]))
    output = either.generate(tokens, 2, fwd_hooks=[hook], output_logits=True, **ON)
    assert lengths == [7, 1]
    assert [logits.untyped_storage().nbytes() for logits in output.logits] == [2 * 290 * 4] * 2


def test_an_empty_text_is_its_bos(either: Any) -> None:
    assert torch.equal(
        either.generate("", 6, return_type="tokens", **ON),
        either.generate(torch.zeros(1, 1, dtype=torch.long), 6, use_past_kv_cache=False, **ON),
    )


def test_a_common_end_of_text_is_no_padding(either: Any, hf: Any, tokens: Tensor) -> None:
    ended = torch.cat([tokens, torch.zeros(2, 1, dtype=torch.long)], dim=1)
    assert torch.equal(either.generate(ended, 5, **ON), hf_generate(hf, ended, new=5, eos_token_id=-1).sequences)


def test_the_last_token_is_never_padding_on_the_left(either: Any) -> None:
    """Without a BOS to expect, a row of one EOS would be nothing but padding."""
    alone = torch.zeros(1, 1, dtype=torch.long)
    expected = either.generate(alone, 5, padding_side="right", **ON)
    assert torch.equal(either.generate(alone, 5, padding_side="left", prepend_bos=False, **ON), expected)


def test_embeddings(either: Any, tokens: Tensor) -> None:
    expected = either.generate(tokens, 6, **ON)
    embeds = either.embed(tokens).detach()
    for use_past_kv_cache in (True, False):
        arguments = ON | {"use_past_kv_cache": use_past_kv_cache}
        assert torch.equal(either.generate(embeds, 6, return_type="tokens", **arguments), expected[:, 7:])
        close(either.generate(embeds, 6, **arguments), either.embed(expected))


def test_hooks_before_the_blocks_act_on_embeddings(either: Any, tokens: Tensor) -> None:
    hooks = [("hook_embed", lambda value, hook: value.mul_(0.5)), ("hook_pos_embed", lambda value, hook: value.neg_())]
    embeds = either.embed(tokens).detach()
    before, weights = embeds.clone(), either.hf_model.transformer.wpe.weight.clone()
    expected = either.generate(tokens, 6, fwd_hooks=hooks, **ON)
    for use_past_kv_cache in (True, False):
        arguments = ON | {"use_past_kv_cache": use_past_kv_cache, "return_type": "tokens"}
        assert torch.equal(either.generate(embeds, 6, fwd_hooks=hooks, **arguments), expected[:, 7:])
    assert torch.equal(embeds, before)
    assert torch.equal(either.hf_model.transformer.wpe.weight, weights)
    assert not torch.equal(expected, either.generate(tokens, 6, **ON))


def test_frequencies_of_embeddings_are_not_counted(either: Any, tokens: Tensor) -> None:
    torch.manual_seed(0)
    expected = either.generate(either.embed(tokens), 9, return_type="tokens", stop_at_eos=False, **QUIET)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="freq_penalty"):
        found = either.generate(
            either.embed(tokens), 9, return_type="tokens", stop_at_eos=False, freq_penalty=50.0, **QUIET
        )
    assert torch.equal(found, expected)


def test_the_context_may_be_filled_and_not_overrun(either: Any) -> None:
    start = torch.full((1, 20), 5)
    assert either.generate(start, 5, **ON).shape == (1, 25)
    with pytest.raises(IndexError, match="context 24"):
        either.generate(start, 6, **ON)


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "message"),
    [
        ("The", {"max_new_tokens": 0}, ValueError, "at least 1"),
        ("The", {"return_type": "text"}, AssertionError, "input, str, tokens, embeds"),
        (7, {}, AssertionError, "int"),
        (["The", 7], {}, AssertionError, "list"),
        (torch.tensor([1, 2]), {}, IndexError, r"tokens\[None\]"),
        (torch.ones(1, 0, dtype=torch.long), {}, IndexError, "no token to go on from"),
        (torch.ones(1, 2), {}, TypeError, "floats"),
        ("The", {"names_filter": "hook_embed", "device": "cpu"}, UnknownArgumentError, "names_filter, device"),
        ("The", {"return_cache": True, "names_filter": "hook_z"}, UnknownPointError, "hook_z"),
        ("The", {"return_cache": True, "names_filter": ["blocks.0.hook_mlp_in"]}, DisabledPointError, "hook_mlp_in"),
        ("The", {"fwd_hooks": [("hook_z", print)]}, UnknownPointError, "hook_z"),
    ],
    ids=repr,
)
def test_errors(lens: Any, prompt: Any, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lens.generate(prompt, **QUIET, **arguments)
    assert lens.list_hooks() == {}
    assert not lens.is_caching


def test_without_a_tokenizer(lens: Any, tokens: Tensor) -> None:
    expected = lens.generate(tokens, 5, **ON)
    lens.tokenizer = None
    assert torch.equal(lens.generate(tokens, 5, **ON), expected)
    with pytest.raises(AssertionError, match="tokenizer"):
        lens.generate("The", **QUIET)
    with pytest.raises(AssertionError, match="tokenizer"):
        lens.generate(tokens, return_type="str", **ON)
    with pytest.raises(AssertionError, match="eos_token_id="):
        lens.generate(tokens, **QUIET)
    stopped = lens.generate(tokens, eos_token_id=list(range(5, 290)), **GREEDY)
    assert stopped.shape[1] < 17


# --- the model afterwards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"return_cache": True}, {"fwd_hooks": [("hook_embed", lambda v, hook: v)]}])
def test_nothing_is_left_behind(
    lens: Any, hf: Any, tokens: Tensor, arguments: dict, assert_untouched: Callable[[nn.Module, Any], None]
) -> None:
    lens.generate(tokens, 3, **QUIET, **arguments)
    assert_untouched(hf, lens)
    assert lens.generation_step is None and lens.generation_positions is None


def test_a_failing_hook_leaves_nothing_behind(
    lens: Any, hf: Any, tokens: Tensor, assert_untouched: Callable[[nn.Module, Any], None]
) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        if lens.generation_step == 2:
            raise RuntimeError("enough")

    expected = lens.generate(tokens, 5, **ON)
    hf.train()
    with pytest.raises(RuntimeError, match="enough"):
        lens.generate(tokens, 5, fwd_hooks=[("blocks.0.hook_attn_out", fail)], return_cache=True, **ON)
    assert hf.training and hf.transformer.drop.training
    hf.eval()
    assert_untouched(hf, lens)
    assert lens.generation_step is None
    assert torch.equal(lens.generate(tokens, 5, **ON), expected)


def test_dropout_is_off_while_generating_and_modes_come_back(new_lens: Callable[..., Any], tokens: Tensor) -> None:
    hf = build_hf(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    lens = new_lens(hf)
    expected = lens.generate(tokens, 6, **ON)
    lens.train()
    hf.transformer.h[0].eval()
    assert torch.equal(lens.generate(tokens, 6, **ON), expected)
    assert torch.equal(torch.cat(list(lens.generate_stream(tokens, 6, **ON)), dim=1), expected)
    assert lens.training and hf.training and hf.transformer.drop.training
    assert not hf.transformer.h[0].training


def test_results_take_part_in_training(lens: Any, hf: Any, tokens: Tensor) -> None:
    """They are ordinary tensors, where those of inference mode could not be saved for a backward pass."""
    text, cache = lens.generate(tokens, 5, return_cache=True, **ON)
    loss = lens(text, return_type="loss") + (cache["resid_post", 1] * hf.transformer.ln_f.weight).sum()
    loss.backward()
    assert hf.transformer.wte.weight.grad is not None


def test_generation_in_inference_mode(lens: Any, tokens: Tensor) -> None:
    expected = lens.generate(tokens, 5, **ON)
    with torch.inference_mode():
        assert torch.equal(lens.generate(tokens, 5, **ON), expected)
        assert torch.equal(lens.generate(tokens, 5, return_cache=True, **ON)[0], expected)


# --- hooks that know the step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use_past_kv_cache", "positions"),
    [(True, [range(7), range(7, 8), range(8, 9)]), (False, [range(7), range(8), range(9)])],
)
def test_steps_are_numbered(either: Any, tokens: Tensor, use_past_kv_cache: bool, positions: list[range]) -> None:
    seen: list[tuple[Any, Any]] = []
    hook = (
        "blocks.1.hook_mlp_out",
        lambda value, hook: seen.append((either.generation_step, either.generation_positions)),
    )
    either.generate(tokens, 3, fwd_hooks=[hook], use_past_kv_cache=use_past_kv_cache, **ON)
    assert seen == list(enumerate(positions))
    seen.clear()
    either.run_with_hooks(tokens, fwd_hooks=[hook])
    assert seen == [(None, None)]


def test_one_step_may_be_edited(either: Any, tokens: Tensor) -> None:
    """The edit of step 2 leaves the first two tokens as they were, and decides the third."""

    def prefer_17(value: Tensor, hook: HookPoint) -> None:
        if either.generation_step == 2:
            value[:, -1, 17] += 1e4

    text = either.generate(tokens, 5, fwd_hooks=[("unembed.hook_out", prefer_17)], **ON)
    plain = either.generate(tokens, 5, **ON)
    assert torch.equal(text[:, :9], plain[:, :9])
    assert text[:, 9].tolist() == [17, 17]
    assert 17 not in plain[:, 9]


def test_a_hook_may_generate(either: Any, tokens: Tensor) -> None:
    """What a hook generates is a generation of its own, and knows its own steps."""
    seen: list[Any] = []
    inner: list[Tensor] = []

    def look(value: Tensor, hook: HookPoint) -> None:
        seen.append(either.generation_step)
        if len(seen) == 2:
            inner.append(either.generate(tokens[:1], 2, **ON))
            seen.append(("after", either.generation_step))

    text = either.generate(tokens, 3, fwd_hooks=[("blocks.0.hook_resid_mid", look)], **ON)
    assert seen == [0, 1, 0, 1, ("after", 1), 2]
    plain = either.generate(tokens, 3, **ON)
    assert torch.equal(text, plain)
    assert torch.equal(inner[0], plain[:1, :9])


def test_a_stream_has_steps_only_while_it_runs(lens: Any, tokens: Tensor) -> None:
    seen: list[Any] = []
    with lens.hooks([("hook_embed", lambda value, hook: seen.append(lens.generation_step))]):
        for chunk in lens.generate_stream(tokens, 4, max_tokens_per_yield=1, **ON):
            assert lens.generation_step is None
            assert chunk.shape[0] == 2
            lens(tokens)
    assert seen == [0, None, 1, None, 2, None, 3, None]


def test_threads_generate_in_turn(lens: Any, tokens: Tensor) -> None:
    """One thread's hooks and steps are none of the other's."""
    seen: list[Any] = []
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: (seen.append(lens.generation_step), value.roll(1, -1))[1])
    runs = [lambda: lens.generate(tokens, 6, **ON), lambda: lens.generate(tokens, 6, fwd_hooks=[hook], **ON)]
    expected = [run() for run in runs]
    assert not torch.equal(*expected)
    seen.clear()
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(runs[index % 2]) for index in range(8)]
        assert all(torch.equal(result.result(), expected[index % 2]) for index, result in enumerate(found))
    assert seen == [0, 1, 2, 3, 4, 5] * 4


def test_an_abandoned_stream_leaves_nothing_behind(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Any) -> None:
    hf.train()
    stream = lens.generate_stream(tokens, 4, max_tokens_per_yield=1, **ON)
    next(stream)
    stream.close()
    assert hf.training
    assert_untouched(hf, lens)


# --- the cache --------------------------------------------------------------------------------------------------------

FLAGS = ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in"]


def agree(cache: ActivationCache, other: ActivationCache, where: Tensor | None = None) -> None:
    """Equal caches, within float noise; ``where`` says which rows and positions count."""
    assert list(cache.keys()) == list(other.keys())
    for name in other:
        mine, expected = cache[name], other[name]
        assert mine.shape == expected.shape and mine.dtype == expected.dtype, name
        finite = expected.isfinite()
        if where is not None:
            square = name.endswith(("pattern", "attn_scores"))
            mine, expected = (x.transpose(1, 2) if square else x for x in (mine, expected))
            mine, expected = mine[where], expected[where]
            finite = expected.isfinite()
        assert torch.equal(mine.isfinite(), finite), name
        assert torch.equal(mine[~finite], expected[~finite]), name
        largest = expected[finite].abs().max()
        assert (mine[finite] - expected[finite]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("flags", [[], FLAGS], ids=["plain", "flags"])
def test_the_cache_is_that_of_one_run(either: Any, tokens: Tensor, use_past_kv_cache: bool, flags: list[str]) -> None:
    for flag in flags:
        getattr(either, f"set_{flag}")(True)
    text, cache = either.generate(tokens, 6, return_cache=True, use_past_kv_cache=use_past_kv_cache, **ON)
    assert isinstance(cache, ActivationCache) and cache.has_batch_dim
    assert text.shape == (2, 13)
    agree(cache, either.run_with_cache(text[:, :-1])[1])


def test_the_cache_of_texts_of_different_lengths(either: Any) -> None:
    text, cache = either.generate(TEXTS, 6, return_cache=True, return_type="tokens", **ON)
    mask = torch.ones_like(text[:, :-1])
    for row, one in zip(mask, TEXTS, strict=True):
        row[: text.shape[1] - 6 - either.to_tokens(one).shape[1]] = 0
    agree(cache, either.run_with_cache(text[:, :-1], attention_mask=mask)[1], mask.bool())


def test_the_cache_of_embeddings(either: Any, tokens: Tensor) -> None:
    text, expected = either.generate(tokens, 4, return_cache=True, **ON)
    for use_past_kv_cache in (True, False):
        arguments = ON | {"return_type": "tokens", "use_past_kv_cache": use_past_kv_cache}
        new, cache = either.generate(either.embed(tokens), 4, return_cache=True, **arguments)
        assert torch.equal(new, text[:, 7:])
        agree(cache, expected)


def test_the_cache_has_what_hooks_made_of_it(either: Any, tokens: Tensor) -> None:
    hooks = [
        ("blocks.0.attn.hook_z", lambda value, hook: value * 0.5),
        ("blocks.0.ln1.hook_normalized", lambda value, hook: value * 0.9),
        ("blocks.1.attn.hook_pattern", lambda value, hook: value * 0.8),
    ]
    text, cache = either.generate(tokens, 5, fwd_hooks=hooks, return_cache=True, **ON)
    with either.hooks(hooks):
        agree(cache, either.run_with_cache(text[:, :-1])[1])


def test_the_cache_can_be_analysed(lens: Any, tokens: Tensor) -> None:
    text, cache = lens.generate(tokens, 5, return_cache=True, **ON)
    stack = cache.accumulated_resid(apply_ln=True)
    close(stack[-1] @ lens.W_U + lens.b_U, lens(text[:, :-1]))
    assert cache.stack_head_results().shape == (8, 2, 11, 20)


@pytest.mark.parametrize("pos_slice", [-1, (2, 9), [0, 8], None], ids=str)
def test_slices_of_the_cache(either: Any, tokens: Tensor, pos_slice: Any) -> None:
    text, cache = either.generate(tokens, 4, return_cache=True, pos_slice=pos_slice, **ON)
    agree(cache, either.run_with_cache(text[:, :-1], pos_slice=pos_slice)[1])


@pytest.mark.parametrize(
    "names_filter",
    ["blocks.1.attn.hook_q", ["hook_embed", "blocks.0.attn.hook_pattern"], lambda name: name.endswith("resid_post")],
    ids=["name", "names", "predicate"],
)
def test_a_filtered_cache(either: Any, tokens: Tensor, names_filter: Any) -> None:
    text, cache = either.generate(tokens, 4, return_cache=True, names_filter=names_filter, **ON)
    agree(cache, either.run_with_cache(text[:, :-1], names_filter=names_filter)[1])


def test_a_filtered_cache_costs_what_is_asked_for(either: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices do not keep the tensors that they were cut from, and logits of the prompt are not computed."""
    kept: list[int] = []
    unfiltered = GenerationRecording.joined

    def weigh(self: GenerationRecording, keep: Any) -> None:
        kept.extend(piece.untyped_storage().nbytes() for pieces in self._pieces.values() for piece in pieces.values())
        unfiltered(self, keep)

    monkeypatch.setattr(GenerationRecording, "joined", weigh)
    names = ["blocks.0.attn.hook_q", "blocks.1.attn.hook_v"]
    shapes: list[Any] = []
    assert either.interior.engine.order, "measured once, by a run of its own"
    handle = either.hf_model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    try:
        for use_past_kv_cache in (True, False):
            kept.clear()
            arguments = ON | {"use_past_kv_cache": use_past_kv_cache}
            _, cache = either.generate(tokens, 4, return_cache=True, names_filter=names, **arguments)
            assert sum(kept) == sum(value.nbytes for value in cache.values()) == 2 * 2 * 10 * 20 * 4
    finally:
        handle.remove()
    assert set(shapes) == {(2, 1, 290)}


def test_the_cache_on_another_device(either: Any, tokens: Tensor) -> None:
    _, cache = either.generate(tokens, 3, return_cache=True, device="meta", names_filter="hook_embed", **ON)
    assert cache["hook_embed"].device.type == "meta"
    assert cache["hook_embed"].shape == (2, 9, 20)


def test_the_cache_and_the_other_results(lens: Any) -> None:
    text, cache = lens.generate("The cat", 3, return_cache=True, **ON)
    assert text == lens.generate("The cat", 3, **ON)
    output, again = lens.generate("The cat", 3, return_cache=True, output_logits=True, **ON)
    agree(again, cache)
    assert output.sequences.shape[1] == cache["hook_embed"].shape[1] + 1
    assert len(output.logits) == 3


class Doubling(nn.Module):
    """A module in a hook point's place, with a hook point of its own."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.hook_double = HookPoint()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        self.hook_double(x.mean(1) if self.pool else 2 * x)
        return x


def test_points_inside_modules_of_ones_own_are_cached(lens: Any, tokens: Tensor) -> None:
    lens.blocks[0].hook_mlp_out = Doubling()
    lens.setup()
    text, cache = lens.generate(tokens, 4, return_cache=True, **ON)
    agree(cache, lens.run_with_cache(text[:, :-1])[1])
    assert "blocks.0.hook_mlp_out.hook_double" in cache


def test_what_has_no_positions_is_refused(lens: Any, tokens: Tensor) -> None:
    lens.blocks[0].hook_mlp_out = Doubling(pool=True)
    lens.setup()
    wide = torch.cat([tokens] * 3, dim=1)
    with pytest.raises(ValueError, match="blocks.0.hook_mlp_out.hook_double.*names_filter"):
        lens.generate(wide, 2, return_cache=True, **ON)
    assert lens.generate(wide, 2, return_cache=True, names_filter="hook_embed", **ON)[1].keys() == {"hook_embed"}


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8, 50])
def test_chunks_are_the_whole_text(either: Any, tokens: Tensor, size: int) -> None:
    chunks = list(either.generate_stream(tokens, 9, max_tokens_per_yield=size, **ON))
    assert torch.equal(torch.cat(chunks, dim=1), either.generate(tokens, 9, **ON))
    # The prompt counts: what comes first is as long as it, at least.
    assert chunks[0].shape[1] == min(max(size, 8), 16)
    assert all(chunk.shape[1] == size for chunk in chunks[1:-1])


def test_a_stream_runs_as_far_as_it_is_read(lens: Any, tokens: Tensor) -> None:
    runs: list[int] = []
    with lens.hooks([("hook_embed", lambda value, hook: runs.append(1))]):
        stream = lens.generate_stream(tokens, 9, max_tokens_per_yield=1, **ON)
        assert runs == []
        next(stream)
        assert len(runs) == 1
        next(stream)
        assert len(runs) == 2
        stream.close()


def test_a_stream_ends_with_the_text(lens: Any, tokens: Tensor) -> None:
    stops = lens.generate(tokens, 4, **ON)[:, -1].tolist()
    expected = lens.generate(tokens, 9, eos_token_id=stops, **GREEDY)
    chunks = list(lens.generate_stream(tokens, 9, max_tokens_per_yield=2, eos_token_id=stops, **GREEDY))
    assert torch.equal(torch.cat(chunks, dim=1), expected)
    assert expected.shape[1] < 16


# --- progress and small parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [True, False])
def test_the_progress_bar(lens: Any, tokens: Tensor, capsys: pytest.CaptureFixture[str], verbose: bool) -> None:
    lens.generate(tokens, 3, verbose=verbose)
    list(lens.generate_stream(tokens, 3, verbose=verbose))
    assert capsys.readouterr().err.count("3/3") == (2 if verbose else 0)


def test_rows_that_have_finished_are_filled() -> None:
    ending = decoding.Ending([5, 6], 9, batch=3, device="cpu")
    assert ending.fill(torch.tensor([5, 1, 2])).tolist() == [5, 1, 2]
    assert ending.fill(torch.tensor([3, 6, 2])).tolist() == [9, 6, 2]
    assert not ending.reached
    assert ending.fill(torch.tensor([3, 3, 5])).tolist() == [9, 9, 5]
    assert ending.reached
