"""What do these logits say: a token to go on with, or a table to read?

Sampling changes the logits step by step, in the order penalty for repetition, temperature, penalty for frequency,
``top_k`` or ``top_p``. The final draw is one ``Categorical`` sample of float32 logits, so that a fixed seed draws the
same tokens as TransformerLens 3.9.0.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int

if TYPE_CHECKING:
    import pandas


def logits_to_df(
    logits: Float[torch.Tensor, " d_vocab"], tokenizer: Any | None = None, top_k: int | None = None
) -> pandas.DataFrame:
    """The logits of one position as a table, the most probable token first.

    Columns: ``token_index``, ``token_string`` (only with a tokenizer), ``logit``, ``log_prob``, ``probability``.
    ``top_k`` keeps that many rows.

    Raises:
        ImportError: pandas, an optional package, is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("logits_to_df returns a pandas DataFrame; install it with `pip install pandas`.") from error
    log_probs = logits.float().log_softmax(dim=-1)
    order = log_probs.argsort(descending=True)[:top_k]
    columns: dict[str, list[Any]] = {"token_index": order.tolist()}
    if tokenizer is not None:
        columns["token_string"] = [tokenizer.decode([index]) for index in order.tolist()]
    columns["logit"] = logits[order].tolist()
    columns["log_prob"] = log_probs[order].tolist()
    columns["probability"] = log_probs[order].exp().tolist()
    return pd.DataFrame(columns)


def _occurrences(
    tokens: Int[torch.Tensor, "batch pos"], logits: Float[torch.Tensor, "batch d_vocab"]
) -> Int[torch.Tensor, "batch d_vocab"]:
    """How often each vocabulary entry occurs in each row of tokens."""
    counts = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    return counts.scatter_add_(-1, tokens.long(), torch.ones_like(tokens, dtype=torch.int64))


def _discourage_repetition(
    logits: Float[torch.Tensor, "batch d_vocab"], tokens: Int[torch.Tensor, "batch pos"] | None, penalty: float
) -> Float[torch.Tensor, "batch d_vocab"]:
    """Lower the logits of tokens that occurred: positive ones divided, negative ones multiplied (as HuggingFace)."""
    if penalty == 1.0:
        return logits
    if tokens is None:
        warnings.warn("repetition_penalty has no effect without tokens, the text so far.", stacklevel=3)
        return logits
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(_occurrences(tokens, logits) > 0, lowered, logits)


def _discourage_frequency(
    logits: Float[torch.Tensor, "batch d_vocab"], tokens: Int[torch.Tensor, "batch pos"] | None, penalty: float
) -> Float[torch.Tensor, "batch d_vocab"]:
    """Subtract ``penalty`` from a token's logit for each time it occurred."""
    if tokens is None:
        raise AssertionError("freq_penalty needs tokens, the text so far.")
    if tokens.ndim != 2:
        raise AssertionError(f"freq_penalty needs tokens of shape [batch, pos], not {tuple(tokens.shape)}.")
    return (logits - penalty * _occurrences(tokens, logits)).to(logits.dtype)


def _keep_top_k(logits: Float[torch.Tensor, "batch d_vocab"], top_k: int) -> Float[torch.Tensor, "batch d_vocab"]:
    """-inf for everything below the k-th highest logit of its row."""
    if top_k <= 0:
        raise AssertionError(f"top_k has to be greater than 0, not {top_k}.")
    lowest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < lowest_kept, -torch.inf)


def _keep_top_p(logits: Float[torch.Tensor, "batch d_vocab"], top_p: float) -> Float[torch.Tensor, "batch d_vocab"]:
    """-inf for everything after the most probable tokens have gathered more than ``top_p``."""
    if not 0.0 < top_p <= 1.0:
        raise AssertionError(f"top_p has to be in (0, 1], not {top_p}.")
    descending, order = logits.sort(dim=-1, descending=True)
    gathered = descending.softmax(dim=-1).cumsum(dim=-1)
    # A token stays if those before it have not gathered enough yet, which always holds for the first one.
    drop = gathered.roll(1, dims=-1) > top_p
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def sample_logits(
    final_logits: Float[torch.Tensor, "batch d_vocab"],
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: Int[torch.Tensor, "batch pos"] | None = None,
) -> Int[torch.Tensor, " batch"]:
    """Draw the next token of each row.

    ``temperature`` divides the logits: high is more uniform, 0 takes the highest logit (then only the penalty for
    repetition matters). ``top_k`` draws from the k most probable tokens, ``top_p`` from the smallest set that holds
    that much probability; of both, ``top_k`` counts. ``freq_penalty`` (subtracted per occurrence) and
    ``repetition_penalty`` (HuggingFace's; 1 is none) look at ``tokens``, the text so far.

    Raises:
        AssertionError: ``top_k`` or ``top_p`` is out of range, or ``freq_penalty`` is given without 2-d tokens.
    """
    logits = _discourage_repetition(final_logits, tokens, repetition_penalty)
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if freq_penalty > 0:
        logits = _discourage_frequency(logits, tokens, freq_penalty)
    if top_k is not None:
        logits = _keep_top_k(logits, top_k)
    elif top_p is not None:
        logits = _keep_top_p(logits, top_p)
    return torch.distributions.Categorical(logits=logits.float()).sample()
