"""DeepSeek 2 and 3 (DeepSeek-AI 2024) and other families with latent attention.

- Llama's block; queries and keys are made from a latent vector of low rank and have a rotated and an unrotated part, so
  that no projection of the stream gives them; a value has another size than a key; mixtures of experts
"""

from dataclasses import replace

from .record import Architecture, Block

LATENT = Block(q=None, k=None, v=None)
DEEPSEEK2 = Architecture(model_type="deepseek_v2", hf_class="DeepseekV2ForCausalLM", block=LATENT)
DEEPSEEK3 = replace(DEEPSEEK2, model_type="deepseek_v3", hf_class="DeepseekV3ForCausalLM")
DEEPSEEK32 = replace(DEEPSEEK2, model_type="deepseek_v32", hf_class="DeepseekV32ForCausalLM")
AXK1 = replace(DEEPSEEK2, model_type="axk1", hf_class="AXK1ForCausalLM")
GLM4_MOE_LITE = replace(DEEPSEEK2, model_type="glm4_moe_lite", hf_class="Glm4MoeLiteForCausalLM")
GLM_MOE_DSA = replace(
    DEEPSEEK2,
    model_type="glm_moe_dsa",
    hf_class="GlmMoeDsaForCausalLM",
    rereads="a layer may attend to the positions that an earlier one has chosen",
)
#: Adds a constant times what a branch returns, and divides the last norm's output.
MINICPM3 = replace(
    DEEPSEEK2,
    model_type="minicpm3",
    hf_class="MiniCPM3ForCausalLM",
    embed_scale="embed_scale",
    block=replace(LATENT, attn_factor="residual_scale", mlp_factor="residual_scale"),
    unembed_divisor="config.logits_scaling",
)
#: A gate behind each norm, and one on what the heads read.
AXK2 = replace(
    DEEPSEEK2,
    model_type="axk2",
    hf_class="AXK2ForCausalLM",
    block=replace(LATENT, z_from_call=True, gated_norms=True),
    kinds={
        "input_layernorm.norm": {"ln1": "input_layernorm.norm"},
        "post_attention_layernorm.norm": {"ln2": "post_attention_layernorm.norm"},
    },
)
YOUTU = replace(DEEPSEEK2, model_type="youtu", hf_class="YoutuForCausalLM")
