"""What is one layer of BERT, whose norms stand behind the additions to the residual stream?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ..utilities.tensors import repeat_along_head_dimension
from .attention import Attention
from .layer_norm import LayerNorm
from .mlps.choice import create_mlp

Stream = Float[Tensor, "batch pos d_model"]


class BertBlock(nn.Module):
    """Attention, norm, MLP, norm (TransformerLens' BertBlock)."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.attn = Attention(cfg)
        self.ln1 = LayerNorm(cfg)
        self.mlp = create_mlp(cfg)
        self.ln2 = LayerNorm(cfg)
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_pre = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_resid_post = HookPoint()
        self.hook_normalized_resid_post = HookPoint()

    def forward(
        self, resid_pre: Stream, additive_attention_mask: Float[Tensor, "batch 1 1 pos"] | None = None
    ) -> Stream:
        """The normed stream after the block; the mask is added to the scores."""
        resid_pre = self.hook_resid_pre(resid_pre)
        inputs = [resid_pre] * 3
        if self.cfg.use_split_qkv_input:
            points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
            inputs = [point(repeat_along_head_dimension(resid_pre, self.cfg.n_heads)) for point in points]
        attn_out = self.hook_attn_out(self.attn(*inputs, additive_attention_mask=additive_attention_mask))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_in = self.ln1(self.hook_mlp_in(resid_mid.clone()) if self.cfg.use_hook_mlp_in else resid_mid)
        resid_post = self.hook_resid_post(mlp_in + self.hook_mlp_out(self.mlp(mlp_in)))
        return self.hook_normalized_resid_post(self.ln2(resid_post))
