"""How does TransformerLens' config describe a loaded HuggingFace model?

Sizes are read off the modules, where they cannot be called two things; what only the HF config knows goes by the names
that its authors chose, which a family's record may give or which are looked for among the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from .affine import widths
from .architectures import Architecture
from .architectures.record import Block
from .parameters import first_position, position_rows
from .whole import home_of

#: TransformerLens config field -> what HF configs call it.
USUAL_NAMES: dict[str, Sequence[str]] = {
    "act_fn": (
        "hidden_activation hidden_act activation_function activation hidden_act_func mlp_hidden_act ffn_act_fn afn "
        "hidden_activation_function"
    ).split(),
    "eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon layernorm_epsilon".split(),
    "n_heads": "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads".split(),
    "n_ctx": "max_position_embeddings n_positions max_target_positions max_seq_len n_ctx model_max_length".split(),
    "num_experts": "num_local_experts num_experts n_routed_experts moe_num_experts".split(),
    "experts_per_token": "num_experts_per_tok experts_per_token moe_topk moe_top_k moe_k num_experts_per_token".split(),
}


def described(hf_model: Any, architecture: Architecture) -> dict[str, Any]:
    """Fields of a HookedTransformerConfig that say what a model is made of."""
    hf = hf_model.config.get_text_config(decoder=True)
    given = {field: attrgetter(attribute)(hf) for field, attribute in architecture.config.items()}
    fields = {field: value for field, value in given.items() if value is not None}
    fields |= {name: value for name in USUAL_NAMES if name not in fields and (value := usual(hf, name)) is not None}
    fields |= _sizes(hf_model, hf, architecture, fields)
    fields |= {name: value for name, value in _structure(hf, architecture).items() if name not in fields}
    fields |= dict(architecture.constants)
    if not fields.get("use_attn_scale", True):
        fields.pop("attn_scale", None)
    first = next((each for each in hf_model.parameters() if each.is_floating_point()), next(hf_model.parameters()))
    fields |= {
        "normalization_type": architecture.norm,
        "original_architecture": architecture.hf_class,
        "init_weights": False,
        "dtype": first.dtype,
        "device": str(home_of(hf_model)),
        "load_in_4bit": _in_four_bits(hf_model),
        "initializer_range": getattr(hf, "initializer_range", 0.02) or 0.02,
    }
    if not architecture.any_layer("experts") or "experts_per_token" not in fields or "num_experts" not in fields:
        fields = {name: value for name, value in fields.items() if name not in ("num_experts", "experts_per_token")}
    if architecture.any_layer("rotary"):
        fields = _rotation(hf, fields) | fields
    return fields


def _in_four_bits(hf_model: Any) -> bool:
    """Whether the model's layers are bitsandbytes' of four bits, which is what TransformerLens means."""
    found = getattr(hf_model.config, "quantization_config", None) or {}
    return bool(found.get("load_in_4bit") if isinstance(found, dict) else getattr(found, "load_in_4bit", False))


def usual(hf: Any, name: str) -> Any:
    """What a HF config says of a field of TransformerLens', under one of the usual names; None if nothing."""
    for attribute in USUAL_NAMES[name]:
        value = of_all_layers(hf, attribute)
        # Some configs give one value for each layer.
        value = value[0] if isinstance(value, list | tuple) and value else value
        # A context of -1 has no end.
        if isinstance(value, str) or (isinstance(value, (int, float)) and value >= 0):
            return value
    return None


def of_all_layers(hf: Any, attribute: str) -> Any:
    """What a HF config says of all layers alike; None if it says nothing, or something else for each."""
    try:
        return getattr(hf, attribute, None)
    except RuntimeError:
        return None


def _sizes(hf_model: Any, hf: Any, architecture: Architecture, fields: dict[str, Any]) -> dict[str, Any]:
    """Widths and numbers of heads, of the first layer that has them."""
    head = hf_model.get_submodule(architecture.unembed)
    d_model = getattr(hf, "hidden_size", None) or widths(head)[0]
    found = {
        "n_layers": len(architecture.blocks),
        "d_model": d_model,
        "d_vocab": widths(hf_model.get_submodule(architecture.embed))[1],
        "d_vocab_out": widths(head)[1],
        "d_mlp": 4 * d_model,
        "n_ctx": fields.get("n_ctx", 2048),
        "n_heads": fields.get("n_heads", 1),
    }
    if architecture.pos_embed is not None:
        rows = len(position_rows(hf_model.get_submodule(architecture.pos_embed)))
        found["n_ctx"] = min(found["n_ctx"], rows - first_position(hf_model, architecture))
    for layer, block in enumerate(architecture.blocks):
        if block.mlp_out is not None:
            found["d_mlp"] = widths(hf_model.get_submodule(architecture.in_layer(layer, "mlp_out")))[0]
            break
        if block.expert_form.shown:
            found["d_mlp"] = block.expert_form.width
    attending = [layer for layer, block in enumerate(architecture.blocks) if block.attn is not None]
    found["d_head"] = fields.get("d_head") or of_all_layers(hf, "head_dim") or d_model // found["n_heads"]
    if attending:
        found |= _heads(hf_model, architecture, attending[0], found)
    if found.get("n_key_value_heads") is None and "n_key_value_heads" in fields:
        # A record that names the attribute says that TransformerLens has it where nothing is shared, too.
        found["n_key_value_heads"] = fields["n_key_value_heads"]
    return found


