"""How large is each part of a tiny model?

Configs name the same quantity in many ways; a rule gives one size to all names of one kind. The sizes differ from each
other wherever a family allows it, so that two dimensions that are mixed up do not fit.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY, POSITIONS = 64, 4, 2, 16, 96, 128, 64
#: Longer than the window, shorter than twelve tokens: positions beyond it are seen in a short text.
ORIGINAL_POSITIONS = 8
#: A token that any vocabulary here has, for special tokens that would lie beyond it.
SPECIAL_TOKEN = 3
#: How the names of special tokens end.
TOKENS = ("_token_id", "_token_index")

#: (names, size), the first match counts. A size that is a function is given the value it replaces.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"(hidden_size(_global)?|d_model|n_embd|dim_model|emb_dim|embed_dim|lru_width|hidden_dim|projection_dim)", WIDTH),
    (r"(.*_hidden_size|adapter_(in|out)_dim|adapter_input_size|(shape|pronunciation)_embed_dim)", WIDTH),
    (r"(num_global_key_value_heads|indexer_kv_heads)", 1),
    (r"(.*(key_value|kv)_heads(_per_layer)?|kv_n_heads)", lambda old: 1 if old == 1 else KV_HEADS),
    (r"(mamba_n_heads|mamba_num_heads)", 2 * HEADS),
    (r"(n_heads?|num_query_groups|(.*_)?(num_)?(attention_|index_n_)?heads(_per_layer)?|indexer_n_heads)", HEADS),
    (r"(linear_key_head_dim|qk_rope_head_dim|rotary_dim|d_rel)", HEAD_DIM // 2),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"(.*head_?dim|.*head_size|d_head|d_kv|dim_head|kv_channels|mamba_d_head)", HEAD_DIM),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(ssm_state_size|state_size|mamba_d_state|mamba_dt_rank|time_step_rank)", 8),
    (r"(.*chunk_size|.*_chunk_length|index_topk|block_size|indexer_budget|keep_window_size)", 8),
    (r"(sliding_window(_size)?|attention_window_size|local_attention|window_size|rel_extent)", 6),
    (r"(.*_lora_rank|moe_latent_size|hidden_size_per_layer_input|ple_embed_dim)", 16),
    (r"(laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank)", 8),
    (r"(.*moe.*intermediate_size|expert_ffn_hidden_size|shared_.*intermediate_size)", 48),
    (r"(.*intermediate_size(_mlp)?|.*ffn_dim|n_inner|dff|d_ff|d_inner|ffn_hidden_size|feed_forward_size|dim_ff)", MLP),
    (r"(n_|num_|moe_num_|num_local_|n_routed_)?(local_)?experts", 4),
    (r"(index_block_size|index_topk_blocks|zero_expert_num)", 2),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", lambda old: min(old, 2)),
    (r"(n_group|num_expert_group|mamba_n_?groups|n_groups|o_groups|n_shared_experts)", lambda old: min(old, 2)),
    (r"topk_group", 1),
    (r"((?!type_|task_type_).*vocab_size(_base|_per_layer_input)?|encoder_hash_byte_group_vocab)", VOCABULARY),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions)", POSITIONS),
    (r"(model_max_length|context_length)", POSITIONS),
    (r"(original_max_position_embeddings|floor_scale|log_scaling_n_floor)", ORIGINAL_POSITIONS),
    (r"(num_nextn_predict_layers|num_mtp_layers)", 0),
    (r"query_pre_attn_scalar", 24),
    (r".*soft_?cap(ping)?", 5.0),
    (r"(.*dropout.*|.*_pdrop|.*layerdrop)", 0.0),
    (r"image_size", 32),
    (r"patch_size", 16),
)
_COMPILED = tuple((re.compile(names), size) for names, size in _RULES)

#: Multipliers that are neutral unless a checkpoint sets them: what each is here, so that it shows where it acts.
VISIBLE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 0.9,
    "ssm_out_multiplier": 1.2,
    "mlp_multipliers": (1.5, 0.6),
    "ssm_multipliers": (0.8, 1.2, 0.9, 1.1, 0.7),
    "routed_scaling_factor": 1.7,
    "moe_routed_scaling_factor": 1.7,
    "route_scale": 1.7,
    "scale_embedding": True,
    "full_attn_alpha_factor": 2.0,
    "full_attn_beta_factor": 0.5,
    "linear_attn_alpha_factor": 1.5,
    "linear_attn_beta_factor": 0.7,
    "mlp_alpha_factor": 1.8,
    "mlp_beta_factor": 0.6,
}


def size_of(name: str, value: Any) -> Any:
    """The tiny value of one entry of a config: ``value`` itself where no rule knows the name.

    What is switched off (None, 0, False) stays off, except a multiplier that is neutral.
    """
    if name in VISIBLE:
        several = isinstance(value, (list, tuple))
        if value is False or (isinstance(value, (int, float)) and value == 1):
            return VISIBLE[name]
        return type(value)(VISIBLE[name]) if several and all(entry == 1 for entry in value) else value
    if name.endswith(TOKENS):
        return _special(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0:
        return value
    for names, size in _COMPILED:
        if names.fullmatch(name):
            return size(value) if callable(size) else size
    return value


def related(config: PreTrainedConfig) -> dict[str, Any]:
    """The entries whose tiny size depends on how the large ones compare: what was different stays different."""
    values = vars(config)
    tiny: dict[str, Any] = {}

    def smaller(name: str, than: str, size: int, else_size: int) -> None:
        if isinstance(values.get(name), int) and isinstance(values.get(than), int):
            tiny[name] = size if values[name] < values[than] else else_size

    width = getattr(config, "hidden_size", None)
    for name in ("embedding_size", "input_embedding_size", "output_embedding_size", "word_embed_proj_dim"):
        if isinstance(values.get(name), int):  # embeddings with a width of their own are projected to the model's
            tiny[name] = WIDTH if values[name] == width else WIDTH // 2
    smaller("linear_num_key_heads", "linear_num_value_heads", KV_HEADS, HEADS)
    smaller("num_key_value_heads", "swa_num_key_value_heads", KV_HEADS // 2, KV_HEADS)
    smaller("rotary_dim", "head_dim", HEAD_DIM // 2, HEAD_DIM)
    if values.get("n_inner", 0) is None:
        tiny["n_inner"] = MLP
    if values.get("kv_lora_rank") is not None:
        if "num_key_value_heads" in values:  # latent attention has as many keys as queries
            tiny["num_key_value_heads"] = HEADS
        if values.get("head_dim") is not None and values["head_dim"] == values.get("qk_rope_head_dim"):
            tiny["head_dim"] = HEAD_DIM // 2
    else:
        smaller("v_head_dim", "head_dim", HEAD_DIM // 2, HEAD_DIM)
        smaller("swa_v_head_dim", "swa_head_dim", HEAD_DIM // 2, HEAD_DIM)
    if "is_decoder" in values and not config.is_encoder_decoder:
        tiny["is_decoder"] = True
    return tiny


def rope(parameters: Any, config: PreTrainedConfig) -> Any:
    """The parameters of rotary embeddings, with as many frequencies as a tiny head has."""
    if not isinstance(parameters, dict):
        return parameters
    latent = vars(config).get("qk_rope_head_dim") is not None
    partial = parameters.get("partial_rotary_factor") or vars(config).get("partial_rotary_factor") or 1.0
    frequencies = HEAD_DIM // 4 if latent else int(HEAD_DIM * partial) // 2
    tiny: dict[str, Any] = {}
    for name, value in parameters.items():
        if name == "mrope_section":
            third = frequencies // len(value)
            tiny[name] = [frequencies - third * (len(value) - 1), *[third] * (len(value) - 1)]
        elif isinstance(value, (list, tuple)):
            tiny[name] = list(value[:frequencies])
        elif isinstance(value, dict):
            tiny[name] = rope(value, config)
        else:
            tiny[name] = size_of(name, value)
    return tiny


def _special(value: Any) -> Any:
    """A special token, or list of them, inside the tiny vocabulary."""
    if isinstance(value, (list, tuple)):
        return type(value)(_special(entry) for entry in value)
    return SPECIAL_TOKEN if isinstance(value, int) and value >= VOCABULARY else value
