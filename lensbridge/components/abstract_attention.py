"""What do all kinds of attention have in common?

Queries and the output projection, rotary embedding or ALiBi, masks, softmax, and the hook points between them. The
subclasses own the weights of keys and values: one slice per head (`Attention`), or per group of heads
(`GroupedQueryAttention`). Patterns and scores are ``[batch, head_index, query_pos, key_pos]``.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..cache import TransformerLensKeyValueCacheEntry
from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from ..factored_matrix import FactoredMatrix
from ..hook_points import HookPoint
from ..utilities.activation_functions import apply_softcap
from ._alibi import Alibi
from ._attention_math import (
    log_length_scale,
    normed_flat,
    normed_jointly,
    project,
    project_out,
    results,
    softmax_with_sinks,
)
from ._masks import causal_mask
from ._parameters import Config, bias, weight
from ._rotary import Rotary
from .rms_norm import RMSNorm

#: Architectures whose queries and keys are normed over all heads together.
JOINT_QK_NORM = ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")

Stream = Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos head_index d_model"]
Heads = Float[Tensor, "batch pos head_index d_head"]
Scores = Float[Tensor, "batch head_index query_pos key_pos"]

#: Buffers that are computed from the config: a state dict may have them in another size, or not at all.
CONSTANTS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


class QKV(NamedTuple):
    """Queries, keys and values."""

    q: Heads
    k: Heads
    v: Heads


class AbstractAttention(Rotary, Alibi, nn.Module, ABC):
    """Base of `Attention`, `GroupedQueryAttention` and `T5Attention` (TransformerLens' AbstractAttention).

    Args:
        cfg: the model's config.
        attn_type: "global", or "local" for a layer that sees the last ``cfg.window_size`` tokens only.
        layer_id: the layer's number, needed with ``cfg.scale_attn_by_inverse_layer_idx``.

    Raises:
        ValueError: another ``attn_type``; local attention without a window; a layer number that is needed and missing.
        UnsupportedModelError: (a ValueError) 4-bit weights.
    """

    W_K: Any
    W_V: Any
    b_K: Any
    b_V: Any
    mask: Tensor
    IGNORE: Tensor
    hook_k: HookPoint
    hook_q: HookPoint
    hook_v: HookPoint
    hook_z: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    hook_result: HookPoint

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.load_in_4bit:
            raise UnsupportedModelError(
                "load_in_4bit: components have no quantized weights; load a quantized HuggingFace model instead"
            )
        self.W_Q = weight(cfg.n_heads, cfg.d_model, cfg.d_head, cfg=cfg)
        self.W_O = weight(cfg.n_heads, cfg.d_head, cfg.d_model, cfg=cfg)
        self.b_Q = bias(cfg.n_heads, cfg.d_head, cfg=cfg)
        self.b_O = bias(cfg.d_model, cfg=cfg)
        self._add_query_key_norms()
        self.attn_type = attn_type
        self.layer_id = layer_id
        self.attn_scale = self._scale()
        #: A direction that overrides ``cfg.attention_dir``, where one config serves an encoder and a decoder.
        self._attention_dir_override: str | None = None
        self.register_buffer("mask", torch.empty((0, 0), dtype=torch.bool))
        self.register_buffer("IGNORE", torch.tensor(-torch.inf))
        if cfg.use_attention_sinks:
            self.sinks = bias(cfg.n_heads, cfg=cfg)
        self._add_points()

    def _add_query_key_norms(self) -> None:
        cfg = self.cfg
        self._joint_norm = not cfg.use_qk_norm and cfg.original_architecture in JOINT_QK_NORM
        self.q_norm = self.k_norm = None
        if cfg.use_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg, cfg.d_head), RMSNorm(cfg, cfg.d_head)
        elif self._joint_norm:
            groups = cfg.n_key_value_heads
            self.q_norm = RMSNorm(cfg, cfg.d_model)
            self.k_norm = RMSNorm(cfg, cfg.d_model if groups is None else cfg.d_head * groups)

    def _scale(self) -> float:
        cfg = self.cfg
        if self.attn_type not in ("global", "local"):
            raise ValueError(f"Invalid attention type {self.attn_type!r}: it is 'global' or 'local'")
        if self.attn_type == "local" and not isinstance(cfg.window_size, int):
            raise ValueError(f"local attention needs cfg.window_size, an int, not {cfg.window_size!r}")
        scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        if cfg.scale_attn_by_inverse_layer_idx:
            if self.layer_id is None:
                raise ValueError("scale_attn_by_inverse_layer_idx needs layer_id")
            scale *= self.layer_id + 1
        return scale

    def _add_points(self) -> None:
        """Hook points, in the order in which they are listed, and what the positional embedding needs."""
        for name in ("k", "q", "v", "z", "attn_scores", "pattern", "result"):
            self.add_module(f"hook_{name}", HookPoint())
        kind = self.cfg.positional_embedding_type
        if kind == "shortformer":
            self.hook_attn_input = HookPoint()
        elif kind == "rotary":
            if self.cfg.rotary_dim is None:
                raise ValueError("rotary positional embeddings need cfg.rotary_dim")
            self.hook_rot_k = HookPoint()
            self.hook_rot_q = HookPoint()
            self._register_tables()
        elif kind == "alibi":
            self.alibi = None
        elif kind == "relative_positional_bias":
            self.has_relative_attention_bias = False

    # --- circuits -----------------------------------------------------------------------------------------------------

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head: what a token that is looked at writes, as a factored matrix."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head: which tokens look at which, as a factored matrix."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        query_input: Stream,
        key_input: Stream,
        value_input: Stream,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        additive_attention_mask: Float[Tensor, "batch 1 1 key_pos"] | None = None,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
        position_bias: Float[Tensor, "1 head_index pos key_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream.

        Args:
            query_input, key_input, value_input: what each is computed from, normed; with a fourth dimension, one input
                per head.
            past_kv_cache_entry: keys and values of earlier tokens; the new ones are appended unless it is frozen.
            additive_attention_mask: added to the scores.
            attention_mask: 1 for tokens to attend to, 0 for padding, those in the cache included.
            position_bias: added to the scores, where positions are relative (T5).
        """
        q, k, v = self._prepared(*self.calculate_qkv_matrices(query_input, key_input, value_input))
        offset = 0
        if past_kv_cache_entry is not None:
            offset = past_kv_cache_entry.past_keys.size(1)
            k, v = past_kv_cache_entry.append(k, v)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q, offset, attention_mask))
            # Keys are cached as they were before.
            k = self.hook_rot_k(self.apply_rotary(k, 0, attention_mask))
        if self.cfg.use_logn_attn and not self.training:
            scale = log_length_scale(offset, q.shape[1], self.cfg.train_seq_length or self.cfg.n_ctx, q)
            q = q if scale is None else q * scale[:, None, None]
        scores = self._with_positions(self.calculate_attention_scores(q, k), position_bias)
        if (self._attention_dir_override or self.cfg.attention_dir) == "causal":
            scores = self.apply_causal_mask(scores, offset, attention_mask)
        if additive_attention_mask is not None:
            scores += additive_attention_mask
        scores = self.hook_attn_scores(scores)
        weights = softmax_with_sinks(scores, self.sinks) if self.cfg.use_attention_sinks else F.softmax(scores, dim=-1)
        # A row whose keys are all masked has no softmax (its entries are NaN, one and all); it looks nowhere.
        pattern = self.hook_pattern(torch.where(weights.detach()[..., :1].isnan(), 0.0, weights))
        return self._output(self.calculate_z_scores(v, pattern.to(v)))

    def _prepared(self, q: Heads, k: Heads, v: Heads) -> QKV:
        """Norms over all heads and clipping (OLMo), where the config has them."""
        if self._joint_norm:
            assert self.q_norm is not None and self.k_norm is not None
            q, k = normed_jointly(self.q_norm, q), normed_jointly(self.k_norm, k)
        limit = self.cfg.clip_qkv
        if limit is not None:
            q, k, v = q.clamp(-limit, limit), k.clamp(-limit, limit), v.clamp(-limit, limit)
        return QKV(q, k, v)

    def _with_positions(self, scores: Scores, position_bias: Tensor | None) -> Scores:
        kind = self.cfg.positional_embedding_type
        if kind == "alibi":
            # In place, because adding float32 biases would otherwise raise the dtype of half precision scores.
            scores += self.alibi_for(self.cfg.n_heads, scores.shape[-2], scores.shape[-1], scores.device)
        elif kind == "relative_positional_bias":
            if position_bias is not None:
                scores += position_bias
            elif self.has_relative_attention_bias:
                raise ValueError("position_bias is needed: pass compute_relative_attention_bias(query_len, key_len)")
        return scores

    def _output(self, z: Heads) -> Float[Tensor, "batch pos d_model"]:
        if self.cfg.use_attn_result:
            return self.hook_result(results(z, self.W_O)).sum(2) + self.b_O
        return project_out(z, self.W_O, self.b_O)

    def _key_value_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights and biases that keys and values are computed with: ``W_K, b_K, W_V, b_V``."""
        return self.W_K, self.b_K, self.W_V, self.b_V

    def calculate_qkv_matrices(
        self, query_input: Stream, key_input: Stream, value_input: Stream
    ) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values, after their hook points and, with ``use_qk_norm``, their norms."""
        w_k, b_k, w_v, b_v = self._key_value_parameters()
        q = self.hook_q(project(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(project(key_input, w_k, b_k))
        v = self.hook_v(project(value_input, w_v, b_v))
        if self.cfg.use_qk_norm:
            assert self.q_norm is not None and self.k_norm is not None
            q, k = normed_flat(self.q_norm, q), normed_flat(self.k_norm, k)
        return QKV(q, k, v)

    def calculate_attention_scores(self, q: Heads, k: Heads) -> Scores:
        """``q @ k`` over ``attn_scale``, with the softcap, before positions and masks."""
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / self.attn_scale
        return apply_softcap(scores, self.cfg.attn_scores_soft_cap)

    def calculate_z_scores(self, v: Heads, pattern: Scores) -> Heads:
        """The values averaged by the pattern, after ``hook_z``."""
        return self.hook_z((pattern @ v.transpose(1, 2)).transpose(1, 2))

    def apply_causal_mask(
        self,
        attn_scores: Scores,
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Scores:
        """Scores with ``-inf`` (the buffer ``IGNORE``) at later keys, keys out of the window, and padding.

        Raises:
            ValueError: the scores' lengths and the offset do not fit together.
        """
        n_queries, n_keys = attn_scores.shape[-2:]
        if n_queries + past_kv_pos_offset != n_keys:
            raise ValueError(f"{n_queries} queries after {past_kv_pos_offset} cached tokens, but {n_keys} keys")
        window = self.cfg.window_size if self.attn_type == "local" else None
        visible = causal_mask(n_queries, n_keys, window, attn_scores.device)
        if attention_mask is not None:
            visible = visible & attention_mask.to(attn_scores.device)[:, None, None, :].bool()
        return torch.where(visible, attn_scores, self.IGNORE)

    # --- state --------------------------------------------------------------------------------------------------------

    def reset_constants(self) -> None:
        """Compute the buffers anew, for a model that was made without memory for them (``device="meta"``)."""
        self.mask = torch.empty((0, 0), dtype=torch.bool)
        self.IGNORE = torch.tensor(-torch.inf)
        if self.cfg.positional_embedding_type == "rotary":
            self._register_tables(register=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Old state dicts have a mask of ``[n_ctx, n_ctx]``, tables of other lengths, or none of them."""
        kept = {prefix + name: getattr(self, name) for name in CONSTANTS if name in self._buffers}
        own = {key: value for key, value in kept.items() if _unlike(state_dict.get(key), value)}
        super()._load_from_state_dict(state_dict | own if own else state_dict, prefix, *rest)


def _unlike(saved: Any, own: Tensor) -> bool:
    return not isinstance(saved, Tensor) or saved.shape != own.shape
