"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023, Li et al. 2023), Phi-3 (Abdin et al. 2024) and Phi-4 (2024, 2025).

- Phi: attention and MLP read one LayerNorm of the same stream; rotary positions on a part of each head; plain MLP; a
  norm of each head's queries and keys is an option
- Phi-3, Phi-4: Llama's block with q, k and v in one projection, and gate and up in another
"""

from dataclasses import replace

from .record import Architecture, Block

PHI = Architecture(
    model_type="phi",
    hf_class="PhiForCausalLM",
    ln_final="model.final_layernorm",
    block=Block(
        ln2="input_layernorm",
        o="self_attn.dense",
        gate=None,
        mlp_in="mlp.fc1",
        mlp_out="mlp.fc2",
        parallel=True,
        qk_norm_heads_first=True,
    ),
    norm="LN",
)
PHI3 = Architecture(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    block=Block(qkv="self_attn.qkv_proj", gate=None, mlp_in="mlp.gate_up_proj", gate_up=True),
)
PHI4_MULTIMODAL = replace(PHI3, model_type="phi4_multimodal", hf_class="Phi4MultimodalForCausalLM")
