"""Is a call turned into the run it asks for: tokens, masks, positions, caches, spans, and what comes back?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.cache import TransformerLensKeyValueCache
from lensbridge.engine.plan import Span
from lensbridge.errors import UnsupportedModelError
from lensbridge.hook_points import HookPoint
from lensbridge.inputs import span_of

TEXTS = ["The cat sat on the mat", "The dog", "Mary gave John a drink."]


def new_cache(model: Any, batch: int = 2) -> TransformerLensKeyValueCache:
    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", batch)


def without_tokenizer(model: Any) -> Any:
    model.tokenizer = None
    return model


# --- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (None, None, Span(0, 4, True, True, True)),
        (None, 2, Span(0, 2, True, False, False)),
        (None, -1, Span(0, 3, True, False, False)),
        (None, 9, Span(0, 4, True, False, False)),
        (None, 0, Span(0, 0, True, False, False)),
        (1, None, Span(1, 4, False, True, True)),
        (0, None, Span(0, 4, False, True, True)),
        (-1, None, Span(3, 4, False, True, True)),
        (4, None, Span(4, 4, False, True, True)),
        (7, None, Span(4, 4, False, True, True)),
        (1, 3, Span(1, 3, False, False, False)),
        (3, 1, Span(3, 3, False, False, False)),
    ],
)
def test_spans_follow_slicing_rules(start: int | None, stop: int | None, expected: Span) -> None:
    assert span_of(4, start, stop, "logits") == expected


def test_a_run_for_nothing_leaves_out_the_unembedding() -> None:
    assert span_of(4, None, None, None) == Span(0, 4, True, True, False)
    assert span_of(4, None, 2, None) == span_of(4, None, 2, "loss")


# --- what comes back -------------------------------------------------------------------------------------------------


def test_return_types(hf: Any, raw: Any, tokens: Tensor) -> None:
    logits = raw(tokens)
    assert torch.equal(logits, hf(tokens).logits) and raw(tokens, return_type=None) is None
    expected = hf(tokens, labels=tokens).loss
    loss = raw(tokens, return_type="loss")
    assert torch.allclose(loss, expected) and loss.shape == ()
    both = raw(tokens, return_type="both")
    assert torch.equal(both.logits, logits) and torch.equal(both.loss, loss) and torch.equal(both[1], loss)
    per_token = raw(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (2, 6) and torch.allclose(per_token.mean(), loss)
    assert raw(tokens, return_type="both", loss_per_token=True).loss.shape == (2, 6)
    assert raw(tokens, return_type="loss", stop_at_layer=1).shape == (2, 7, 20)


@pytest.mark.parametrize("wrong", ["logit", "Loss", True, 3])
def test_another_return_type_is_refused(raw: Any, tokens: Tensor, wrong: Any) -> None:
    with pytest.raises(ValueError, match="return_type must be"):
        raw(tokens, return_type=wrong)


def test_other_arguments_are_refused(raw: Any, tokens: Tensor) -> None:
    with pytest.raises(TypeError, match="atention_mask"):
        raw(tokens, atention_mask=tokens)
    with pytest.raises(UnsupportedModelError, match="no shortformer"):
        raw(tokens, shortformer_pos_embed=torch.zeros(2, 7, 20))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_one_row_of_tokens_and_small_integers(raw: Any, tokens: Tensor) -> None:
    assert torch.equal(raw(tokens[0]), raw(tokens[:1]))
    assert torch.equal(raw(tokens.int()), raw(tokens))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 2, 3, dtype=torch.long), r"\[batch, pos\] or \[pos\], not \(1, 2, 3\)"),
        (torch.tensor(3), r"not \(\)"),
        (torch.zeros(1, 2), "pass start_at_layer="),
        ((1, 2), r"not tuple \(a list is taken as a list of texts: use torch.tensor"),
        (None, "not NoneType$"),
    ],
    ids=["rank 3", "rank 0", "floats", "tuple", "None"],
)
def test_what_is_no_text_and_no_tokens_is_refused(raw: Any, wrong: Any, message: str) -> None:
    for run in (raw, raw.run_with_cache):
        with pytest.raises(TypeError, match=message):
            run(wrong)
    assert raw.list_hooks() == {}


def test_text_needs_a_tokenizer(raw: Any) -> None:
    with pytest.raises(AssertionError, match="set_tokenizer"):
        without_tokenizer(raw)("text")


def test_text_is_tokenized(raw: Any) -> None:
    assert torch.equal(raw("The cat"), raw(raw.to_tokens("The cat")))
    assert torch.equal(raw("The cat", prepend_bos=False), raw(raw.to_tokens("The cat", prepend_bos=False)))
    assert raw(["The cat", "The dog"]).shape[0] == 2


def test_too_many_tokens(hf: Any, raw: Any) -> None:
    with pytest.raises(IndexError, match="25 tokens long .* context 24"):
        raw(torch.ones(1, 25, dtype=torch.long))
    assert raw(torch.ones(1, 24, dtype=torch.long)).shape[1] == 24
    padded = torch.ones(1, 26, dtype=torch.long)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 23)], 1)
    assert torch.allclose(raw(padded, attention_mask=mask)[:, 3:], raw(padded[:, 3:]), atol=1e-4)
    with pytest.raises(IndexError, match="26 tokens"):
        raw(padded, attention_mask=torch.ones(1, 26))
    assert raw("The cat sat on the mat. " * 9).shape[1] == 24


def test_a_shorter_context(new_hf: Any, new_lens: Any) -> None:
    short = new_lens(new_hf(), n_ctx=10)
    assert short("The cat sat on the mat. " * 9).shape[1] == 10 and short.W_pos.shape == (10, 20)
    with pytest.raises(IndexError, match="11 tokens long .* context 10"):
        short(torch.ones(1, 11, dtype=torch.long))


# --- padding and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_give_the_logits_of_each_alone(raw: Any, side: str) -> None:
    together = raw(TEXTS, padding_side=side)
    lengths = [raw.to_tokens(text).shape[1] for text in TEXTS]
    for row, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        real = together[row, :length] if side == "right" else together[row, -length:]
        assert torch.allclose(real, raw(text)[0], atol=1e-4)
    assert raw.tokenizer.padding_side == "right"


def test_right_padding_makes_no_mask_and_left_padding_does(raw: Any) -> None:
    shown: list[Tensor] = []
    for side in ("right", "left"):
        hooks = [("hook_pos_embed", lambda value, hook: shown.append(value.clone()))]
        with raw.hooks(hooks):
            raw(TEXTS, padding_side=side)
    table, short = raw.W_pos, raw.to_tokens(TEXTS[1]).shape[1]
    right, left = shown
    assert torch.equal(right[1], table[: right.shape[1]])
    assert torch.equal(left[1, -short:], table[:short])


def test_a_padded_loss_counts_real_tokens_only(raw: Any) -> None:
    per_token = raw(TEXTS[:2], return_type="loss", loss_per_token=True, padding_side="left")
    loss = raw(TEXTS[:2], return_type="loss", padding_side="left")
    alone = [raw(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS[:2]]
    assert torch.allclose(loss, torch.cat(alone).mean(), atol=1e-4)
    padding = per_token.shape[1] - len(alone[1])
    assert padding > 0 and not per_token[1, :padding].any()


@pytest.mark.parametrize("dtype", [torch.long, torch.int, torch.bool, torch.float])
def test_a_mask_hides_tokens_and_moves_positions(raw: Any, tokens: Tensor, dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).to(dtype)
    found = raw(tokens, attention_mask=mask)
    assert torch.allclose(found[0, 2:], raw(tokens[:1, 2:])[0], atol=1e-4)
    assert torch.allclose(found[1], raw(tokens[1:])[0], atol=1e-4)
    loss = raw(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert not loss[0, :2].any() and loss[0, 2:].all()


def test_a_mask_of_another_shape_is_refused(raw: Any, tokens: Tensor) -> None:
    with pytest.raises(AssertionError, match=r"attention_mask has shape \(2, 6\), the tokens \(2, 7\)"):
        raw(tokens, attention_mask=torch.ones(2, 6))


def test_overrides_last_for_one_call_whatever_happens(raw: Any) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        raw.run_with_hooks("The cat", padding_side="left", prepend_bos=False, fwd_hooks=[("hook_embed", fail)])
    assert raw.tokenizer.padding_side == "right" and raw.cfg.default_prepend_bos is True
    for wrong in ({"padding_side": "middle"}, {"prepend_bos": "yes"}):
        with pytest.raises(AssertionError, match="must be one of"):
            raw("The cat", **wrong)


# --- starting in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 7, 21), torch.zeros(7, 20), torch.zeros(2, 7).long(), "text", [[1]]], ids=str
)
def test_starting_at_a_layer_needs_a_residual_stream(raw: Any, wrong: Any) -> None:
    with pytest.raises(AssertionError, match=r"the residual stream before that layer, floats \[batch, pos, 20\], not "):
        raw(wrong, start_at_layer=1)


def test_a_loss_from_the_middle_needs_tokens(raw: Any, tokens: Tensor) -> None:
    residual = raw(tokens, stop_at_layer=1)
    with pytest.raises(AssertionError, match="pass tokens="):
        raw(residual, start_at_layer=1, return_type="loss")
    found = raw(residual, start_at_layer=1, return_type="loss", tokens=tokens)
    assert torch.allclose(found, raw(tokens, return_type="loss"), atol=1e-5)


def test_a_mask_works_from_the_middle(raw: Any, tokens: Tensor) -> None:
    residual = raw(tokens, stop_at_layer=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    masked = raw(residual, start_at_layer=1, attention_mask=mask)
    assert torch.allclose(masked[:, 2:], raw(residual[:, 2:], start_at_layer=1), atol=1e-4)


def test_a_residual_that_requires_gradients_gets_them(raw: Any, tokens: Tensor) -> None:
    residual = raw(tokens, stop_at_layer=1).detach().requires_grad_()
    raw(residual, start_at_layer=1, return_type="loss", tokens=tokens).backward()
    assert residual.grad is not None and residual.grad.abs().sum() > 0


# --- key-value caches ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["raw", "default", "refactored"])
def model(request: pytest.FixtureRequest, raw: Any) -> Any:
    if request.param != "raw":
        raw.process_weights_(refactor_factored_attn_matrices=request.param == "refactored")
    return raw


def test_pieces_give_the_logits_of_the_whole(model: Any, tokens: Tensor) -> None:
    whole, cache = model.run_with_cache(tokens)
    kv = new_cache(model)
    pieces = [model(tokens[:, a:b], past_kv_cache=kv) for a, b in ((0, 3), (3, 4), (4, 7))]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4)
    for layer, entry in enumerate(kv.entries):
        assert torch.allclose(entry.past_keys, cache[f"blocks.{layer}.attn.hook_k"], atol=1e-4)
        assert torch.allclose(entry.past_values, cache[f"blocks.{layer}.attn.hook_v"], atol=1e-4)
    assert kv.previous_attention_mask.tolist() == [[1] * 7] * 2


def test_a_frozen_cache_serves_many_continuations(model: Any, tokens: Tensor) -> None:
    kv = new_cache(model)
    model(tokens[:, :4], past_kv_cache=kv)
    kv.freeze()
    for continuation in (tokens[:, 4:], tokens[:, 4:6].flip(0), tokens[:, 4:]):
        whole = model(torch.cat([tokens[:, :4], continuation], 1))
        assert torch.allclose(model(continuation, past_kv_cache=kv), whole[:, 4:], atol=1e-4)
        assert kv[0].past_keys.shape[1] == 4 and kv.previous_attention_mask.shape == (2, 4)
    kv.unfreeze()
    model(tokens[:, 4:], past_kv_cache=kv)
    assert kv[1].past_values.shape[1] == 7


def test_entries_are_plain_tensors_that_may_be_edited(model: Any, tokens: Tensor) -> None:
    kv = new_cache(model)
    model(tokens[:, :4], past_kv_cache=kv)
    kv[0].past_values = torch.zeros_like(kv[0].past_values)

    def zero_early_values(value: Tensor, hook: HookPoint) -> None:
        value[:, :4] = 0

    # Only attention of the later tokens sees the edit: the residual stream of the earlier ones is past.
    keep = model.run_with_cache(tokens)[1]

    def as_it_was(value: Tensor, hook: HookPoint) -> None:
        value[:, :4] = keep[hook.name][:, :4]

    expected = model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.attn.hook_v", zero_early_values), ("blocks.0.hook_attn_out", as_it_was)]
    )
    assert torch.allclose(model(tokens[:, 4:], past_kv_cache=kv), expected[:, 4:], atol=1e-4)


def test_hooks_see_the_new_positions(model: Any, tokens: Tensor) -> None:
    kv = new_cache(model)
    model(tokens[:, :4], past_kv_cache=kv)
    cache = model.run_with_cache(tokens[:, 4:], past_kv_cache=kv)[1]
    assert cache["blocks.1.attn.hook_k"].shape == (2, 3, 4, 5)
    assert cache["blocks.1.attn.hook_pattern"].shape == (2, 4, 3, 7)
    assert torch.allclose(cache["hook_pos_embed"][0], model.pos_embed(tokens[:1, :3], 4)[0], atol=1e-6)


def test_padding_on_the_left_with_a_cache(raw: Any) -> None:
    tokens = raw.to_tokens(TEXTS[:2], padding_side="left")
    whole = raw(tokens, padding_side="left")
    kv = new_cache(raw)
    first = raw(tokens, padding_side="left", past_kv_cache=kv)
    assert torch.allclose(first, whole, atol=1e-5)
    more = torch.tensor([[5, 6], [7, 8]])
    second = raw(more, padding_side="left", past_kv_cache=kv)
    alone = raw(torch.cat([raw.to_tokens(TEXTS[1])[0], more[1]]))
    assert torch.allclose(second[1], alone[0, -2:], atol=1e-4)


def test_a_failed_run_leaves_the_cache_as_it_was(raw: Any, tokens: Tensor) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    kv = new_cache(raw)
    raw(tokens[:, :3], past_kv_cache=kv)
    with pytest.raises(ZeroDivisionError):
        raw.run_with_hooks(tokens[:, 3:], past_kv_cache=kv, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
    with pytest.raises(AssertionError):
        raw(tokens[:, 3:], past_kv_cache=kv, attention_mask=torch.ones(2, 2))
    assert kv[0].past_keys.shape[1] == 3 and kv.previous_attention_mask.shape == (2, 3)
    assert torch.allclose(raw(tokens[:, 3:], past_kv_cache=kv), raw(tokens)[:, 3:], atol=1e-4)


def test_a_stopped_run_fills_the_layers_that_ran(raw: Any, tokens: Tensor) -> None:
    kv = new_cache(raw)
    raw(tokens, past_kv_cache=kv, stop_at_layer=1)
    assert [entry.past_keys.shape[1] for entry in kv.entries] == [7, 0]


def test_caches_that_do_not_fit_are_refused(raw: Any, new_hf: Any, new_lens: Any, tokens: Tensor) -> None:
    with pytest.raises(AssertionError, match="holds a batch of 3, the input has 2"):
        raw(tokens, past_kv_cache=new_cache(raw, 3))
    other = new_lens(new_hf(n_heads=2))
    with pytest.raises(AssertionError, match=r"heads and d_head \(2, 10\), here \(4, 5\)"):
        raw(tokens, past_kv_cache=new_cache(other))
    kv = new_cache(raw)
    raw(torch.ones(2, 20, dtype=torch.long), past_kv_cache=kv)
    with pytest.raises(IndexError, match=r"27 tokens long \(with the key-value cache\)"):
        raw(tokens, past_kv_cache=kv)
    assert kv[0].past_keys.shape[1] == 20


def test_a_cache_without_tokenizer_needs_a_mask(raw: Any, tokens: Tensor) -> None:
    model, kv = without_tokenizer(raw), new_cache(raw)
    with pytest.raises(ValueError, match="pass attention_mask="):
        model(tokens, past_kv_cache=kv)
    found = model(tokens, past_kv_cache=kv, attention_mask=torch.ones(2, 7))
    assert torch.allclose(found, model(tokens), atol=1e-5)


# --- pieces that TransformerLens offers -------------------------------------------------------------------------------


def test_input_to_embed(model: Any) -> None:
    residual, tokens, none, mask = model.input_to_embed(TEXTS[:2])
    assert torch.equal(tokens, model.to_tokens(TEXTS[:2])) and none is None and mask is None
    assert torch.allclose(residual, model(TEXTS[:2], stop_at_layer=0), atol=1e-5)
    residual, tokens, _, mask = model.input_to_embed(TEXTS[:2], padding_side="left")
    real = mask.bool()
    assert not real.all() and torch.allclose(
        residual[real], model(tokens, padding_side="left", stop_at_layer=0)[real], atol=1e-5
    )
    with model.hooks(
        [("hook_embed", lambda value, hook: value * 0), ("hook_pos_embed", lambda value, hook: value * 0)]
    ):
        assert not model.input_to_embed(TEXTS[0])[0].any()


def test_input_to_embed_leaves_a_cache_alone(model: Any, tokens: Tensor) -> None:
    kv = new_cache(model)
    model(tokens[:, :3], past_kv_cache=kv)
    residual, _, _, mask = model.input_to_embed(tokens[:, 3:], past_kv_cache=kv)
    expected = model(tokens, stop_at_layer=0)[:, 3:]
    assert torch.allclose(residual, expected, atol=1e-5) and mask.shape == (2, 7)


def test_get_residual_and_offset(model: Any, tokens: Tensor) -> None:
    embed = model.embed(tokens)
    residual, none = model.get_residual(embed, 2)
    assert none is None and torch.allclose(residual, embed + model.W_pos[2:9], atol=1e-6)
    plain = model.get_residual(embed, 2, return_shortformer_pos_embed=False)
    assert torch.equal(plain, residual)
    assert model.get_pos_offset(None, 2) == 0
    kv = new_cache(model)
    model(tokens, past_kv_cache=kv)
    assert model.get_pos_offset(kv, 2) == 7
