"""Which heads attend the way that a given kind of head would?

A kind of head is a *detection pattern*: a lower triangular ``[pos, pos]`` matrix that says which key each query ought
to look at. Three kinds have a name and a pattern made from the tokens; any other can be passed as a matrix. A head's
score is how well its attention pattern agrees with that matrix.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int

from .activation_cache import ActivationCache
from .utilities.components_utils import get_act_name
from .utilities.tensors import is_lower_triangular, is_square

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES: tuple[HeadName, ...] = get_args(HeadName)
ErrorMeasure = Literal["abs", "mul"]

LayerHeadTuple = tuple[int, int]
LayerToHead = dict[int, list[int]]

INVALID_HEAD_NAME_ERR = f"detection_pattern must be a Tensor or one of head names: {HEAD_NAMES}; got %s"
CACHE_WITH_SEQ_LIST_ERR = (
    "A cache holds one prompt, so it cannot be used with a list of prompts. Call detect_head for each prompt with its "
    "own cache, or leave cache out."
)
SEQ_LEN_ERR = (
    "The sequence needs more than one token, and fewer than the model's context holds (a longer text is cut there, so "
    "one that fills the context may have lost its end)."
)
DET_PAT_NOT_SQUARE_ERR = (
    "The detection pattern must be a lower triangular matrix of shape (sequence_length, sequence_length); "
    "sequence_length=%d; got detection pattern of shape %s"
)

Square = Float[torch.Tensor, "query_pos key_pos"]


def detect_head(
    model: Any,
    seq: str | list[str],
    detection_pattern: torch.Tensor | HeadName,
    heads: list[LayerHeadTuple] | LayerToHead | None = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
) -> Float[torch.Tensor, "n_layers n_heads"]:
    """Score every head by how well its attention agrees with a detection pattern.

    Args:
        model: a `HookedTransformer`.
        seq: the prompt; of several prompts, each is scored by itself and the mean is given.
        detection_pattern: "previous_token_head", "duplicate_token_head", "induction_head" (the last two from Olsson et
            al. 2022, "In-context Learning and Induction Heads"), or a lower triangular ``[pos, pos]`` tensor.
        heads: score these only, as (layer, head) pairs or as layer -> heads; the others get -1.
        cache: the activations of this prompt (without batch dimension), to save the run.
        exclude_bos: leave out attention to the first token.
        exclude_current_token: leave out attention of a token to itself.
        error_measure: see `compute_head_attention_similarity_score`.

    Raises:
        AssertionError: for an unknown measure or head name, a prompt that is too short or fills the context, or a
            pattern that is not lower triangular of the prompt's length.
        ValueError: for a cache together with a list of prompts.
        TypeError: for a pattern that is neither a name nor a tensor.
    """
    if error_measure not in get_args(ErrorMeasure):
        raise AssertionError(f"Invalid error_measure={error_measure}; valid values are {get_args(ErrorMeasure)}")
    if isinstance(seq, list):
        if cache is not None:
            raise ValueError(CACHE_WITH_SEQ_LIST_ERR)
        scores = [
            detect_head(
                model,
                one,
                detection_pattern,
                heads,
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=error_measure,
            )
            for one in seq
        ]
        return torch.stack(scores).mean(0)
    tokens = model.to_tokens(seq)
    wanted = _checked_pattern(model, tokens, detection_pattern, error_measure)
    chosen = _heads_by_layer(model, heads)
    if cache is None:
        points = [get_act_name("pattern", layer) for layer in chosen]
        _, cache = model.run_with_cache(tokens, remove_batch_dim=True, names_filter=points)
    matches = -torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=model.cfg.dtype)
    for layer, layer_heads in chosen.items():
        patterns = cache["pattern", layer, "attn"]
        for head in layer_heads:
            matches[layer, head] = compute_head_attention_similarity_score(
                patterns[head],
                detection_pattern=wanted.to(patterns.device),
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=error_measure,
            )
    return matches


def _checked_pattern(model: Any, tokens: torch.Tensor, wanted: torch.Tensor | str, error_measure: str) -> torch.Tensor:
    """The detection pattern for these tokens, made from its name if need be."""
    if isinstance(wanted, str):
        if wanted not in _PATTERN_OF:
            raise AssertionError(INVALID_HEAD_NAME_ERR % wanted)
        wanted = _PATTERN_OF[wanted](tokens.cpu())
    elif not isinstance(wanted, torch.Tensor):
        raise TypeError(INVALID_HEAD_NAME_ERR % type(wanted).__name__)
    if error_measure == "mul" and not set(wanted.unique().tolist()) <= {0, 1}:
        logging.warning("Using detection pattern with values other than 0 or 1 with error_measure 'mul'")
    length = tokens.shape[-1]
    if not 1 < length < model.cfg.n_ctx:
        raise AssertionError(SEQ_LEN_ERR)
    if not is_lower_triangular(wanted) or wanted.shape[0] != length:
        raise AssertionError(DET_PAT_NOT_SQUARE_ERR % (length, wanted.shape))
    return wanted


def _heads_by_layer(model: Any, heads: list[LayerHeadTuple] | LayerToHead | None) -> Mapping[int, list[int]]:
    if heads is None:
        return {layer: list(range(model.cfg.n_heads)) for layer in range(model.cfg.n_layers)}
    if isinstance(heads, Mapping):
        return heads
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)
    return by_layer


def get_previous_token_head_detection_pattern(tokens: Int[torch.Tensor, "*batch pos"]) -> Square:
    """Every query on the token before it: ones just below the diagonal."""
    return torch.ones(tokens.shape[-1] - 1).diag(-1)


def get_duplicate_token_head_detection_pattern(tokens: Int[torch.Tensor, "*batch pos"]) -> Square:
    """Every query on the earlier occurrences of its own token, for the tokens of one prompt."""
    row = tokens.reshape(-1)
    return (row[:, None] == row[None, :]).float().tril(-1)


def get_induction_head_detection_pattern(tokens: Int[torch.Tensor, "*batch pos"]) -> Square:
    """Every query on what followed the earlier occurrences of its own token, for the tokens of one prompt."""
    duplicates = get_duplicate_token_head_detection_pattern(tokens)
    return torch.nn.functional.pad(duplicates[:, :-1], (1, 0))


_PATTERN_OF: dict[str, Callable[[torch.Tensor], Square]] = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


def get_supported_heads() -> None:
    """Print the names that `detect_head` knows."""
    print(f"Supported heads: {HEAD_NAMES}")


def compute_head_attention_similarity_score(
    attention_pattern: Square,
    detection_pattern: Square,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: ErrorMeasure,
) -> float:
    """How well one head's attention agrees with a detection pattern; at best 1.

    "mul" is the share of the head's attention that lies where the pattern is 1 (0 to 1). "abs" is 1 minus the summed
    absolute difference per query, rounded to 3 digits (-1 to 1); with it a pattern can ask for fractions, such as 0.2
    on one token and 0.8 on another. What is excluded counts in neither. The arguments are not changed.

    Raises:
        AssertionError: the attention pattern is not a square matrix (of a cache with a batch dimension, say), or with
            "abs" attends to later tokens.
    """
    if attention_pattern.dim() != 2 or not is_square(attention_pattern):
        raise AssertionError(
            f"Attention pattern is not square; got shape {tuple(attention_pattern.shape)}, not [query_pos, key_pos]. "
            "A cache for detect_head is made with remove_batch_dim=True."
        )
    excluded = torch.zeros_like(attention_pattern, dtype=torch.bool)
    if exclude_bos:
        excluded[:, 0] = True
    if exclude_current_token:
        excluded.fill_diagonal_(True)
    if error_measure == "mul":
        attended = attention_pattern.masked_fill(excluded, 0)
        return float((attended * detection_pattern).sum() / attended.sum())
    difference = (attention_pattern - detection_pattern).abs()
    if not is_lower_triangular(difference):
        raise AssertionError("attention pattern and detection pattern must be lower triangular for error_measure 'abs'")
    return 1 - round(float(difference.masked_fill(excluded, 0).mean() * len(difference)), 3)
