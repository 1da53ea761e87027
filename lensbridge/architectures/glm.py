"""GLM (Zeng et al. 2024), GLM-4 (2025).

- Llama's block with gate and up in one projection; rotation of a part of each head, pairing neighbouring dimensions
- GLM-4: a norm of what attention and the MLP add, besides those before them
"""

from dataclasses import replace

from .record import Architecture, Block

GLM = Architecture(
    model_type="glm",
    hf_class="GlmForCausalLM",
    block=Block(gate=None, mlp_in="mlp.gate_up_proj", gate_up=True),
    constants={"rotary_adjacent_pairs": True},
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    hf_class="Glm4ForCausalLM",
    block=replace(GLM.block, ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
)
