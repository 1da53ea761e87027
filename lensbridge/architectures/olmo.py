"""OLMo 1, 2 and 3 (Groeneveld et al. 2024, OLMo Team 2025) and EXAONE 4 (LG AI Research 2025).

- OLMo: Llama's block with LayerNorms that have neither gain nor bias; queries, keys and values may be clipped
- OLMo 2 and 3: norms stand behind attention and MLP instead of before them, and over all queries and all keys; OLMo 3
  has local and global attention in turn
- EXAONE 4: so do its norms, but those of queries and keys are over each head; where some of its layers are local, only
  they rotate
"""

from dataclasses import replace

from .record import Architecture, Block

OLMO = Architecture(
    model_type="olmo",
    hf_class="OlmoForCausalLM",
    norm="LN",
    norm_eps=1e-5,
    config={"clip_qkv": "clip_qkv"},
    variants={"clip_qkv": {"clips": True}},
)
OLMO2 = Architecture(
    model_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    block=Block(
        ln1=None,
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qk_norm_over="all",
        ln1_post="post_attention_layernorm",
        ln2=None,
        ln2_post="post_feedforward_layernorm",
    ),
)
OLMO3 = replace(OLMO2, model_type="olmo3", hf_class="Olmo3ForCausalLM")
EXAONE4 = replace(
    OLMO2,
    model_type="exaone4",
    hf_class="Exaone4ForCausalLM",
    block=replace(OLMO2.block, qk_norm_over="head", qk_norm_heads_first=True),
    variants={"sliding_window": {"by_layer": {"layer_types": {"full_attention": {"rotary": False}}}}},
)
