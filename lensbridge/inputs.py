"""What does a call of the model ask HuggingFace's forward to do?

Texts become tokens, padding becomes a mask and positions, a key-value cache becomes HF's cache, ``start_at_layer`` and
``stop_at_layer`` become the span of blocks to run. The rules are TransformerLens': no mask without left padding, a mask
given, or a cache; positions that count real tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import TransformerLensKeyValueCache
from .engine import Request
from .engine.kv import ValueBiases, append_new, hf_cache
from .engine.plan import Span
from .errors import UnsupportedModelError
from .tokens import as_batch
from .utilities.tensors import get_offset_position_ids
from .utilities.tokenize_utils import get_attention_mask


@dataclass
class Call:
    """A prepared call: the request for the engine, and what the loss and the caches need afterwards."""

    request: Request
    tokens: Tensor | None
    attention_mask: Tensor | None
    past_kv_cache: TransformerLensKeyValueCache | None
    value_biases: ValueBiases = field(default_factory=dict)

    def finish(self, basis: Any) -> None:
        """Let the key-value cache keep what this run has computed, and the mask it was computed under."""
        if self.past_kv_cache is not None:
            entries = dict(enumerate(self.past_kv_cache.entries))
            stop = min(self.request.span.stop, len(entries))
            ran = {layer: entries[layer] for layer in range(self.request.span.start, stop)}
            append_new(ran, self.request.inputs["past_key_values"], basis, self.value_biases)
            if self.request.span.embeds and not self.past_kv_cache.frozen:
                assert self.attention_mask is not None
                self.past_kv_cache.previous_attention_mask = self.attention_mask


def span_of(n_layers: int, start_at_layer: int | None, stop_at_layer: int | None, return_type: str | None) -> Span:
    """Which blocks run (Python's slicing rules, as in TransformerLens), and what after them."""
    start, stop, _ = slice(start_at_layer, stop_at_layer).indices(n_layers)
    ends = stop_at_layer is not None
    return Span(start, max(start, stop), start_at_layer is None, not ends, not ends and return_type is not None)


def prepare(
    model: Any,
    basis: Any,
    input: Any,
    span: Span,
    prepend_bos: bool | None,
    tokens: Tensor | None,
    attention_mask: Tensor | None,
    past_kv_cache: TransformerLensKeyValueCache | None,
) -> Call:
    """Turn the arguments of ``forward`` into a `Call`; padding side and BOS default are already the model's.

    Raises:
        AssertionError: text without a tokenizer, ``start_at_layer`` without a residual stream, or a mask of another
            shape.
        IndexError: more tokens than the context holds.
        UnsupportedModelError: a key-value cache for a model that is given the whole text; ``start_at_layer`` without
            tokens where layers read more than the residual stream, and with ``stop_at_layer`` where there is no such.
        ValueError: a key-value cache without tokenizer and without ``attention_mask``.
    """
    device = model.cfg.device
    _refuse_several_streams(model, span)
    if not span.embeds:
        shape = list(input.shape) if isinstance(input, Tensor) else []
        if len(shape) != 3 or shape[-1] != model.cfg.d_model or not input.is_floating_point():
            raise AssertionError(
                f"with start_at_layer the input is the residual stream before that layer, floats [batch, pos, "
                f"{model.cfg.d_model}], not {type(input).__name__} {shape}"
            )
        residual = input.to(device)
        inputs = _begun_later(model, residual, tokens)
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(device)
    else:
        if isinstance(input, (str, list)):
            input = model.to_tokens(input)
        tokens = as_batch(input).to(device)
        inputs, residual, positions = {"input_ids": tokens}, None, None
        past = past_length(past_kv_cache, tokens.shape[0], model.cfg)
        if past_kv_cache is not None and model.interior.key_value_cache != "new tokens":
            raise UnsupportedModelError(
                "past_kv_cache cannot be used with this model: HuggingFace gives it the whole text at each step, as "
                "generate() does here"
            )
        if _needs_mask(model, attention_mask, past_kv_cache):
            attention_mask = _mask_for(model, tokens, prepend_bos, attention_mask)
            if past_kv_cache is not None:
                before = past_kv_cache.previous_attention_mask.to(device)
                attention_mask = torch.cat((before, attention_mask), dim=-1)
            inputs["attention_mask"] = attention_mask
            positions = get_offset_position_ids(past, attention_mask)
            inputs["position_ids"] = positions + model.interior.counts_from
        refuse_too_long(past + tokens.shape[1], positions, model.interior.n_positions)
    call = Call(Request(inputs, span, residual), tokens, attention_mask, past_kv_cache)
    if past_kv_cache is not None:
        entries = dict(enumerate(past_kv_cache.entries))
        inputs |= {"past_key_values": hf_cache(entries, basis, call.value_biases), "use_cache": True}
    return call


def _refuse_several_streams(model: Any, span: Span) -> None:
    """Refuse to begin or end between layers where what passes there is no residual stream."""
    between = [("start_at_layer", span.start)] * (not span.embeds) + [("stop_at_layer", span.stop)] * (not span.norm)
    for argument, layer in between:
        reason = model.interior.why_absent(f"blocks.{min(layer, model.cfg.n_layers - 1)}.hook_resid_pre")
        if reason is not None:
            raise UnsupportedModelError(f"{argument} cannot be used with this model: {reason}")


def _begun_later(model: Any, residual: Tensor, tokens: Tensor | None) -> dict[str, Any]:
    """What the HF model is given where a run begins with a residual stream: tokens, too, if its layers read these."""
    if model.interior.rereads is None:
        return {"inputs_embeds": residual}
    if tokens is None:
        raise UnsupportedModelError(
            f"start_at_layer needs the tokens besides the residual stream here: {model.interior.rereads}. Pass "
            "tokens=; what layers read besides the stream is what it is in a run on these"
        )
    tokens = as_batch(tokens).to(residual.device)
    # A few models' streams have more positions than the text.
    if tokens.shape[0] != residual.shape[0] or tokens.shape[1] > residual.shape[1]:
        raise AssertionError(f"tokens has shape {list(tokens.shape)}, the residual stream {list(residual.shape)}")
    return {"input_ids": tokens}


def _needs_mask(model: Any, mask: Tensor | None, cache: Any) -> bool:
    padded_left = model.tokenizer is not None and model.tokenizer.padding_side == "left"
    return padded_left or mask is not None or cache is not None


def _mask_for(model: Any, tokens: Any, prepend_bos: bool | None, mask: Tensor | None) -> Tensor:
    if mask is None:
        if model.tokenizer is None:
            raise ValueError(
                "a key-value cache needs to know which tokens are padding: pass attention_mask= (ones for no padding), "
                "since the model has no tokenizer"
            )
        prepend = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        mask = get_attention_mask(model.tokenizer, tokens, prepend)
    if mask.shape != tokens.shape:
        raise AssertionError(
            f"attention_mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}; the mask covers the "
            "tokens given now, earlier ones are in the key-value cache"
        )
    return mask.to(tokens.device, torch.long if mask.is_floating_point() else mask.dtype)


@contextmanager
def explaining_tokens(tokens: Tensor | None, d_vocab: int) -> Iterator[None]:
    """The time of a run; if it fails because of what the tokens are, the error says so.

    Raises:
        IndexError: a token is not in the vocabulary.
        RuntimeError: there are none.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if tokens is None or tokens.device.type == "meta":
            raise
        if tokens.numel() == 0:
            raise RuntimeError("the input has no tokens: prompts need one token at least (a BOS token, say)") from error
        low, high = int(tokens.min()), int(tokens.max())
        if isinstance(error, IndexError) and not 0 <= low <= high < d_vocab:
            raise IndexError(
                f"the tokens are from {low} to {high}, the vocabulary from 0 to {d_vocab - 1}: is this the model's own "
                "tokenizer?"
            ) from error
        raise


def refuse_too_long(length: int, positions: Tensor | None, n_ctx: int | None) -> None:
    """Refuse more tokens than the context holds, if it has an end; padded ones may be more, if their positions are not.

    Raises:
        IndexError: the input is too long.
    """
    # On a GPU, HF's own failure would leave the process without a usable device.
    if n_ctx is not None and length > n_ctx and (positions is None or int(positions.max()) >= n_ctx):
        raise IndexError(f"the input is {length} tokens long (with the key-value cache), the model's context {n_ctx}")


def past_length(cache: TransformerLensKeyValueCache | None, batch: int, cfg: Any) -> int:
    if cache is None:
        return 0
    if not isinstance(cache, TransformerLensKeyValueCache):
        raise TypeError(
            f"past_kv_cache is made by TransformerLensKeyValueCache.init_cache(...), this is a {type(cache).__name__}"
        )
    cached, length, heads, d_head = cache[0].past_keys.shape
    if cached != batch:
        raise AssertionError(f"the key-value cache holds a batch of {cached}, the input has {batch}")
    expected = (cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
    if (heads, d_head) != expected:
        raise AssertionError(
            f"the key-value cache is of another model: heads and d_head {(heads, d_head)}, here {expected}"
        )
    return length
