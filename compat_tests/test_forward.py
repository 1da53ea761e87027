"""Does a forward call give 3.9.0's logits, losses and residuals for every argument it takes?

Positions that hold padding are compared only where nothing but the padding's own output depends on the choice: with a
mask, 3.9.0 sets the position embedding of a masked position to zero and HuggingFace does not, and no real position
attends there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from compat_tests.comparison import caches_close, close, outcome, same_outcome, same_value
from compat_tests.conftest import Pair, Pairs
from compat_tests.rough_models import CORPUS, PROCESSINGS, SHAPES, SUBJECT

TEXTS = ["The cat sat", "John gave a drink to Mary", "Hello"]
RETURN_TYPES = ["logits", "loss", "both", None]


def kv_cache(model: Any, batch: int) -> Any:
    """An empty key-value cache of the class that belongs to this model."""
    if SUBJECT == "transformer_lens" or not type(model).__module__.startswith("lensbridge"):
        return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)
    from lensbridge.cache import TransformerLensKeyValueCache as OurKeyValueCache

    return OurKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)


def compare_calls(pair: Pair, name: str, *args: Any, **kwargs: Any) -> None:
    mine, theirs = (outcome(lambda m=model: m(*args, **kwargs)) for model in pair.both)
    same_outcome(name, mine, theirs)


def at_real_positions(value: torch.Tensor, name: str, mask: torch.Tensor) -> torch.Tensor:
    """The entries [real, ...] of an activation; of scores and pattern, the rows of real queries."""
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        value = value.transpose(1, 2)
    return value[mask.bool()]


def compare_masked_runs(pair: Pair, mask: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    results = [model.run_with_cache(*args, **kwargs) for model in pair.both]
    real = [{name: at_real_positions(value, name, mask) for name, value in cache.items()} for _, cache in results]
    caches_close(*real)
    close("logits", results[0][0][mask.bool()], results[1][0][mask.bool()])


@pytest.mark.parametrize("return_type", RETURN_TYPES)
@pytest.mark.parametrize("loss_per_token", [False, True])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_return_types(pairs: Pairs, processing: str, loss_per_token: bool, return_type: str | None) -> None:
    for shape in SHAPES:
        pair = pairs.get(shape, processing)
        compare_calls(pair, f"return_type {return_type}", pair.tokens(), return_type, loss_per_token)


def test_both_is_a_named_tuple(model: Any, pairs: Pairs) -> None:
    output = model(pairs.get().tokens(), return_type="both")
    logits, loss = output
    assert output.logits is logits
    assert output.loss is loss


def test_loss_is_the_mean_over_predicted_positions(model: Any, pairs: Pairs) -> None:
    tokens = pairs.get().tokens(3, 7)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (3, 6)
    torch.testing.assert_close(model(tokens, return_type="loss"), per_token.mean())


def test_loss_fn(pairs: Pairs) -> None:
    pair = pairs.get()
    tokens = pair.tokens()
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    for arguments in ({}, {"per_token": True}, {"attention_mask": mask}, {"attention_mask": mask, "per_token": True}):
        values = [model.loss_fn(pair.theirs(tokens).detach(), tokens, **arguments) for model in pair.both]
        same_value("loss_fn", *values)


def test_none_runs_the_final_norm_but_not_the_unembedding(model: Any, pairs: Pairs) -> None:
    output, cache = model.run_with_cache(pairs.get().tokens(), return_type=None)
    assert output is None
    assert list(cache.keys())[-1] == "ln_final.hook_normalized"


@pytest.mark.ours_only
@pytest.mark.parametrize("wrong", ["logit", "nonsense"])
def test_another_return_type_is_an_error(pairs: Pairs, wrong: str) -> None:
    """3.9.0 computes the loss, logs a warning and returns None."""
    with pytest.raises(ValueError, match=wrong):
        pairs.get().ours(pairs.get().tokens(), return_type=wrong)


def test_rank_1_tokens_get_a_batch_dimension(pairs: Pairs) -> None:
    pair = pairs.get()
    compare_calls(pair, "logits", pair.tokens()[0])


@pytest.mark.parametrize("layer", [*range(-4, 6)])
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_stop_at_layer(pairs: Pairs, processing: str, layer: int) -> None:
    """Blocks [:layer] with Python's slicing: negative counts from the end, too large runs all; no final norm."""
    pair = pairs.get("three", processing)
    for return_type in ("logits", "loss", None):
        results = [model.run_with_cache(pair.tokens(), return_type, stop_at_layer=layer) for model in pair.both]
        close("residual at stop_at_layer", results[0][0], results[1][0])
        caches_close(results[0][1], results[1][1])
    compare_calls(pair, "residual at stop_at_layer", pair.tokens(), stop_at_layer=layer)


