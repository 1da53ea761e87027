"""Falcon (Almazrouei et al. 2023).

- LayerNorms; one projection that holds for each key-value head (7B: one for all queries) its queries, its key and its
  value; plain MLP
- attention and MLP read one norm of the same stream, or with ``new_decoder_architecture`` (40B, 180B) one each; RW
  models are sequential
- rotary positions or ALiBi (Press et al. 2022); the sum of both branches is made in place of the MLP's output
"""

from .forms import GROUPS, Softmax
from .record import Architecture, Block

ROTARY = Softmax(call=None, queries="apply_rotary_pos_emb", keys="key_layer_transpose")

FALCON = Architecture(
    model_type="falcon",
    hf_class="FalconForCausalLM",
    embed="transformer.word_embeddings",
    layers="transformer.h",
    ln_final="transformer.ln_f",
    block=Block(
        attn="self_attention",
        qkv="self_attention.query_key_value",
        qkv_layout=GROUPS,
        o="self_attention.dense",
        ln2="input_layernorm",
        gate=None,
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        softmax=ROTARY,
    ),
    kinds={
        "post_attention_layernorm": {"ln2": "post_attention_layernorm"},
        "ln_attn": {"ln1": "ln_attn", "ln2": "ln_mlp"},
    },
    variants={
        "parallel_attn": {"parallel": True},
        "new_decoder_architecture": {"parallel": True},
        "alibi": {"rotary": False, "softmax": Softmax(call=None)},
    },
    norm="LN",
)
