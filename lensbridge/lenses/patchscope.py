"""What does the model itself say about a hidden state, when it finds it in another prompt?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .stream import Prompt, as_tokens, position_in, residual_stream, stream_point

Hidden = Float[Tensor, "batch d_model"]


def patchscope(
    model: Any,
    source: Prompt,
    target: Prompt,
    *,
    source_layer: int | None,
    target_layer: int | None,
    source_position: int = -1,
    target_position: int = -1,
    mapping: Callable[[Hidden], Hidden] | None = None,
    target_model: Any = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits on the target prompt when one of its hidden states is replaced by one of the source prompt.

    Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language
    Models". Their token identity prompt, ``"cat -> cat; 1135 -> 1135; hello -> hello; ?"``, asks which token a state
    stands for. With ``target_layer`` the end of the model and the same position, it is the logit lens.

    Args:
        source, target: texts or tokens; one target serves a batch of sources.
        source_layer, target_layer: as everywhere in `lensbridge.lenses`.
        source_position, target_position: one token of each prompt; negative ones count from the end.
        mapping: what is done to the state on the way, for example a learned affine map between layers.
        target_model: another model to patch, of the same width unless ``mapping`` changes it. States are exchanged in
            the basis that each model shows: load both with the same processing.

    Raises:
        IndexError: for a layer or position that does not exist.
    """
    receiver = target_model or model
    state = _state(model, source, source_layer, source_position, mapping)
    tokens = _target_tokens(receiver, target, len(state))
    return _patched(receiver, tokens, state, target_layer, position_in(tokens.shape[1], target_position, "position"))


def patchscope_text(
    model: Any,
    source: Prompt,
    target: Prompt,
    *,
    source_layer: int | None,
    target_layer: int | None,
    source_position: int = -1,
    target_position: int = -1,
    mapping: Callable[[Hidden], Hidden] | None = None,
    target_model: Any = None,
    max_new_tokens: int = 10,
) -> list[str]:
    """How the model continues the patched target prompt, the most likely token each time: one text per source.

    Arguments as for `patchscope`. The whole prompt runs for every new token, so this is for short answers; it ends
    early when all rows have reached the tokenizer's end of text.

    Raises:
        IndexError: for a layer or position that does not exist.
        AssertionError: if the model has no tokenizer.
    """
    receiver = target_model or model
    tokenizer = receiver.required_tokenizer()
    state = _state(model, source, source_layer, source_position, mapping)
    tokens = _target_tokens(receiver, target, len(state))
    length = tokens.shape[1]
    position = position_in(length, target_position, "position")
    with torch.no_grad():
        for _ in range(max_new_tokens):
            best = _patched(receiver, tokens, state, target_layer, position)[:, -1].argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], dim=1)
            if bool((tokens[:, length:] == tokenizer.eos_token_id).any(dim=1).all()):
                break
    return tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)


def _state(
    model: Any, source: Prompt, layer: int | None, position: int, mapping: Callable[[Hidden], Hidden] | None
) -> Hidden:
    stream = residual_stream(model, source, layer)
    state = stream[:, position_in(stream.shape[1], position, "source_position")]
    return state if mapping is None else mapping(state)


def _target_tokens(model: Any, target: Prompt, batch: int) -> Tensor:
    tokens = as_tokens(model, target)
    return tokens.expand(batch, -1) if len(tokens) == 1 else tokens


def _patched(model: Any, tokens: Tensor, state: Hidden, layer: int | None, position: int) -> Tensor:
    def put(resid: Tensor, hook: Any) -> Tensor:
        resid[:, position] = state.to(resid)
        return resid

    return model.run_with_hooks(tokens, fwd_hooks=[(stream_point(model, layer), put)])
