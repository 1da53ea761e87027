"""Llama (Touvron et al. 2023) and the families whose blocks are Llama's.

- sequential blocks, RMSNorm before each branch and at the end; rotary positions; grouped queries; gated MLP
"""

from .record import Architecture

LLAMA = Architecture(model_type="llama", hf_class="LlamaForCausalLM", constants={"final_rms": True})
MISTRAL = Architecture(model_type="mistral", hf_class="MistralForCausalLM")
#: Biases on queries, keys and values.
QWEN2 = Architecture(model_type="qwen2", hf_class="Qwen2ForCausalLM", constants={"final_rms": True})
#: A norm of each head's queries and keys.
QWEN3 = Architecture(model_type="qwen3", hf_class="Qwen3ForCausalLM", constants={"final_rms": True})
