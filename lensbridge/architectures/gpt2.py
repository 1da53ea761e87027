"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") and its relatives.

- sequential blocks, LayerNorm before each branch and at the end; learned positions added to the token embedding
- q, k and v in one Conv1D ``c_attn`` with the blocks [q | k | v]; plain MLP
- output head tied to the token embedding (or not), without bias
- BigCode's models (SantaCoder and StarCoder, Li et al. 2023): one key and value for all queries, or one next to each
- CTRL (Keskar et al. 2019): separate projections; the embedding times sqrt(d_model); sines of the position are added
- GPT (Radford et al. 2018): norms behind attention and MLP, none at the end; no key-value cache
- MPT (MosaicML 2023): LayerNorms without bias; positions by ALiBi (Press et al. 2022); the MLP adds to the stream
"""

from dataclasses import replace

from .forms import GROUPS, Softmax
from .record import Architecture, Block

GPT2 = Architecture(
    model_type="gpt2",
    hf_class="GPT2LMHeadModel",
    also=("gpt-sw3",),
    embed="transformer.wte",
    pos_embed="transformer.wpe",
    layers="transformer.h",
    ln_final="transformer.ln_f",
    unembed="lm_head",
    block=Block(
        ln1="ln_1",
        attn="attn",
        qkv="attn.c_attn",
        o="attn.c_proj",
        ln2="ln_2",
        gate=None,
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        rotary=False,
    ),
    norm="LN",
    config={
        "use_attn_scale": "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    },
    variants={"reorder_and_upcast_attn": {"softmax": Softmax(call="_upcast_and_reordered_attn")}},
    refused={"add_cross_attention": "its blocks add a third branch, which TransformerLens has no points for"},
)
GPT_BIGCODE = replace(
    GPT2,
    model_type="gpt_bigcode",
    hf_class="GPTBigCodeForCausalLM",
    also=(),
    block=replace(GPT2.block, qkv_layout=GROUPS),
    config={"use_attn_scale": "scale_attn_weights"},
    variants={},
)
CTRL = replace(
    GPT2,
    model_type="ctrl",
    hf_class="CTRLLMHeadModel",
    also=(),
    embed="transformer.w",
    embed_factor="transformer.d_model_size",
    embed_factor_power=0.5,
    pos_embed=None,
    embed_extra="sines and cosines of the position are added",
    ln_final="transformer.layernorm",
    block=Block(
        ln1="layernorm1",
        attn="multi_head_attention",
        q="multi_head_attention.Wq",
        k="multi_head_attention.Wk",
        v="multi_head_attention.Wv",
        o="multi_head_attention.dense",
        ln2="layernorm2",
        mlp="ffn",
        gate=None,
        mlp_in="ffn.0",
        mlp_out="ffn.2",
        rotary=False,
    ),
    config={},
    constants={"act_fn": "relu"},
    variants={},
    refused={},
)
GPT = replace(
    GPT2,
    model_type="openai-gpt",
    hf_class="OpenAIGPTLMHeadModel",
    also=(),
    embed="transformer.tokens_embed",
    pos_embed="transformer.positions_embed",
    ln_final=None,
    key_value_cache="none",
    # What is called gelu there is GPT-2's.
    config={"act_fn": "afn"},
    block=replace(GPT2.block, post_norm=True, softmax=Softmax(call="self__attn", mask=-1e4)),
    variants={"afn=gelu": {"config": {}, "constants": {"act_fn": "gelu_new"}}},
    refused={},
)
MPT = Architecture(
    model_type="mpt",
    hf_class="MptForCausalLM",
    embed="transformer.wte",
    layers="transformer.blocks",
    ln_final="transformer.norm_f",
    block=Block(
        ln1="norm_1",
        attn="attn",
        qkv="attn.Wqkv",
        o="attn.out_proj",
        ln2="norm_2",
        mlp="ffn",
        gate=None,
        mlp_in="ffn.up_proj",
        mlp_out="ffn.down_proj",
        mlp_branch="ffn.down_proj",
        rotary=False,
        softmax=Softmax(call=None),
    ),
    norm="LN",
    constants={"act_fn": "gelu", "positional_embedding_type": "alibi"},
    refused={"attn_config.clip_qkv": "queries, keys and values are clipped after TransformerLens' points"},
)
