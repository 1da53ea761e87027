"""Do all combinations of config fields that TransformerLens 3.9.0 accepts give its values and gradients?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compat_tests.native_models import agree_in_a_run, agree_in_gradients, native_pair
from lensbridge.utilities.activation_functions import SUPPORTED_ACTIVATIONS

CAPS = st.sampled_from([-1.0, 0.7, 5.0])
FLAG = st.booleans()


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that need not fit together: a head may be wider than the model."""
    groups, heads_per_group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    vocab = draw(st.integers(3, 20))
    return {
        "d_model": draw(st.integers(1, 9)),
        "d_head": 2 * draw(st.integers(1, 3)),
        "n_heads": groups * heads_per_group,
        "n_key_value_heads": draw(st.sampled_from([None, groups])),
        "n_layers": draw(st.integers(1, 3)),
        "n_ctx": draw(st.integers(8, 12)),
        "d_vocab": vocab,
        "d_vocab_out": draw(st.sampled_from([-1, 4])),
        "d_mlp": draw(st.sampled_from([None, 5])),
    }


@st.composite
def positions(draw: st.DrawFn, sized: dict[str, Any]) -> dict[str, Any]:
    """How positions come in."""
    kind = draw(st.sampled_from(["standard", "rotary", "shortformer", "alibi"]))
    fields: dict[str, Any] = {"positional_embedding_type": kind}
    if kind == "rotary":
        fields |= {
            "rotary_dim": draw(st.sampled_from([None, 2])),
            "rotary_base": draw(st.sampled_from([10000, 30.0])),
            "rotary_base_local": draw(st.sampled_from([None, 9.0])),
            "rotary_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
            "rotary_adjacent_pairs": draw(FLAG),
            "use_NTK_by_parts_rope": draw(FLAG),
            "NTK_original_ctx_len": draw(st.sampled_from([8192, 30])),
            "use_yarn_rope": draw(FLAG),
            "yarn_factor": 3.0,
            "yarn_attention_factor": draw(st.sampled_from([1.0, 1.2])),
            "yarn_original_max_position_embeddings": 6,
            "yarn_truncate": draw(FLAG),
            "yarn_global_attn_only": draw(FLAG),
        }
        # The widened base has a pole at two rotated dimensions.
        wide = sized["d_head"] > 2 and fields["rotary_dim"] is None
        fields |= {"use_dynamic_ntk_rope": draw(FLAG) and wide, "train_seq_length": draw(st.sampled_from([None, 3]))}
    if kind == "shortformer" and sized["n_key_value_heads"] not in (None, sized["n_heads"]):
        # TransformerLens adds positions for every head to keys for every group.
        fields["ungroup_grouped_query_attention"] = True
    return fields


@st.composite
def blocks(draw: st.DrawFn, sized: dict[str, Any], ungrouped: bool) -> dict[str, Any]:
    """What a block is made of."""
    norm = draw(st.sampled_from(["LN", "LNPre", "RMS", "RMSPre", None]))
    grouped = sized["n_key_value_heads"] not in (None, sized["n_heads"]) and not ungrouped
    attn_only = draw(FLAG)
    experts = draw(st.sampled_from([None, None, 3])) if not attn_only else None
    local = draw(FLAG)
    return {
        "normalization_type": norm,
        "final_rms": draw(FLAG),
        "eps": draw(st.sampled_from([1e-5, 1e-2])),
        "use_normalization_before_and_after": norm in ("RMS", "RMSPre", None) and draw(FLAG),
        "attn_only": attn_only,
        "parallel_attn_mlp": not attn_only and draw(FLAG),
        "act_fn": draw(st.sampled_from(sorted(SUPPORTED_ACTIVATIONS))),
        "gated_mlp": draw(FLAG),
        "num_experts": experts,
        "experts_per_token": None if experts is None else draw(st.integers(1, 3)),
        "norm_topk_prob": draw(FLAG),
        "use_local_attn": local,
        "window_size": draw(st.integers(1, 9)),
        "attn_types": draw(st.lists(st.sampled_from(["local", "global"]), min_size=3, max_size=3)),
        "use_qk_norm": draw(FLAG),
        "use_attn_in": draw(FLAG) and not grouped,
        "use_split_qkv_input": draw(FLAG),
        "use_hook_mlp_in": not attn_only and draw(FLAG),
        "use_attn_result": draw(FLAG),
    }


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config that TransformerLens can build and run."""
    sized = draw(sizes())
    positioned = draw(positions(sized))
    ungrouped = positioned.pop("ungroup_grouped_query_attention", draw(FLAG))
    return {
        **sized,
        **positioned,
        **draw(blocks(sized, ungrouped)),
        "ungroup_grouped_query_attention": ungrouped,
        "attention_dir": draw(st.sampled_from(["causal", "causal", "bidirectional"])),
        "use_attn_scale": draw(FLAG),
        "attn_scale": draw(st.sampled_from([-1.0, 1.7])),
        "scale_attn_by_inverse_layer_idx": draw(FLAG),
        "attn_scores_soft_cap": draw(CAPS),
        "output_logits_soft_cap": draw(CAPS),
        "post_embedding_ln": draw(FLAG),
        "clip_qkv": draw(st.sampled_from([None, 0.5])),
        "use_logn_attn": draw(FLAG),
        "use_attention_sinks": draw(FLAG),
        "use_hook_tokens": draw(FLAG),
        # In float32 some of these models (a norm over one dimension) amplify rounding without bound.
        "dtype": torch.float64,
    }


def check(fields: dict[str, Any], length: int, masked: bool) -> None:
    pair = native_pair(**fields)
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, fields["d_vocab"], (2, length), generator=generator)
    mask = torch.randint(0, 2, (2, length), generator=generator) if masked else None
    agree_in_a_run(pair, tokens, mask)
    if not masked:
        # A query without any key has a gradient of NaN, here and there.
        agree_in_gradients(pair, tokens)


SHARED = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=60, **SHARED)
@given(configs(), st.integers(1, 8), st.booleans())
def test_combinations(fields: dict[str, Any], length: int, masked: bool) -> None:
    check(fields, length, masked)


@pytest.mark.slow
@settings(max_examples=3000, **SHARED)
@given(configs(), st.integers(1, 8), st.booleans())
def test_many_combinations(fields: dict[str, Any], length: int, masked: bool) -> None:
    check(fields, length, masked)
