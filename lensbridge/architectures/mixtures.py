"""Mixtures of experts whose block is Llama's but for the MLP.

- Qwen 2 and 3 with experts (2024, 2025), dots.llm1 (2025), ERNIE 4.5 with experts (2025), GLM-4.5 (2025), Hy 3 (2026),
  Mellum 2 (2026), MiniMax M2 (2025), Phi-3.5 with experts (Abdin et al. 2024), Solar Open (2026), Aria (Li et al. 2024)
"""

from dataclasses import replace

from .olmo import OLMO2
from .record import Architecture, Block

QWEN2_MOE = Architecture(model_type="qwen2_moe", hf_class="Qwen2MoeForCausalLM")
QWEN3_MOE = Architecture(model_type="qwen3_moe", hf_class="Qwen3MoeForCausalLM")
DOTS1 = Architecture(model_type="dots1", hf_class="Dots1ForCausalLM")
ERNIE4_5_MOE = Architecture(
    model_type="ernie4_5_moe", hf_class="Ernie4_5_MoeForCausalLM", constants={"rotary_adjacent_pairs": True}
)
GLM4_MOE = Architecture(model_type="glm4_moe", hf_class="Glm4MoeForCausalLM")
HY3 = Architecture(model_type="hy_v3", hf_class="HYV3ForCausalLM", block=Block(qk_norm_heads_first=True))
MELLUM = Architecture(model_type="mellum", hf_class="MellumForCausalLM")
SOLAR_OPEN = Architecture(model_type="solar_open", hf_class="SolarOpenForCausalLM")
ARIA_TEXT = Architecture(model_type="aria_text", hf_class="AriaTextForCausalLM")
#: A norm over all queries and over all keys.
MINIMAX_M2 = Architecture(model_type="minimax_m2", hf_class="MiniMaxM2ForCausalLM", block=Block(qk_norm_over="all"))
FLEX_OLMO = replace(OLMO2, model_type="flex_olmo", hf_class="FlexOlmoForCausalLM")
PHIMOE = Architecture(model_type="phimoe", hf_class="PhimoeForCausalLM", norm="LN")