@pytest.mark.parametrize("layer", [*range(-3, 4)])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_start_at_layer(pairs: Pairs, processing: str, layer: int) -> None:
    """The residual passed in need not be mean-free, even where 3.9.0's own stream is."""
    pair = pairs.get("three", processing)
    residual = torch.randn(2, 6, 27, generator=torch.Generator().manual_seed(5)) + 0.4
    for arguments in ({}, {"stop_at_layer": 2}, {"return_type": None}):
        results = [model.run_with_cache(residual.clone(), start_at_layer=layer, **arguments) for model in pair.both]
        caches_close(results[0][1], results[1][1])
        if results[1][0] is None:
            assert results[0][0] is None
        else:
            close("logits from start_at_layer", results[0][0], results[1][0])
    compare_calls(pair, "logits from start_at_layer", residual, start_at_layer=layer)
    tokens = pair.tokens(2, 6)
    for return_type in ("loss", "both"):
        compare_calls(pair, "loss from start_at_layer", residual, return_type, start_at_layer=layer, tokens=tokens)


def test_start_where_another_run_stopped(model: Any, pairs: Pairs) -> None:
    tokens = pairs.get().tokens()
    residual = model(tokens, stop_at_layer=1)
    torch.testing.assert_close(model(residual, start_at_layer=1), model(tokens), rtol=1e-4, atol=1e-4)


def test_start_at_layer_errors(model: Any, pairs: Pairs) -> None:
    residual = torch.randn(1, 3, 20)
    with pytest.raises(AssertionError):
        model([[1, 2, 3]], start_at_layer=1)
    with pytest.raises(AssertionError, match="tokens"):
        model(residual, start_at_layer=1, return_type="loss")


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
    "both sides": [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]],
    "hole": [[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1]],
    "all real": [[1] * 6, [1] * 6],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_attention_mask(pairs: Pairs, processing: str, kind: str) -> None:
    pair = pairs.get("two", processing)
    mask = torch.tensor(MASKS[kind])
    compare_masked_runs(pair, mask, pair.tokens(2, 6), attention_mask=mask)


