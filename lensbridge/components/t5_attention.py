"""What is T5's attention, whose scores depend on how far apart two tokens are?

The first layer of a stack computes the bias from the distances, and all its layers add it. Distances are sorted into
buckets: near ones each have their own, far ones share theirs, wider and wider up to a largest distance.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hook_points import HookPoint
from ._parameters import Config, bias, weight
from .abstract_attention import AbstractAttention


class T5Attention(AbstractAttention):
    """Attention with a relative position bias, for T5's encoder, decoder and cross attention.

    Args:
        cfg, attn_type, layer_id: as for `AbstractAttention`.
        has_relative_attention_bias: whether this layer computes the bias (`compute_relative_attention_bias`).
        is_decoder: whether tokens see earlier ones only, whatever ``cfg.attention_dir`` says.

    Raises:
        ValueError: a layer that computes the bias needs both fields ``cfg.relative_attention_...``.
    """

    def __init__(
        self,
        cfg: Config,
        has_relative_attention_bias: bool = False,
        attn_type: str = "global",
        layer_id: int | None = None,
        is_decoder: bool = False,
    ) -> None:
        super().__init__(cfg, attn_type, layer_id)
        self.has_relative_attention_bias = has_relative_attention_bias
        self.is_decoder = is_decoder
        if is_decoder:
            self._attention_dir_override = "causal"
        n_heads, d_model, d_head = self.W_Q.shape
        if has_relative_attention_bias:
            buckets = self.cfg.relative_attention_num_buckets
            farthest = self.cfg.relative_attention_max_distance
            if buckets is None or farthest is None:
                raise ValueError(
                    "a relative position bias needs cfg.relative_attention_num_buckets and "
                    "cfg.relative_attention_max_distance"
                )
            self.relative_attention_num_buckets = buckets
            self.relative_attention_max_distance = farthest
            self.rel_pos_bias = nn.Embedding(buckets, n_heads)
            self.rel_pos_hook = HookPoint()
        self.W_K = weight(n_heads, d_model, d_head, cfg=self.cfg)
        self.W_V = weight(n_heads, d_model, d_head, cfg=self.cfg)
        self.b_K = bias(n_heads, d_head, cfg=self.cfg)
        self.b_V = bias(n_heads, d_head, cfg=self.cfg)

    def compute_relative_attention_bias(
        self, query_length: int, key_length: int, device: torch.device | str | None = None
    ) -> Float[Tensor, "1 head_index query_pos key_pos"]:
        """What each head adds to its scores, to be passed to ``forward`` as ``position_bias``."""
        device = self.rel_pos_bias.weight.device if device is None else device
        positions = torch.arange(max(query_length, key_length), device=device)
        distance = positions[None, :key_length] - positions[:query_length, None]
        return self.rel_pos_bias(self._bucket_of(distance)).permute(2, 0, 1).unsqueeze(0)

    def _bucket_of(self, distance: Int[Tensor, "query key"]) -> Int[Tensor, "query key"]:
        """The bucket of each distance ``key - query``; a decoder has none for keys that come later."""
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        first = torch.zeros_like(distance)
        if self.is_decoder:
            distance = (-distance).clamp(min=0)
        else:
            buckets //= 2
            first = (distance > 0).long() * buckets
            distance = distance.abs()
        exact = buckets // 2
        # Half of the buckets hold one distance each; the other half divide the rest evenly on a logarithmic scale.
        far = (distance.clamp(min=1) / exact).log() / math.log(farthest / exact) * (buckets - exact)
        return first + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))
