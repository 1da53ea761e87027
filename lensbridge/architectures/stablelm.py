"""StableLM (Bellagente et al. 2024).

- Llama's block with LayerNorms; rotary positions on a part of each head; parallel attention and MLP, and a norm of each
  head's queries and keys with a gain of its own for each head, are options
"""

from .irregular import STAYS_CAUSAL
from .record import Architecture, Block

STABLELM = Architecture(
    model_type="stablelm",
    hf_class="StableLmForCausalLM",
    block=Block(qk_norm_heads_first=True),
    norm="LN",
    refused=STAYS_CAUSAL,
    variants={"use_parallel_residual": {"parallel": True, "ln2": "input_layernorm"}},
)
