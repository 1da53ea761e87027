"""Llama (Touvron et al. 2023) and the families whose blocks are Llama's.

- sequential blocks, RMSNorm before each branch and at the end; rotary positions; grouped queries; gated MLP
"""

from .record import Architecture, Block

_CONFIG = {"act_fn": "hidden_act", "eps": "rms_norm_eps"}

LLAMA = Architecture(model_type="llama", hf_class="LlamaForCausalLM", config=_CONFIG, constants={"final_rms": True})
MISTRAL = Architecture(model_type="mistral", hf_class="MistralForCausalLM", config=_CONFIG)
#: Biases on queries, keys and values.
QWEN2 = Architecture(model_type="qwen2", hf_class="Qwen2ForCausalLM", config=_CONFIG, constants={"final_rms": True})
#: A norm of each head's queries and keys.
QWEN3 = Architecture(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    block=Block(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    config=_CONFIG,
    constants={"final_rms": True},
)
