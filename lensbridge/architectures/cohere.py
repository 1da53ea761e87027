"""Command R (Cohere 2024), Command R7B and Command A (Cohere 2024, 2025), Compass (Cohere 2025).

- attention and MLP read one LayerNorm of the same stream, without a bias; a factor on the logits
- Command R: rotation pairs neighbouring dimensions; a norm of queries and keys, with a gain for each head, is an option
- Cohere 2, Compass: local attention with rotation and global attention without in turn
"""

from dataclasses import replace

from .record import Architecture, Block

COHERE = Architecture(
    model_type="cohere",
    hf_class="CohereForCausalLM",
    block=Block(ln2="input_layernorm", parallel=True),
    after_unembed="factor",
    norm="LN",
    constants={"rotary_adjacent_pairs": True},
)
COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    hf_class="Cohere2ForCausalLM",
    by_layer={"layer_types": {"full_attention": {"rotary": False}}},
)
#: Its config says for each kind of layer whether it rotates.
COHERE_COMPASS = replace(COHERE, model_type="cohere_compass_text", hf_class="CohereCompassForCausalLM", constants={})
