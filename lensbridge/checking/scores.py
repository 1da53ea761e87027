"""What must scores be, given the queries and keys that meet?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .subject import Look, Subject


def _meeting(look: Look, prefix: str, letter: str) -> Tensor:
    """Queries or keys as they meet."""
    rotated = f"{prefix}.hook_rot_{letter}"
    return look[rotated] if rotated in look else unrotated(look, prefix, letter)


def unrotated(look: Look, prefix: str, letter: str) -> Tensor:
    """Queries or keys before they are rotated, and after their norm if they have one."""
    plain, norm = f"{prefix}.hook_{letter}", f"{prefix}.{letter}_norm"
    value = look.normed(norm).reshape(look[plain].shape) if f"{norm}.hook_scale" in look else look[plain]
    return clipped(value, look.subject)


def clipped(x: Tensor, subject: Subject) -> Tensor:
    """Queries, keys or values where the model clips them: behind their points."""
    limit = subject.model.cfg.clip_qkv
    return x if limit is None else x.clamp(-limit, limit)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values, ``[batch, pos, head, d_head]``, once for each query head."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


def attn_scale(cfg: Any, layer: int) -> float:
    """What scores are divided by, as the config says."""
    scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
    return scale * (layer + 1) if cfg.scale_attn_by_inverse_layer_idx else scale


def products(look: Look, layer: int) -> Tensor:
    """Scores before masks and biases: ``q . k / attn_scale``, capped where the model caps them."""
    prefix, cfg = f"blocks.{layer}.attn", look.subject.model.cfg
    q, k = _meeting(look, prefix, "q"), _meeting(look, prefix, "k")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, repeated(k, q.shape[-2])) / attn_scale(cfg, layer)
    cap = cfg.attn_scores_soft_cap
    return cap * torch.tanh(scores / cap) if cap > 0 else scores


def position_bias(subject: Subject, layer: int) -> Tensor | float:
    """What is added to scores at each pair of positions, read off the first row of tokens of a run without hooks.

    In the other rows, and in runs with hooks, it has to be the same.
    """
    if subject.model.cfg.positional_embedding_type not in ("alibi", "relative_positional_bias"):
        return 0.0
    if layer not in subject.biases:
        look = subject.look()
        scores = look[f"blocks.{layer}.attn.hook_attn_scores"][:1]
        subject.biases[layer] = (scores - products(look, layer)[:1]).masked_fill(scores.isneginf(), 0.0)
    return subject.biases[layer]