@pytest.mark.parametrize("kind", ["left", "right", "hole"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
def test_loss_under_a_mask(pairs: Pairs, kind: str, dtype: torch.dtype) -> None:
    """Positions where this or the next token is masked count 0, and the mean divides by the others."""
    pair = pairs.get()
    mask = torch.tensor(MASKS[kind]).to(dtype)
    for per_token in (False, True):
        compare_calls(pair, "loss", pair.tokens(2, 6), "loss", loss_per_token=per_token, attention_mask=mask)


def test_positions_are_counted_from_the_first_real_token(model: Any, pairs: Pairs) -> None:
    mask = torch.tensor(MASKS["left"])
    _, cache = model.run_with_cache(pairs.get().tokens(2, 6), attention_mask=mask)
    embedding = cache["hook_pos_embed"]
    torch.testing.assert_close(embedding[1, 2:], embedding[0, :4])


@pytest.mark.ours_only
def test_masked_positions_have_huggingfaces_position_embedding(pairs: Pairs) -> None:
    """That of position 0, where 3.9.0 shows zeros: what a pad computes is HuggingFace's, and nobody attends to it."""
    model = pairs.get("two", "raw").ours
    mask = torch.tensor(MASKS["left"])
    _, cache = model.run_with_cache(pairs.get().tokens(2, 6), attention_mask=mask)
    torch.testing.assert_close(cache["hook_pos_embed"][1, :2], model.W_pos[:1].expand(2, -1))


def test_mask_of_another_shape_is_refused(model: Any, pairs: Pairs) -> None:
    with pytest.raises(AssertionError):
        model(pairs.get().tokens(2, 6), attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("padding_side", ["left", "right", None])
@pytest.mark.parametrize("prepend_bos", [True, False, None])
@pytest.mark.parametrize("tokenizer", ["gpt2", "no bos", "own pad"])
def test_padded_texts(pairs: Pairs, tokenizer: str, prepend_bos: bool | None, padding_side: str | None) -> None:
    """Left padding masks the leading pads; right padding makes no mask, and later pads attend to earlier ones."""
    pair = pairs.get("two", tokenizer=tokenizer)
    arguments = {"prepend_bos": prepend_bos, "padding_side": padding_side}
    tokens = pair.theirs.to_tokens(TEXTS, **arguments)
    lengths = torch.tensor([pair.theirs.to_tokens(text, prepend_bos=prepend_bos).shape[1] for text in TEXTS])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    if padding_side == "left":
        compare_masked_runs(pair, mask.flip(1), TEXTS, **arguments)
    else:
        compare_calls(pair, "logits", TEXTS, **arguments)
        compare_masked_runs(pair, mask, TEXTS, **arguments)
    for return_type in ("loss", "both"):
        results = [model(TEXTS, return_type=return_type, **arguments) for model in pair.both]
        losses = [result.loss if return_type == "both" else result for result in results]
        close("loss", *losses)


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("tokenizer", ["gpt2", "own pad"])
def test_token_input_with_left_padding(pairs: Pairs, tokenizer: str, prepend_bos: bool) -> None:
    """prepend_bos never changes token input, but it decides whether the last leading pad counts as bos."""
    pair = pairs.get("two", tokenizer=tokenizer)
    pad = pair.theirs.tokenizer.pad_token_id
    tokens = torch.tensor([[pad, pad, pad, 9, 30, 31], [7, 8, 9, 10, 11, 12]])
    bos_is_pad = pair.theirs.tokenizer.bos_token_id == pad
    mask = torch.tensor([[0, 0, int(prepend_bos and bos_is_pad), 1, 1, 1], [1] * 6])
    compare_masked_runs(pair, mask, tokens, prepend_bos=prepend_bos, padding_side="left")


@pytest.mark.parametrize("side", ["left", "right"])
def test_default_padding_side(pairs: Pairs, side: str) -> None:
    pair = pairs.get("two", tokenizer="own pad", default_padding_side=side)
    assert pair.ours.tokenizer.padding_side == pair.theirs.tokenizer.padding_side == side
    tokens = pair.theirs.to_tokens(TEXTS)
    compare_masked_runs(pair, tokens != 1, TEXTS)


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_default_prepend_bos(pairs: Pairs, prepend_bos: bool) -> None:
    pair = pairs.get("two", default_prepend_bos=prepend_bos)
    assert pair.ours.cfg.default_prepend_bos == pair.theirs.cfg.default_prepend_bos == prepend_bos
    compare_calls(pair, "logits", CORPUS[0])


@pytest.mark.parametrize("argument", [{"prepend_bos": "yes"}, {"padding_side": "up"}])
def test_wrong_overrides_are_refused(model: Any, argument: dict[str, str]) -> None:
    with pytest.raises(AssertionError):
        model("The cat", **argument)
    assert model.tokenizer.padding_side == "right"
    assert model.cfg.default_prepend_bos is True


def test_overrides_are_restored(model: Any) -> None:
    model(TEXTS, prepend_bos=False, padding_side="left")
    assert model.cfg.default_prepend_bos is True
    assert model.tokenizer.padding_side == "right"


def test_long_text_is_truncated_and_long_tokens_fail(pairs: Pairs) -> None:
    pair = pairs.get()
    compare_calls(pair, "logits", CORPUS[0] * 3)
    tokens = pair.tokens(1, 25)
    for model in pair.both:
        assert model(CORPUS[0] * 3).shape[1] == 24
        with pytest.raises((RuntimeError, IndexError)):
            model(tokens)


def test_list_of_integers_is_not_token_input(model: Any) -> None:
    with pytest.raises(Exception, match=".+"):
        model([5, 6, 7])


def steps_with_cache(model: Any, tokens: torch.Tensor, lengths: list[int], frozen_after: int | None = None) -> Any:
    """Feed the tokens in pieces; per piece the logits, the activations and the cache's size afterwards."""
    cache = kv_cache(model, tokens.shape[0])
    seen = []
    for step, piece in enumerate(tokens.split(lengths, dim=1)):
        if frozen_after is not None and step == frozen_after:
            cache.freeze()
        logits, activations = model.run_with_cache(piece, past_kv_cache=cache)
        seen.append((logits, activations, cache[0].past_keys, cache[1].past_values, cache.previous_attention_mask))
    return seen


@pytest.mark.parametrize("lengths", [[4, 1, 1, 1], [3, 4], [1, 1, 5], [7]], ids=str)
@pytest.mark.parametrize("frozen_after", [None, 1])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_past_kv_cache(pairs: Pairs, processing: str, frozen_after: int | None, lengths: list[int]) -> None:
    pair = pairs.get("two", processing)
    tokens = pair.tokens(2, 7)
    mine, theirs = (steps_with_cache(model, tokens, lengths, frozen_after) for model in pair.both)
    for left, right in zip(mine, theirs, strict=True):
        close("logits", left[0], right[0])
        caches_close(left[1], right[1])
        close("past keys", left[2], right[2])
        close("past values", left[3], right[3])
        assert torch.equal(left[4], right[4])


def test_past_kv_cache_gives_the_logits_of_one_run(model: Any, pairs: Pairs) -> None:
    tokens = pairs.get().tokens(2, 7)
    steps = steps_with_cache(model, tokens, [3, 1, 3])
    torch.testing.assert_close(torch.cat([step[0] for step in steps], 1), model(tokens), rtol=1e-4, atol=1e-4)


def test_past_kv_cache_with_left_padding(pairs: Pairs) -> None:
    pair = pairs.get("two", tokenizer="own pad")
    tokens = torch.tensor([[1, 1, 20, 21, 22, 23], [24, 25, 26, 27, 28, 29]])
    results = []
    for model in pair.both:
        cache = kv_cache(model, 2)
        first = model(tokens[:, :4], past_kv_cache=cache, padding_side="left")
        second = model(tokens[:, 4:], past_kv_cache=cache, padding_side="left")
        results.append(torch.cat([first, second], 1))
    real = tokens != 1
    close("logits", results[0][real], results[1][real])


def test_past_kv_cache_errors(pairs: Pairs) -> None:
    pair = pairs.get()
    for model in pair.both:
        cache = kv_cache(model, 2)
        model(pair.tokens(2, 3), past_kv_cache=cache)
        with pytest.raises((RuntimeError, AssertionError)):
            model(pair.tokens(1, 1), past_kv_cache=cache)
        with pytest.raises(AssertionError):
            model(pair.tokens(2, 1), past_kv_cache=cache, return_type="loss")


def test_past_kv_cache_without_a_tokenizer_needs_a_mask(pairs: Pairs) -> None:
    pair = pairs.get("three")
    tokens = pair.tokens(2, 3)
    results = []
    for model in pair.both:
        kept = model.tokenizer
        model.tokenizer = None
        try:
            with pytest.raises(ValueError, match="tokenizer"):
                model(tokens, past_kv_cache=kv_cache(model, 2))
            cache = kv_cache(model, 2)
            mask = torch.ones(2, 3, dtype=torch.int64)
            model(tokens, past_kv_cache=cache, attention_mask=mask)
            results.append(model(tokens[:, :1], past_kv_cache=cache, attention_mask=mask[:, :1]))
        finally:
            model.tokenizer = kept
    close("logits", *results)


def test_an_edit_enters_the_kv_cache(pairs: Pairs) -> None:
    pair = pairs.get()
    tokens = pair.tokens(2, 5)
    results = []
    for model in pair.both:
        cache = kv_cache(model, 2)
        hooks = [("blocks.0.attn.hook_k", lambda value, hook: value * 0.5)]
        model.run_with_hooks(tokens[:, :4], fwd_hooks=hooks, past_kv_cache=cache)
        results.append(model(tokens[:, 4:], past_kv_cache=cache))
    close("logits", *results)
