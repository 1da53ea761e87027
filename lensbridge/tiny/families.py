"""What is special about a family, that the general rules for tiny configs cannot know?

Data only. A key is a transformers ``model_type``, or ``model_type@variant`` for checkpoints of the same class that run
another path through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class _Derived:
    """Marks an entry that the config's class works out from others."""

    def __repr__(self) -> str:
        return "DERIVED"


DERIVED: Final = _Derived()


@dataclass(frozen=True)
class Family:
    """What a tiny config of one family needs besides the rules.

    ``base`` are options of the full-size config (needed to build it at all, or what makes a variant); ``set`` are
    entries of the tiny one, nested for nested configs, where ``DERIVED`` leaves an entry to the config's class.
    """

    base: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

SPECIAL: dict[str, Family] = {
    "bamba": Family(base={"attn_layer_indices": [1]}, set=_MAMBA2),
    "codegen": Family(set={"n_head": 8, "rotary_dim": 4}),
    "cohere_compass_text": Family(
        set={
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        }
    ),
    "dbrx": Family(
        set={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 1.5},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v2": Family(set={"num_experts_per_tok": 2, "first_k_dense_replace": 1}),
    "dots1": Family(
        set={"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    ),
    "falcon_h1": Family(set=_MAMBA2 | {"mamba_d_ssm": 128}),
    "granitemoehybrid": Family(set=_MAMBA2 | {"layer_types": ["linear_attention", "full_attention"]}),
    "hunyuan_v1_dense": Family(set={"head_dim": 16}),
    "hunyuan_v1_moe": Family(set={"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "jamba": Family(set={"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 0}),
    "lfm2": Family(set={"layer_types": ["conv", "full_attention"], "full_attn_idxs": DERIVED}),
    "lfm2_moe": Family(
        set={"num_hidden_layers": 4, "num_dense_layers": 2, "layer_types": ["conv", "full_attention"] * 2}
    ),
    "mamba2": Family(set={"num_heads": 8}),
    "ministral": Family(set={"head_dim": 16}),
    "musicgen": Family(set={"decoder": {"num_codebooks": 1}}),
    "musicgen_melody": Family(set={"decoder": {"num_codebooks": 1}}),
    "nemotron": Family(set={"num_key_value_heads": 2, "head_dim": 16}),
    "qwen4_exp": Family(set={"text_config": _INDEXER}),
    "qwen4_exp_text": Family(set=_INDEXER),
    "recurrent_gemma": Family(set={"block_types": ["recurrent", "attention"]}),
    "reformer": Family(
        set={
            "axial_pos_embds_dim": (32, 32),
            "axial_pos_shape": (8, 8),
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
        }
    ),
    "xmod": Family(base={"default_language": "en_XX"}),
    "zamba": Family(
        set={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        }
    ),
    "zamba2": Family(
        set={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "attention_hidden_size": DERIVED,
            "attention_head_dim": DERIVED,
            "mamba_headdim": DERIVED,
            "kv_channels": DERIVED,
            "num_query_groups": DERIVED,
            "hybrid_layer_ids": DERIVED,
        }
    ),
    "zaya": Family(set={"num_experts_per_tok": 1}),
}
VARIANTS: dict[str, Family] = {
    "falcon@new_decoder": Family(base={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon@alibi_sequential": Family(
        base={"alibi": True, "parallel_attn": False, "multi_query": False}, set={"num_kv_heads": 4}
    ),
    "gpt_neox@sequential": Family(base={"use_parallel_residual": False}),
    "stablelm@parallel": Family(base={"use_parallel_residual": True}),
    "stablelm@qk_layernorm": Family(base={"qk_layernorm": True}),
    "opt@post_norm_projected": Family(base={"do_layer_norm_before": False}, set={"word_embed_proj_dim": 32}),
    "gpt_bigcode@multi_head": Family(base={"multi_query": False}),
    "bloom@residual_after_norm": Family(base={"apply_residual_connection_post_layernorm": True}),
    "gpt2@upcast": Family(base={"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "cohere@qk_norm": Family(base={"use_qk_norm": True}),
}
#: Families without a tiny model, and why.
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower is timm's; gemma3n_text is the language model alone",
    "gemma4_assistant": "a draft head that reads another model's hidden states and keys",
    "gemma4_unified_assistant": "a draft head that reads another model's hidden states and keys",
}


def _families() -> dict[str, Family]:
    """Every causal-LM family of the installed transformers that can be built, and the variants."""
    plain = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE]
    keys = [*plain, *(key for key in VARIANTS if key.partition("@")[0] in plain)]
    return {key: VARIANTS.get(key) or SPECIAL.get(key) or Family() for key in sorted(keys)}


#: Every family that can be built, with what is special about it.
FAMILIES: dict[str, Family] = _families()
