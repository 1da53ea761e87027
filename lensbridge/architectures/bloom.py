"""BLOOM (BigScience 2022).

- LayerNorms, one of them behind the embedding; positions by ALiBi (Press et al. 2022), a bias on the scores; one
  projection that holds the query, key and value of a head next to each other; attention and MLP add to the stream
  themselves, or to what the norm before them returns
"""

from .block import unscaled
from .forms import GROUPS, Softmax
from .record import Architecture, Block

BLOOM = Architecture(
    model_type="bloom",
    hf_class="BloomForCausalLM",
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    layers="transformer.h",
    ln_final="transformer.ln_f",
    block=Block(
        attn="self_attention",
        qkv="self_attention.query_key_value",
        qkv_layout=GROUPS,
        o="self_attention.dense",
        gate=None,
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        attn_branch="self_attention.dense",
        mlp_branch="mlp.dense_4h_to_h",
        rotary=False,
        softmax=Softmax(call=None),
    ),
    norm="LN",
    constants={"act_fn": "gelu_fast", "positional_embedding_type": "alibi"},
    variants={"apply_residual_connection_post_layernorm": {"attn_skip": unscaled, "mlp_skip": unscaled}},
    refused={"slow_but_exact": "its projections are computed in pieces"},
)
