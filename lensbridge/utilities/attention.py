"""How do attention heads read their queries, keys and values, under TransformerLens' names?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..components._attention_math import project


def simple_attn_linear(
    input: Float[Tensor, "batch pos d_model"],
    w: Float[Tensor, "head_index d_model d_head"],
    b: Float[Tensor, "head_index d_head"],
) -> Float[Tensor, "batch pos head_index d_head"]:
    """``input @ w + b`` for every head."""
    return project(input, w, b)


def complex_attn_linear(
    input: Float[Tensor, "batch pos head_index d_model"],
    w: Float[Tensor, "head_index d_model d_head"],
    b: Float[Tensor, "head_index d_head"],
) -> Float[Tensor, "batch pos head_index d_head"]:
    """``input @ w + b`` for every head, each with an input of its own."""
    return project(input, w, b)


def clamp_qkv(q: Tensor, k: Tensor, v: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The three with every value brought into ``[-clip, clip]``."""
    return q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
