"""How do a model's values become what LIT shows?

Small functions between tensors, caches and texts on one side and numpy arrays and lists on the other. None of them
needs LIT.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .constants import HOOK_POINTS

logger = logging.getLogger(__name__)

#: How tokenizers write a space before a token, and how LIT does.
_SPACE, _LIT_SPACE = "\u0120", "\u2581"


def check_lit_installed() -> bool:
    """Whether ``lit_nlp`` can be imported."""
    return find_spec("lit_nlp") is not None


def tensor_to_numpy(tensor: Tensor | np.ndarray | None) -> np.ndarray | None:
    """A tensor as an array, off its graph and device; arrays and None as they are.

    Raises:
        TypeError: for anything else.
    """
    if tensor is None or isinstance(tensor, np.ndarray):
        return tensor
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a tensor or an array can be converted, not a {type(tensor).__name__}")
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16.
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def numpy_to_tensor(
    array: np.ndarray | Tensor | None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """An array as a tensor of this type on this device; None as it is."""
    if array is None:
        return None
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    return tensor.to(device=device, dtype=dtype)


# --- tokens -----------------------------------------------------------------------------------------------------------


def get_tokens_from_model(
    model: Any, text: str, prepend_bos: bool = True, truncate: bool = True, max_length: int | None = None
) -> tuple[list[str], Tensor]:
    """(the tokens of a text as its tokenizer writes them, their ids [pos]), at most ``max_length``.

    Raises:
        ValueError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("the model needs a tokenizer to turn a text into tokens")
    ids = model.to_tokens(text, prepend_bos=prepend_bos, truncate=truncate)[0, :max_length]
    return model.tokenizer.convert_ids_to_tokens(ids.tolist()), ids


def clean_token_string(token: str) -> str:
    """A token as LIT shows it: a space before it as "\u2581", without BERT's "##"."""
    if token.startswith(_SPACE):
        return _LIT_SPACE + token[1:]
    return token.removeprefix("##")


def clean_token_strings(tokens: list[str]) -> list[str]:
    """`clean_token_string` of each."""
    return [clean_token_string(token) for token in tokens]


def get_top_k_predictions(
    logits: Tensor, tokenizer: Any, k: int = 10, position: int = -1, batch_idx: int = 0
) -> list[tuple[str, float]]:
    """The ``k`` most probable next tokens, [(text, probability), ...], from logits [batch, pos, d_vocab]."""
    best = logits[batch_idx, position].softmax(-1).topk(k)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(tokenizer.decode([index]), probability) for probability, index in pairs]


# --- activations ------------------------------------------------------------------------------------------------------


def extract_attention_from_cache(
    cache: Any, layer: int, head: int | None = None, batch_idx: int = 0
) -> np.ndarray | None:
    """The attention pattern of a layer, [head, query, key], or of one head, [query, key]."""
    pattern = cache[HOOK_POINTS.ATTN_PATTERN_TEMPLATE.format(layer=layer)]
    if pattern.ndim == 4:
        pattern = pattern[batch_idx]
    return tensor_to_numpy(pattern if head is None else pattern[head])


def extract_embeddings_from_cache(
    cache: Any, layer: int, position: str = "all", batch_idx: int = 0
) -> np.ndarray | None:
    """The residual stream after a layer, [pos, d_model]; its "first" or "last" position or "mean", [d_model]."""
    stream = cache[HOOK_POINTS.RESID_POST_TEMPLATE.format(layer=layer)]
    if stream.ndim == 3:
        stream = stream[batch_idx]
    parts = {"first": lambda: stream[0], "last": lambda: stream[-1], "mean": lambda: stream.mean(0)}
    return tensor_to_numpy(parts[position]() if position in parts else stream)


def embedding_gradients(model: Any, ids: Tensor, target_idx: int) -> tuple[Tensor, Tensor]:
    """(gradient, token embeddings), [pos, d_model], of the logit by which the token at ``target_idx`` is predicted.

    No parameter gets a gradient. The first token is not predicted by anything, so its gradient is zero.
    """
    tokens = ids[None]
    embedded = model.embed(tokens).detach().clone().requires_grad_(True)
    target = target_idx % len(ids)
    if target == 0:
        return torch.zeros_like(embedded[0]), embedded[0].detach()
    with torch.enable_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK_POINTS.HOOK_EMBED, lambda value, hook: embedded)])
        (gradient,) = torch.autograd.grad(logits[0, target - 1, ids[target]], embedded)
    return gradient[0], embedded[0].detach()


def compute_token_gradients(
    model: Any, text: str, target_idx: int | None = None, prepend_bos: bool = True
) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """How much each token matters for one prediction: (norm of the gradient, gradient times embedding, tokens).

    Args:
        model: a HookedTransformer with a tokenizer.
        text: the text.
        target_idx: the position whose logit for the token after it is looked at; None: the last one that has a token
            after it.
        prepend_bos: whether the text gets a BOS token.
    """
    tokens, ids = get_tokens_from_model(model, text, prepend_bos=prepend_bos)
    gradient, embedded = embedding_gradients(model, ids, -1 if target_idx is None else target_idx + 1)
    return tensor_to_numpy(gradient.norm(dim=-1)), tensor_to_numpy((gradient * embedded).sum(-1)), tokens


# --- examples ---------------------------------------------------------------------------------------------------------


def validate_input_example(example: dict[str, Any], required_fields: list[str]) -> bool:
    """Whether an example has these fields; warns of the first one that it lacks."""
    for field in required_fields:
        if field not in example:
            logger.warning("the example lacks the field %r", field)
            return False
    return True


def batch_examples(examples: list[dict[str, Any]], batch_size: int) -> list[list[dict[str, Any]]]:
    """The examples in lists of ``batch_size``; the last may be shorter."""
    return [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]


def unbatch_outputs(batched_outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict for each example; what is no array, tensor or list belongs to all of them."""
    if not batched_outputs:
        return []
    size = len(next(iter(batched_outputs.values())))
    batched = (np.ndarray, Tensor, list)
    return [
        {name: value[index] if isinstance(value, batched) else value for name, value in batched_outputs.items()}
        for index in range(size)
    ]


def get_hook_name_for_layer(template: str, layer: int, **kwargs: Any) -> str:
    """A point's name from a template of `HOOK_POINTS`."""
    return template.format(layer=layer, **kwargs)


def filter_cache_by_pattern(cache: Any, pattern: str) -> dict[str, Tensor]:
    """The cached values whose names contain ``pattern``."""
    return {name: value for name, value in cache.items() if pattern in name}


def get_model_info(model: Any) -> dict[str, Any]:
    """What LIT shows of a model: its name, sizes and kinds."""
    names = (
        "model_name n_layers n_heads d_model d_head d_mlp d_vocab n_ctx act_fn normalization_type "
        "positional_embedding_type"
    )
    return {name: getattr(model.cfg, name) for name in names.split()}
