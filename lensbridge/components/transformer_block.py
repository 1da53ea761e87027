"""What is one layer: attention, MLP, their norms, and the residual stream between them?"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..cache import TransformerLensKeyValueCacheEntry
from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ..utilities.tensors import repeat_along_head_dimension
from ._norms import Norm
from ._parameters import Config
from .abstract_attention import AbstractAttention
from .attention import Attention
from .grouped_query_attention import GroupedQueryAttention
from .layer_norm import LayerNorm
from .layer_norm_pre import LayerNormPre
from .mlps.choice import create_mlp
from .rms_norm import RMSNorm
from .rms_norm_pre import RMSNormPre

#: Architectures whose norms stand behind attention and MLP instead of before them.
POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")

#: The norm of each ``normalization_type``.
NORMS: dict[str | None, Callable[[HookedTransformerConfig], nn.Module]] = {
    "LN": LayerNorm,
    "LNPre": LayerNormPre,
    "RMS": RMSNorm,
    "RMSPre": RMSNormPre,
    None: lambda cfg: nn.Identity(),
}

Stream = Float[Tensor, "batch pos d_model"]


def norm_for(cfg: HookedTransformerConfig) -> nn.Module:
    """A new norm of the config's type; an identity for None.

    Raises:
        ValueError: the type is unknown.
    """
    kind = cfg.normalization_type
    if kind not in NORMS:
        raise ValueError(f"Invalid normalization_type {kind!r}: one of {', '.join(map(repr, NORMS))}")
    return NORMS[kind](cfg)


def norm_after(cfg: HookedTransformerConfig) -> nn.Module:
    """The norm of what a part of the block writes; it keeps its gain, which cannot be folded into a reader."""
    kind = cfg.normalization_type
    if kind is None:
        return nn.Identity()
    return RMSNorm(cfg) if kind.startswith("RMS") else LayerNorm(cfg)


class TransformerBlock(nn.Module):
    """Attention and MLP around the residual stream (TransformerLens' TransformerBlock).

    Args:
        cfg: the model's config.
        block_index: the number of the layer; decides its attention type under ``cfg.use_local_attn``.

    Raises:
        ValueError: an unknown ``normalization_type``, or local attention without ``attn_types``.
    """

    attn: AbstractAttention
    hook_attn_in: HookPoint
    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_mlp_in: HookPoint
    hook_attn_out: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_pre: HookPoint
    hook_resid_mid: HookPoint
    hook_resid_post: HookPoint

    def __init__(self, cfg: Config, block_index: int) -> None:
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.normalization_type = cfg.normalization_type
        self._norms_after = cfg.original_architecture in POST_NORM
        self.ln1 = norm_for(cfg)
        if cfg.use_normalization_before_and_after:
            self.ln1_post = norm_after(cfg)
        if not cfg.attn_only:
            self.ln2 = norm_for(cfg)
            if cfg.use_normalization_before_and_after:
                self.ln2_post = norm_after(cfg)
        kind = Attention if cfg.n_key_value_heads is None else GroupedQueryAttention
        self.attn = kind(cfg, self._attention_type(block_index), block_index)
        if not cfg.attn_only:
            self.mlp = create_mlp(cfg)
        for name in ("attn_in", "q_input", "k_input", "v_input", "mlp_in", "attn_out", "mlp_out", "resid_pre"):
            self.add_module(f"hook_{name}", HookPoint())
        if not cfg.attn_only and not cfg.parallel_attn_mlp:
            self.hook_resid_mid = HookPoint()
        self.hook_resid_post = HookPoint()

    def _attention_type(self, layer: int) -> str:
        if not self.cfg.use_local_attn:
            return "global"
        if self.cfg.attn_types is None:
            raise ValueError("attn_types must say 'global' or 'local' for each layer when use_local_attn is True")
        return self.cfg.attn_types[layer]

    def forward(
        self,
        resid_pre: Stream,
        shortformer_pos_embed: Stream | None = None,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Stream:
        """The residual stream after the block.

        Args:
            resid_pre: the residual stream before it.
            shortformer_pos_embed: the positional embedding, which shortformer models add to what queries and keys read.
            past_kv_cache_entry: this layer's keys and values of earlier tokens.
            attention_mask: 1 for tokens to attend to, 0 for padding, those in the cache included.
        """
        cfg = self.cfg
        resid_pre = self.hook_resid_pre(resid_pre)
        query, key, value = self._attention_inputs(resid_pre, shortformer_pos_embed)
        # By keyword, as TransformerLens has it: a module of the user's may stand here.
        attn_out = self.attn(
            query_input=query,
            key_input=key,
            value_input=value,
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
        if cfg.use_normalization_before_and_after:
            attn_out = self.ln1_post(attn_out)
        if self._norms_after:
            attn_out = self.ln1(attn_out)
        attn_out = self.hook_attn_out(attn_out)
        if cfg.parallel_attn_mlp:
            mlp_out = self.apply_mlp(self.ln2(self._mlp_input(resid_pre)))
            return self.hook_resid_post(resid_pre + attn_out + mlp_out)
        if cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_in = self._mlp_input(resid_mid)
        return self.hook_resid_post(resid_mid + self.apply_mlp(mlp_in if self._norms_after else self.ln2(mlp_in)))

    def _mlp_input(self, stream: Stream) -> Stream:
        # A copy, so that an edit in place leaves the stream alone.
        return self.hook_mlp_in(stream.clone()) if self.cfg.use_hook_mlp_in else stream

    def _attention_inputs(self, resid_pre: Stream, pos_embed: Stream | None) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values are computed from: the stream, one copy per head where asked for, normed."""
        cfg = self.cfg
        if cfg.use_attn_in:
            shared = self.hook_attn_in(repeat_along_head_dimension(resid_pre, cfg.n_heads))
        else:
            shared = resid_pre
        if cfg.use_split_qkv_input:
            grouped = cfg.n_key_value_heads is not None and not cfg.ungroup_grouped_query_attention
            n_kv = cfg.n_key_value_heads if grouped and cfg.n_key_value_heads is not None else cfg.n_heads
            query = self.hook_q_input(repeat_along_head_dimension(resid_pre, cfg.n_heads))
            key = self.hook_k_input(repeat_along_head_dimension(resid_pre, n_kv))
            value = self.hook_v_input(repeat_along_head_dimension(resid_pre, n_kv))
            inputs = self._normed(query), self._normed(key), self._normed(value)
        elif isinstance(self.ln1, Norm) and not self.ln1.is_watched:
            normed = self._normed(shared)
            inputs = normed, normed, normed
        else:
            # Whoever listens at the norm sees the inputs of queries, keys and values pass, in this order.
            inputs = self._normed(shared), self._normed(shared), self._normed(shared)
        if pos_embed is None or self._norms_after:
            return inputs
        if inputs[0].dim() == 4:
            pos_embed = pos_embed.unsqueeze(2)
        return inputs[0] + pos_embed, inputs[1] + pos_embed, inputs[2]

    def _normed(self, x: Tensor) -> Tensor:
        return x if self._norms_after else self.ln1(x)

    def apply_mlp(self, normalized_resid: Stream) -> Stream:
        """What the MLP adds to the residual stream, after ``hook_mlp_out``."""
        mlp_out = self.mlp(normalized_resid)
        if self.cfg.use_normalization_before_and_after:
            mlp_out = self.ln2_post(mlp_out)
        if self._norms_after:
            mlp_out = self.ln2(mlp_out)
        return self.hook_mlp_out(mlp_out)
