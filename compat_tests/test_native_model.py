"""Is a native model, with any field of its config, the model that TransformerLens 3.9.0 makes of it?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compat_tests.native_models import agree_in_a_run, agree_in_gradients, native_pair
from lensbridge.utilities.activation_functions import SUPPORTED_ACTIVATIONS

LOCAL = {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]}
ROTARY = {"positional_embedding_type": "rotary"}
MOE = {"num_experts": 4, "experts_per_token": 2, "act_fn": "silu"}
ALL_INPUTS = {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True}
YARN = ROTARY | {
    "use_yarn_rope": True,
    "yarn_factor": 4.0,
    "yarn_original_max_position_embeddings": 6,
    "yarn_beta_fast": 4.0,
    "yarn_beta_slow": 0.25,
}
NTK = ROTARY | {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 20}

#: One name per combination of fields; every field that changes what is computed occurs at least twice.
GRID: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention only": {"attn_only": True},
    "attention only, no norm, with results": {"attn_only": True, "normalization_type": None, "use_attn_result": True},
    "no norm": {"normalization_type": None},
    "LNPre": {"normalization_type": "LNPre"},
    "RMS": {"normalization_type": "RMS"},
    "RMSPre": {"normalization_type": "RMSPre"},
    "final RMS": {"final_rms": True},
    "final RMS without gain": {"final_rms": True, "normalization_type": "LNPre"},
    "eps": {"eps": 1e-1},
    "eps under RMS": {"eps": 1e-2, "normalization_type": "RMS"},
    **{f"act {name}": {"act_fn": name, "n_layers": 1} for name in SUPPORTED_ACTIVATIONS},
    "solu_ln under LNPre": {"act_fn": "solu_ln", "normalization_type": "LNPre"},
    "solu_ln under RMS": {"act_fn": "solu_ln", "normalization_type": "RMS"},
    "solu_ln without norm": {"act_fn": "solu_ln", "normalization_type": None},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "gated solu_ln": {"gated_mlp": True, "act_fn": "solu_ln"},
    "gated xielu": {"gated_mlp": True, "act_fn": "xielu", "normalization_type": "RMS"},
    "d_mlp": {"d_mlp": 7},
    "experts": MOE,
    "experts with weights that sum to one": MOE | {"norm_topk_prob": True, "normalization_type": "RMS"},
    "one expert": {"num_experts": 1, "experts_per_token": 1, "act_fn": "gelu_new", "norm_topk_prob": True},
    "many idle experts": {"num_experts": 9, "experts_per_token": 1, "act_fn": "relu"},
    "experts of GPT-OSS": MOE
    | ROTARY
    | {"original_architecture": "GptOssForCausalLM", "use_attention_sinks": True, "normalization_type": "RMS"},
    "idle experts of GPT-OSS": MOE | {"original_architecture": "GptOssForCausalLM", "num_experts": 11},
    "sinks": {"use_attention_sinks": True},
    "rotary": ROTARY,
    "rotary part": ROTARY | {"rotary_dim": 2},
    "rotary adjacent": ROTARY | {"rotary_adjacent_pairs": True},
    "rotary adjacent part": ROTARY | {"rotary_adjacent_pairs": True, "rotary_dim": 2, "rotary_base": 100},
    "rotary base": ROTARY | {"rotary_base": 30.0},
    "rotary local base": ROTARY | LOCAL | {"rotary_base_local": 10.0, "rotary_base": 500},
    "rotary scaled": ROTARY | LOCAL | {"rotary_scaling_factor": 8.0, "rotary_base_local": 7},
    "rotary scaled, all global": ROTARY | {"rotary_scaling_factor": 3.0, "d_head": 6},
    "NTK by parts": NTK | {"d_head": 12, "n_heads": 2},
    "NTK by parts, other factors": NTK
    | {
        "d_head": 12,
        "n_heads": 1,
        "NTK_by_parts_low_freq_factor": 0.5,
        "NTK_by_parts_high_freq_factor": 2.0,
        "NTK_by_parts_factor": 3.0,
        "NTK_original_ctx_len": 50,
    },
    "NTK by parts, other ramp": NTK
    | {
        "d_head": 12,
        "n_heads": 1,
        "NTK_by_parts_low_freq_factor": 0.25,
        "NTK_by_parts_high_freq_factor": 3.0,
        "NTK_by_parts_factor": 5.0,
        "NTK_original_ctx_len": 30,
    },
    "YaRN, other ramp": YARN | {"d_head": 12, "n_heads": 2, "yarn_beta_fast": 9.0},
    "YaRN": YARN | {"d_head": 12, "n_heads": 2},
    "YaRN, ramp of no width": YARN | {"yarn_beta_slow": 1.0, "yarn_attention_factor": 1.1},
    "YaRN, not truncated": YARN | {"d_head": 12, "n_heads": 2, "yarn_truncate": False, "yarn_attention_factor": 1.3},
    "YaRN, global layers": YARN | LOCAL | {"yarn_global_attn_only": True, "yarn_attention_factor": 0.8},
    "YaRN, not global layers only": YARN | LOCAL | {"yarn_global_attn_only": False, "yarn_truncate": False},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "shortformer with split inputs": {"positional_embedding_type": "shortformer", "use_split_qkv_input": True},
    "shortformer with attention input": {"positional_embedding_type": "shortformer", "use_attn_in": True},
    "alibi": {"positional_embedding_type": "alibi"},
    "alibi, five heads": {"positional_embedding_type": "alibi", "n_heads": 5, "attn_scores_soft_cap": 4.0},
    "bidirectional": {"attention_dir": "bidirectional"},
    "bidirectional alibi": {"attention_dir": "bidirectional", "positional_embedding_type": "alibi"},
    "local": LOCAL,
    "local first": LOCAL | {"attn_types": ["local", "local"], "window_size": 2, "normalization_type": None},
    "wide window": LOCAL | {"window_size": 40},
    "window without local attention": {"window_size": 2},
    "parallel": {"parallel_attn_mlp": True},
    "parallel rotary": ROTARY | {"parallel_attn_mlp": True, "normalization_type": "RMS", "use_hook_mlp_in": True},
    "groups": {"n_key_value_heads": 1},
    "groups ungrouped": {"n_heads": 4, "n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
    "groups with split inputs": {"n_heads": 4, "n_key_value_heads": 2, "use_split_qkv_input": True},
    "groups ungrouped, split": {
        "n_heads": 4,
        "n_key_value_heads": 2,
        "use_split_qkv_input": True,
        "ungroup_grouped_query_attention": True,
    },
    "groups, rotary, query-key norms": ROTARY | {"n_heads": 4, "n_key_value_heads": 2, "use_qk_norm": True},
    "query-key norms": {"use_qk_norm": True},
    "attention scale": {"attn_scale": 0.7},
    "no attention scale": {"use_attn_scale": False},
    "attention scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "attention scale by layer, unscaled": {"scale_attn_by_inverse_layer_idx": True, "use_attn_scale": False},
    "softcap on scores": {"attn_scores_soft_cap": 1.5},
    "softcap on logits": {"output_logits_soft_cap": 1.5},
    "both softcaps": {"attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 0.5, "normalization_type": "RMS"},
    "no softcaps": {"attn_scores_soft_cap": 0.0, "output_logits_soft_cap": -2.0},
    "norms before and after": {"normalization_type": "RMS", "use_normalization_before_and_after": True},
    "norms before and after, RMSPre": {"normalization_type": "RMSPre", "use_normalization_before_and_after": True},
    "norms before and after, none": {"normalization_type": None, "use_normalization_before_and_after": True},
    "norms before and after, parallel": {
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "parallel_attn_mlp": True,
    },
    "d_vocab_out": {"d_vocab_out": 3},
    "d_vocab_out, attention only": {"d_vocab_out": 40, "attn_only": True},
    "normed embeddings": {"post_embedding_ln": True},
    "normed embeddings, alibi": {"post_embedding_ln": True, "positional_embedding_type": "alibi"},
    "clipped": {"clip_qkv": 0.5},
    "clipped rotary": ROTARY | {"clip_qkv": 0.8, "normalization_type": None},
    "all inputs": ALL_INPUTS,
    "all inputs, attention only": {"attn_only": True, "use_split_qkv_input": True, "use_attn_result": True},
    "attention input": {"use_attn_in": True, "use_attn_result": True},
    "attention input and split": {"use_attn_in": True, "use_split_qkv_input": True},
    "attention input, rotary": ROTARY | {"use_attn_in": True},
    "tokens": {"use_hook_tokens": True},
    "tokens, rotary": ROTARY | {"use_hook_tokens": True},
    "OLMo 2": ROTARY | {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS"},
    "OLMo 2, split": {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS", **ALL_INPUTS},
    "OLMo 3": YARN
    | LOCAL
    | {"original_architecture": "Olmo3ForCausalLM", "normalization_type": "RMS", "n_heads": 3, "n_key_value_heads": 1},
    "OLMoE": MOE | ROTARY | {"original_architecture": "OlmoeForCausalLM", "normalization_type": "RMS", "clip_qkv": 1.0},
    "log-n": {"use_logn_attn": True, "train_seq_length": 4},
    "log-n, rotary": ROTARY | {"use_logn_attn": True, "train_seq_length": 5, "use_dynamic_ntk_rope": True},
    "dynamic NTK": ROTARY | {"use_dynamic_ntk_rope": True, "train_seq_length": 3},
    "dynamic NTK, never needed": ROTARY | {"use_dynamic_ntk_rope": True},
    "one head": {"n_heads": 1, "d_head": 5},
    "wide heads": {"n_heads": 2, "d_head": 9},
    "no layers": {"n_layers": 0},
    "what nothing reads": {
        "uses_rms_norm": True,
        "layer_norm_folding": True,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 3,
        "relative_attention_max_distance": 9,
        "relative_attention_num_buckets": 4,
        "trust_remote_code": True,
        "model_name": "mine",
        "from_checkpoint": True,
        "checkpoint_index": 2,
        "checkpoint_label_type": "step",
        "checkpoint_value": 512,
    },
    "what nothing reads, RMS": ROTARY
    | {
        "normalization_type": "RMSPre",
        "uses_rms_norm": False,
        "layer_norm_folding": True,
        "tie_word_embeddings": True,
        "trust_remote_code": True,
        "experts_per_token": None,
    },
    "float64": {"dtype": torch.float64},
    "float64 rotary": ROTARY | {"dtype": torch.float64, "normalization_type": "RMS", "use_split_qkv_input": True},
}

TOKENS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("name", GRID)
def test_values_at_every_hook_point(name: str) -> None:
    pair = native_pair(**GRID[name])
    agree_in_a_run(pair, TOKENS)
    agree_in_a_run(pair, TOKENS[:1, :1])
    agree_in_a_run(pair, TOKENS, LEFT_PADDED)


@pytest.mark.parametrize("name", GRID)
def test_gradients(name: str) -> None:
    agree_in_gradients(native_pair(**GRID[name]), TOKENS)


@pytest.mark.parametrize("name", ["log-n", "log-n, rotary", "dynamic NTK", "plain"])
def test_training_mode(name: str) -> None:
    """What depends on the length of the input does so in evaluation mode only."""
    pair = native_pair(**GRID[name])
    for model in (pair.mine, pair.theirs):
        model.train()
    agree_in_a_run(pair, TOKENS)
    agree_in_gradients(pair, TOKENS)
