"""GPT-NeoX (Black et al. 2022), Pythia among them (Biderman et al. 2023), and GPT-NeoX-Japanese (abeja 2022).

- LayerNorms; attention and MLP read the same stream unless ``use_parallel_residual`` is off; rotary positions on a part
  of each head; one projection that holds the query, key and value of a head next to each other; plain MLP
- GPT-NeoX-Japanese: sequential; the last layer adds the bias of what its attention writes itself, the others have none
"""

from dataclasses import replace

from .forms import GROUPS, Softmax
from .record import Architecture, Block

GPT_NEOX = Architecture(
    model_type="gpt_neox",
    hf_class="GPTNeoXForCausalLM",
    embed="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    ln_final="gpt_neox.final_layer_norm",
    block=Block(
        attn="attention",
        qkv="attention.query_key_value",
        qkv_layout=GROUPS,
        o="attention.dense",
        gate=None,
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
    ),
    norm="LN",
    variants={"use_parallel_residual": {"parallel": True}},
)
GPT_NEOX_JAPANESE = replace(
    GPT_NEOX,
    model_type="gpt_neox_japanese",
    hf_class="GPTNeoXJapaneseForCausalLM",
    embed="gpt_neox_japanese.embed_in",
    layers="gpt_neox_japanese.layers",
    ln_final="gpt_neox_japanese.final_layer_norm",
    unembed="embed_out",
    block=replace(GPT_NEOX.block, o_bias="attention.dense_bias", query_argument=0, softmax=Softmax(call="_attn")),
    variants={},
)
