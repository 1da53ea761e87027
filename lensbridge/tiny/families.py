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
_SLIDING = ["sliding_attention", "full_attention"]
_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
_SECTIONS = {"rope_parameters": {"mrope_section": [2, 3, 3]}}
_PER_LAYER_INPUT = {"ple_layer_ids": [2], "eos_token_id": 2, "heads_per_ngram": 4}

#: By ``model_type``, of a model or of a config nested in it.
SPECIAL: dict[str, Family] = {
    "bamba": Family(base={"attn_layer_indices": [9, 18, 27]}, set=_MAMBA2),
    # The class falls back to full attention, in its first forward, where a text has few blocks.
    "big_bird": Family(set={"attention_type": "original_full"}),
    "blt": Family(set={"use_cache": False}),
    # Its fused projection has four blocks of heads.
    "codegen": Family(set={"n_head": 8, "rotary_dim": 4}),
    "cohere2_moe": Family(base={"first_k_dense_replace": 1}),
    "cohere_compass_text": Family(
        base={
            "layer_types": _SLIDING * 20,
            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        }
    ),
    "dbrx": Family(
        set={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 1.5},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v2": Family(base={"num_experts_per_tok": 6, "first_k_dense_replace": 1}),
    "deepseek_v4": Family(
        base={
            "layer_types": [
                *["sliding_attention"] * 3,
                *["heavily_compressed_attention", "compressed_sparse_attention"] * 20,
            ]
        },
        set={
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "index_topk": 2,
        },
    ),
    "dots1": Family(
        base={"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    ),
    "falcon_h1": Family(set=_MAMBA2 | {"mamba_d_ssm": 128}),
    "glm_moe_dsa": Family(base={"indexer_types": ["full"] * 3 + ["shared", "full", "shared"] * 25}),
    "got_ocr2": Family(set={"vision_config": {"output_channels": 8}}),
    "glm4v_moe_text": Family(set={"rope_parameters": {"mrope_section": [2, 1, 1]}}),
    "granite_swa": Family(base={"layer_rope_theta": [0.0, 10000.0, 10000.0, 10000.0] * 6}),
    "granitemoe_swa": Family(base={"layer_rope_theta": [0.0, 10000.0, 10000.0, 10000.0] * 8}),
    "granitemoehybrid": Family(base={"layer_types": ["linear_attention", "full_attention"] * 16}, set=_MAMBA2),
    "hrm_text": Family(set={"num_layers_per_stack": DERIVED}),
    "hunyuan_v1_dense": Family(base={"head_dim": 128}),
    "hunyuan_v1_moe": Family(base={"head_dim": 128, "num_experts": 16, "moe_topk": 8}),
    "inkling_text": Family(base={"dense_mlp_idx": 2}),
    "jamba": Family(set={"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 0}),
    "laguna": Family(
        base={
            "layer_types": ["full_attention", *["sliding_attention"] * 3] * 10,
            "num_attention_heads_per_layer": [48, *[64] * 3] * 10,
        }
    ),
    "lfm2": Family(base={"layer_types": ["conv", "full_attention"] * 16}, set={"full_attn_idxs": DERIVED}),
    "lfm2_moe": Family(base={"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}),
    "mamba2": Family(set={"num_heads": 8}),
    "mellum": Family(base={"layer_types": _SLIDING * 14}),
    "minimax_m3_vl_text": Family(
        base={
            "layer_types": [*["full_attention"] * 3, *["minimax_m3_sparse"] * 57],
            "mlp_layer_types": [*["dense"] * 3, *["sparse"] * 57],
        }
    ),
    "ministral": Family(base={"head_dim": 128, "layer_types": _SLIDING * 16}),
    "mllama": Family(set={"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}}),
    "musicgen": Family(set={"decoder": {"num_codebooks": 1}}),
    "musicgen_melody": Family(set={"decoder": {"num_codebooks": 1}}),
    "nemotron": Family(base={"head_dim": 192, "num_key_value_heads": 8}),
    **dict.fromkeys(
        ("glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
        Family(set=_SECTIONS),
    ),
    "phi4_multimodal": Family(
        set={
            "audio_config": {
                **{"nemo_conv_channels": 8, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64},
                "bias_max_distance": 8,
            }
        }
    ),
    "qwen4_exp": Family(base={"text_config": _INDEXER | _PER_LAYER_INPUT}),
    "qwen4_exp_text": Family(base=_INDEXER | _PER_LAYER_INPUT),
    "recurrent_gemma": Family(set={"block_types": ["recurrent", "attention"]}),
    "reformer": Family(
        set={
            "axial_pos_embds_dim": (32, 32),
            "axial_pos_shape": (8, 8),
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
            "hash_seed": 0,  # else no two runs are the same
        }
    ),
    # Halving the stream every so many layers is no part of its function.
    "rwkv": Family(set={"rescale_every": 0}),
    # Only smaller models map their embeddings.
    "roformer": Family(set={"embedding_size": 32}),
    # The widths of its heads are rounded up to 64 in all.
    "xlstm": Family(set={"hidden_size": 128, "embedding_dim": 128}),
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
            **dict.fromkeys(("attention_hidden_size", "attention_head_dim", "mamba_headdim"), DERIVED),
            **dict.fromkeys(("kv_channels", "num_query_groups", "hybrid_layer_ids"), DERIVED),
        }
    ),
    "zaya": Family(base={"layer_types": ["hybrid", "hybrid_sliding"] * 20, "sliding_window": 4096}),
}
#: Checkpoints of the same class that run another path through it.
VARIANTS: dict[str, Family] = {
    "bloom@residual_after_norm": Family(base={"apply_residual_connection_post_layernorm": True}),
    "cohere@qk_norm": Family(base={"use_qk_norm": True}),
    "deepseek_v3@whole_queries": Family(base={"q_lora_rank": None}),
    "doge@experts": Family(base={"is_moe": True}),
    "falcon@alibi_sequential": Family(
        base={"alibi": True, "parallel_attn": False, "multi_query": False}, set={"num_kv_heads": 4}
    ),
    "falcon@new_decoder": Family(base={"new_decoder_architecture": True, "num_kv_heads": 8}),
    "gemma4_text@experts": Family(
        base={"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    ),
    "gemma4_text@keys_as_values": Family(base={"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    "gemma4_text@shared_keys": Family(base={"num_kv_shared_layers": 18, "use_double_wide_mlp": True}),
    "gpt2@upcast": Family(base={"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode@multi_head": Family(base={"multi_query": False}),
    "gpt_neox@sequential": Family(base={"use_parallel_residual": False}),
    "granitemoehybrid@rope": Family(
        base={"layer_types": ["full_attention"] * 32, "position_embedding_type": "rope", "num_local_experts": 0},
        set=_MAMBA2,
    ),
    "inkling_text@padded": Family(base={"dense_mlp_idx": 2}, set={"unpadded_vocab_size": 120}),
    "llama@biased": Family(base={"attention_bias": True, "mlp_bias": True}),
    "llama4_text@interleaved": Family(base={"interleave_moe_layer_step": 2}),
    "olmo@clipped": Family(base={"clip_qkv": 8.0}, set={"clip_qkv": 1.5}),
    "opt@post_norm_projected": Family(base={"do_layer_norm_before": False, "word_embed_proj_dim": 512}),
    "phi@qk_layernorm": Family(base={"qk_layernorm": True}),
    "qwen2@sliding": Family(base={"use_sliding_window": True, "max_window_layers": 16}),
    "qwen3_moe@dense_first": Family(base={"mlp_only_layers": [0]}),
    "stablelm@parallel": Family(base={"use_parallel_residual": True}),
    "stablelm@qk_layernorm": Family(base={"qk_layernorm": True}),
    "xmod@pre_norm": Family(base={"default_language": "en_XX", "pre_norm": True}),
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
