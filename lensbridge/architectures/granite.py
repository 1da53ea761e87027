"""Granite (IBM 2024), HyperCLOVA X (Yoo et al. 2024) and their relatives with maximal update parametrisation.

- Llama's block with factors, all of them in the config (Yang et al. 2022): on the embedding, on what attention and the
  MLP add, on scores and on logits
- Falcon-H1 (Zuo et al. 2025): a Mamba 2 beside attention, whose output is added to attention's; more factors
- Granite with local attention: global and local in turn, rotation by layer or none; each head has a logit that takes
  part in its softmax (a sink)
- HyperCLOVA X: an option are norms of what the two add
"""

from dataclasses import replace

from .record import Architecture, Block

GRANITE = Architecture(
    model_type="granite",
    hf_class="GraniteForCausalLM",
    embed_factor="model.embedding_multiplier",
    block=Block(attn_factor="residual_multiplier", mlp_factor="residual_multiplier"),
    after_unembed="factor",
)
GRANITE_SWA = replace(
    GRANITE,
    model_type="granite_swa",
    hf_class="GraniteSWAForCausalLM",
    kinds={"self_attn": {"sinks": "self_attn.sinks", "sinks_behind": True}},
    by_layer={"layer_rope_theta": {0: {"rotary": False}, None: {"rotary": False}}},
)
HYPERCLOVAX = replace(
    GRANITE,
    model_type="hyperclovax",
    hf_class="HyperCLOVAXForCausalLM",
    variants={"use_post_norm": {"ln1_post": "post_norm1", "ln2_post": "post_norm2"}},
)
FALCON_H1 = Architecture(
    model_type="falcon_h1",
    hf_class="FalconH1ForCausalLM",
    embed_factor="model.embedding_multiplier",
    ln_final="model.final_layernorm",
    block=Block(
        ln2="pre_ff_layernorm",
        mlp="feed_forward",
        gate="feed_forward.gate_proj",
        mlp_in="feed_forward.up_proj",
        mlp_out="feed_forward.down_proj",
        attn_also="mamba",
        attn_also_factor="ssm_out_multiplier",
        attn_factor="attn_out_multiplier",
        attn_in_factor="attention_in_multiplier",
        factors={
            "k": "self_attn.key_multiplier",
            "gate": "feed_forward.gate_multiplier",
            "mlp_out": "feed_forward.down_multiplier",
        },
    ),
    after_unembed="factor",
)
