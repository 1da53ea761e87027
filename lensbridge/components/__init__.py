"""The parts of a transformer as modules that stand for themselves, with TransformerLens' names and numbers.

`lensbridge.native` builds whole models from them. The parts of a hooked HuggingFace model (``model.blocks[0].attn``)
are other classes, because there HuggingFace's modules compute.
"""

from .abstract_attention import AbstractAttention as AbstractAttention
from .attention import Attention as Attention
from .bert_block import BertBlock as BertBlock
from .bert_embed import BertEmbed as BertEmbed
from .bert_mlm_head import BertMLMHead as BertMLMHead
from .bert_nsp_head import BertNSPHead as BertNSPHead
from .bert_pooler import BertPooler as BertPooler
from .embed import Embed as Embed
from .grouped_query_attention import GroupedQueryAttention as GroupedQueryAttention
from .layer_norm import LayerNorm as LayerNorm
from .layer_norm_pre import LayerNormPre as LayerNormPre
from .mlps.gated_mlp import GatedMLP as GatedMLP
from .mlps.mlp import MLP as MLP
from .mlps.moe import MoE as MoE
from .pos_embed import PosEmbed as PosEmbed
from .rms_norm import RMSNorm as RMSNorm
from .rms_norm_pre import RMSNormPre as RMSNormPre
from .t5_attention import T5Attention as T5Attention
from .t5_block import T5Block as T5Block
from .token_typed_embed import TokenTypeEmbed as TokenTypeEmbed
from .transformer_block import TransformerBlock as TransformerBlock
from .unembed import Unembed as Unembed