def _heads(hf_model: Any, architecture: Architecture, layer: int, found: dict[str, Any]) -> dict[str, Any]:
    """The number and size of a layer's heads."""
    block: Block = architecture.blocks[layer]
    attention = hf_model.get_submodule(architecture.in_layer(layer, "attn"))
    sizes = (getattr(attention, name, None) for name in ("qk_head_dim", "head_dim"))
    d_head = next((size for size in sizes if size), found["d_head"])
    queries = found["n_heads"]

    def width(role: str) -> int:
        return widths(hf_model.get_submodule(architecture.in_layer(layer, role)))[1] // d_head

    if block.qkv is not None:
        key_values = (width("qkv") - queries) // 2
    else:
        queries = width("q") // (2 if block.q_gate else 1) if block.q is not None else queries
        key_values = width("k") if block.k is not None else queries // getattr(attention, "num_key_value_groups", 1)
    return {
        "d_head": d_head,
        "n_heads": queries,
        "n_key_value_heads": None if key_values == queries else key_values,
        **_scale(hf_model.get_submodule(architecture.in_layer(layer, "attn")), d_head),
    }


def _scale(attention: Any, d_head: int) -> dict[str, Any]:
    """What scores are divided by, where it is not the square root of the heads' size."""
    scaling = getattr(attention, "scaling", getattr(attention, "softmax_scale", None))
    if not isinstance(scaling, (int, float)) or not scaling or math.isclose(scaling, d_head**-0.5):
        return {}
    return {"attn_scale": 1 / scaling}


def _structure(hf: Any, architecture: Architecture) -> dict[str, Any]:
    """The config fields that say which parts the blocks have."""
    some = architecture.any_layer
    over_heads = any(block.q_norm is not None and block.qk_norm_over == "head" for block in architecture.blocks)
    rotary = any(block.rotary for block in architecture.blocks if block.attn is not None)
    fields: dict[str, Any] = {
        "gated_mlp": some("gate") or some("expert neurons"),
        "parallel_attn_mlp": any(block.parallel for block in architecture.blocks),
        "positional_embedding_type": "rotary" if rotary else "alibi" if getattr(hf, "alibi", False) else "standard",
        "use_qk_norm": over_heads,
        "use_normalization_before_and_after": some("norm around"),
        "post_embedding_ln": architecture.embed_norm is not None,
        "use_attention_sinks": any(block.sinks is not None for block in architecture.blocks),
        "norm_topk_prob": some("experts") and bool(getattr(hf, "norm_topk_prob", False)),
    }
    window, kinds = getattr(hf, "sliding_window", None), getattr(hf, "layer_types", None)
    if window and getattr(hf, "use_sliding_window", True):
        local = [kind == "sliding_attention" for kind in kinds] if kinds else [True] * len(architecture.blocks)
        if any(local):
            fields |= {"use_local_attn": True, "window_size": window}
            fields["attn_types"] = ["local" if each else "global" for each in local]
    return fields


def _rotation(hf: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The config fields that say how queries and keys are rotated."""
    rope = getattr(hf, "rope_parameters", None) or {}
    # Where kinds of layers differ, TransformerLens' base is that of the layers that see everything.
    full, local = rope.get("full_attention") or rope, rope.get("sliding_attention") or {}
    part = full.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None)) or 1.0
    found = {"rotary_dim": getattr(hf, "rotary_dim", None) or int(part * fields["d_head"])}
    if "rope_theta" in full:
        found["rotary_base"] = full["rope_theta"]
    if full.get("rope_type") == "linear":
        found["rotary_scaling_factor"] = full["factor"]
    if local.get("rope_theta", full.get("rope_theta")) != full.get("rope_theta"):
        found["rotary_base_local"] = local["rope_theta"]
    return found | (_yarn(full) if full.get("rope_type") == "yarn" else {})


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """The config fields that say how rotary frequencies are stretched (Peng et al. 2023, YaRN)."""
    factor, found = float(rope["factor"]), {"use_yarn_rope": True}
    named = {
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "yarn_original_max_position_embeddings": "original_max_position_embeddings",
        "yarn_truncate": "truncate",
    }
    found |= {field: rope[name] for field, name in named.items() if rope.get(name) is not None}
    given = rope.get("attention_factor")
    scaled = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return found | {"yarn_factor": factor, "yarn_attention_factor": scaled if given is None else given}
