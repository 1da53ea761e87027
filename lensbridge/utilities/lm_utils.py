"""How well do logits predict the next token?

Position i of the logits is a guess of token i + 1. The last position has nothing to be compared with and the first
token is never guessed, so per-token results have one position less than the input.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int


def lm_cross_entropy_loss(
    logits: Float[torch.Tensor, "batch pos d_vocab"],
    tokens: Int[torch.Tensor, "batch pos"],
    attention_mask: Int[torch.Tensor, "batch pos"] | Bool[torch.Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[torch.Tensor, ""] | Float[torch.Tensor, "batch pos-1"]:
    """Cross entropy of the next token, in nats: the mean over all predicted positions, or each position's own.

    With an attention mask, a prediction counts only if both its position and the predicted token are attended; the
    others are 0 in the per-token result and do not enter the mean.

    Raises:
        AssertionError: the mask's shape is not that of the tokens.
    """
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise AssertionError(
            f"attention_mask must have the tokens' shape {tuple(tokens.shape)}, not {tuple(attention_mask.shape)}"
        )
    targets = tokens[..., 1:].unsqueeze(-1)
    # Of all positions: without the last one, the logits would have to be copied first.
    losses = -logits.log_softmax(dim=-1)[..., :-1, :].gather(-1, targets).squeeze(-1)
    counted = losses.numel()
    if attention_mask is not None:
        attended = attention_mask.bool()
        predicted = attended[:, :-1] & attended[:, 1:]
        losses = losses.where(predicted, 0.0)
        counted = int(predicted.sum())
    return losses if per_token else losses.sum() / counted


def lm_accuracy(
    logits: Float[torch.Tensor, "batch pos d_vocab"], tokens: Int[torch.Tensor, "batch pos"], per_token: bool = False
) -> Float[torch.Tensor, ""] | Bool[torch.Tensor, "batch pos-1"]:
    """Share of positions whose highest logit is the next token, or with ``per_token`` each position's hit or miss."""
    hits = logits[:, :-1].argmax(dim=-1) == tokens[:, 1:]
    return hits if per_token else hits.sum() / hits.numel()
