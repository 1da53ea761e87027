"""What is one layer of T5's encoder, or of its decoder, which also looks at the encoder?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..cache import TransformerLensKeyValueCacheEntry
from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ..utilities.tensors import repeat_along_head_dimension
from .mlps.choice import create_mlp
from .rms_norm import RMSNorm
from .t5_attention import T5Attention

Stream = Float[Tensor, "batch pos d_model"]


class T5Block(nn.Module):
    """Attention, cross attention in a decoder, and MLP (TransformerLens' T5Block).

    Args:
        cfg: the model's config.
        block_index: the number of the layer in its stack; the first computes the position bias.
        is_decoder: whether there is cross attention, and tokens see earlier ones only.
    """

    def __init__(self, cfg: HookedTransformerConfig, block_index: int, is_decoder: bool) -> None:
        super().__init__()
        self.cfg = cfg
        self.is_decoder = is_decoder
        self.ln1 = RMSNorm(cfg)
        self.attn = T5Attention(cfg, has_relative_attention_bias=block_index == 0, is_decoder=is_decoder)
        self.ln2 = RMSNorm(cfg)
        if is_decoder:
            self.cross_attn = T5Attention(cfg)
            self.ln3 = RMSNorm(cfg)
        self.mlp = create_mlp(cfg)
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_attn_in = HookPoint()
        self.hook_attn_out = HookPoint()
        if is_decoder:
            self.hook_cross_attn_in = HookPoint()
            self.hook_cross_attn_out = HookPoint()
            self.hook_resid_mid_cross = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_pre = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        resid_pre: Stream,
        additive_attention_mask: Float[Tensor, "batch 1 1 pos"] | None = None,
        encoder_additive_attention_mask: Float[Tensor, "batch 1 1 encoder_pos"] | None = None,
        position_bias: Float[Tensor, "1 head_index pos key_pos"] | None = None,
        encoder_hidden_states: Float[Tensor, "batch encoder_pos d_model"] | None = None,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
    ) -> Stream:
        """The residual stream after the block.

        Args:
            resid_pre: the residual stream before it.
            additive_attention_mask: added to the scores of attention.
            encoder_additive_attention_mask: added to the scores of cross attention.
            position_bias: from the first layer's ``attn.compute_relative_attention_bias``.
            encoder_hidden_states: the encoder's output, which cross attention reads.
            past_kv_cache_entry: this layer's keys and values of earlier tokens.

        Raises:
            ValueError: a decoder's block without ``encoder_hidden_states``.
        """
        resid_pre = self.hook_resid_pre(resid_pre)
        query, key, value = (self.ln1(x) for x in self._attention_inputs(resid_pre))
        attn_out = self.attn(query, key, value, past_kv_cache_entry, additive_attention_mask, None, position_bias)
        stream = self.hook_resid_mid(resid_pre + self.hook_attn_out(attn_out))
        before_mlp = self.ln2
        if self.is_decoder:
            if encoder_hidden_states is None:
                raise ValueError("a decoder's block needs encoder_hidden_states for its cross attention")
            cross_in = self.hook_cross_attn_in(stream.clone()) if self.cfg.use_attn_in else stream
            cross_out = self.cross_attn(
                self.ln2(cross_in),
                encoder_hidden_states,
                encoder_hidden_states,
                additive_attention_mask=encoder_additive_attention_mask,
            )
            stream = self.hook_resid_mid_cross(stream + self.hook_cross_attn_out(cross_out))
            before_mlp = self.ln3
        if self.cfg.use_hook_mlp_in:
            # As in TransformerLens, an edit here reaches the stream too.
            stream = self.hook_mlp_in(stream.clone())
        return self.hook_resid_post(stream + self.hook_mlp_out(self.mlp(before_mlp(stream))))

    def _attention_inputs(self, resid_pre: Stream) -> tuple[Tensor, Tensor, Tensor]:
        cfg = self.cfg
        shared = resid_pre
        if cfg.use_attn_in:
            shared = self.hook_attn_in(repeat_along_head_dimension(resid_pre, cfg.n_heads))
        if not cfg.use_split_qkv_input:
            return shared, shared, shared
        n_kv = cfg.n_heads if cfg.n_key_value_heads is None else cfg.n_key_value_heads
        return (
            self.hook_q_input(repeat_along_head_dimension(resid_pre, cfg.n_heads)),
            self.hook_k_input(repeat_along_head_dimension(resid_pre, n_kv)),
            self.hook_v_input(repeat_along_head_dimension(resid_pre, n_kv)),
        )
