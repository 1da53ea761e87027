"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

- sequential blocks, LayerNorm before each branch and at the end; learned positions added to the token embedding
- q, k and v in one Conv1D ``c_attn`` with the blocks [q | k | v]; plain MLP
- output head tied to the token embedding (or not), without bias
"""

from .record import Architecture, Block, Softmax

GPT2 = Architecture(
    model_type="gpt2",
    hf_class="GPT2LMHeadModel",
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
