"""Granite (IBM 2024), HyperCLOVA X (Yoo et al. 2024) and their relatives with maximal update parametrisation.

- Llama's block with factors, all of them in the config (Yang et al. 2022): on the embedding, on what attention and the
  MLP add, on scores and on logits
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
