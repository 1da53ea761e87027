"""Mixtral (Jiang et al. 2024), OLMoE (Muennighoff et al. 2024) and GPT-OSS (OpenAI 2025).

- Mixtral: Llama's block with experts, whose weights are rescaled to sum to one
- OLMoE: norms over all queries and all keys
- GPT-OSS: local and global attention in turn; each head has a logit that takes part in its softmax (a sink); experts
  and router with biases
"""

from dataclasses import replace

from .record import Architecture, Block

MIXTRAL = Architecture(
    model_type="mixtral",
    hf_class="MixtralForCausalLM",
    block=Block(weighs_all=True),
    constants={"norm_topk_prob": True},
)
OLMOE = Architecture(
    model_type="olmoe",
    hf_class="OlmoeForCausalLM",
    block=replace(MIXTRAL.block, qk_norm_over="all"),
    config={"n_key_value_heads": "num_key_value_heads"},
    refused={"clip_qkv": "queries, keys and values are clipped after TransformerLens' points"},
)
GPT_OSS = Architecture(model_type="gpt_oss", hf_class="GptOssForCausalLM", constants={"final_rms": True})
