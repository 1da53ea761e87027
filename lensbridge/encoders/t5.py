"""T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer").

- an encoder and a decoder with one token embedding; norms (RMS, no bias) before each branch and at each end
- scores are not scaled; the first layer of each stack makes a bias from relative positions that all its layers add
- each branch is a HF module that adds to the stream itself, so that a branch's input is the stream before it
- padding is masked with the smallest finite number in TransformerLens too, what comes later in the decoder with -inf
- plain MLP, or a gated one (version 1.1, Flan)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .record import Affine, At, AttentionAt, Family, NormAt, Row, Stack, Table

ATTENTION_POINTS = tuple(f"hook_{name}" for name in ("k", "q", "v", "z", "attn_scores", "pattern", "result"))
NORM_POINTS = ("hook_scale", "hook_normalized")
STREAM = ("resid_pre", "resid_mid", "resid_post")


def _attention(name: str, path: str, **options: Any) -> AttentionAt:
    return AttentionAt(name, path, f"{path}.q", f"{path}.k", f"{path}.v", f"{path}.o", **options)


def _mlp(path: str, norm: str, gated: bool) -> tuple[Row, ...]:
    """The rows of the last branch of a layer, at ``path``."""
    dense = f"{path}.DenseReluDense"
    if gated:
        into: tuple[Row, ...] = (
            Affine("mlp.W_gate", f"{dense}.wi_0"),
            At("mlp.hook_pre", f"{dense}.wi_0"),
            Affine("mlp.W_in", f"{dense}.wi_1", "mlp.b_in"),
            At("mlp.hook_pre_linear", f"{dense}.wi_1"),
        )
    else:
        into = (Affine("mlp.W_in", f"{dense}.wi", "mlp.b_in"), At("mlp.hook_pre", f"{dense}.wi"))
    return (
        At("hook_mlp_in", path, "input", flag="use_hook_mlp_in"),
        NormAt(norm, f"{path}.layer_norm"),
        *into,
        At("mlp.hook_post", f"{dense}.wo", "input"),
        Affine("mlp.W_out", f"{dense}.wo", "mlp.b_out"),
        At("hook_mlp_out", f"{path}.dropout"),
        At("hook_resid_post", ""),
    )


def _start(infinite: bool) -> tuple[Row, ...]:
    """The rows of the first branch of a layer, up to the stream behind it."""
    norm = NormAt("ln1", "layer.0.layer_norm")
    return (
        At("hook_resid_pre", "", "input"),
        _attention("attn", "layer.0.SelfAttention", reads="", norm=norm, together=True, infinite=infinite),
        At("hook_attn_out", "layer.0.dropout"),
        At("hook_resid_mid", "layer.1", "input"),
    )


def _encoder(gated: bool) -> Stack:
    return Stack("encoder", "encoder.block", (*_start(infinite=False), *_mlp("layer.1", "ln2", gated)))


def _decoder(gated: bool) -> Stack:
    cross = (
        At("hook_cross_attn_in", "layer.1.layer_norm", "input", flag="use_attn_in"),
        NormAt("ln2", "layer.1.layer_norm"),
        _attention("cross_attn", "layer.1.EncDecAttention", infinite=False),
        At("hook_cross_attn_out", "layer.1.dropout"),
        At("hook_resid_mid_cross", "layer.2", "input"),
    )
    return Stack("decoder", "decoder.block", (*_start(infinite=True), *cross, *_mlp("layer.2", "ln3", gated)))


def _parts(gated: bool) -> tuple[Row | Stack, ...]:
    bias = "layer.0.SelfAttention.relative_attention_bias"
    return (
        Table("embed.W_E", "shared"),
        At("hook_embed", "encoder.embed_tokens"),
        Table("encoder.0.attn.rel_pos_bias.weight", f"encoder.block.0.{bias}"),
        _encoder(gated),
        NormAt("encoder_final_ln", "encoder.final_layer_norm"),
        Table("decoder.0.attn.rel_pos_bias.weight", f"decoder.block.0.{bias}"),
        _decoder(gated),
        NormAt("decoder_final_ln", "decoder.final_layer_norm"),
        At("unembed.hook_in", "lm_head", "input"),
        Affine("unembed.W_U", "lm_head", "unembed.b_U"),
        At("unembed.hook_out", "lm_head"),
    )


def _points(gated: bool) -> tuple[str, ...]:
    mlp = ("mlp.hook_pre", *(("mlp.hook_pre_linear",) if gated else ()), "mlp.hook_post")
    inputs = tuple(f"hook_{name}" for name in ("q_input", "k_input", "v_input", "attn_in", "attn_out"))
    cross = tuple(f"hook_{name}" for name in ("cross_attn_in", "cross_attn_out", "resid_mid_cross"))

    def layer(stack: str, decodes: bool) -> tuple[str, ...]:
        own = (
            *(f"ln1.{point}" for point in NORM_POINTS),
            *(f"attn.{point}" for point in ATTENTION_POINTS),
            f"{stack}.0.attn.rel_pos_hook",
            *(f"ln2.{point}" for point in NORM_POINTS),
            *(f"cross_attn.{point}" for point in ATTENTION_POINTS if decodes),
            *(f"ln3.{point}" for point in NORM_POINTS if decodes),
            *mlp,
            *inputs,
            *(cross if decodes else ()),
            *("hook_mlp_in", "hook_mlp_out"),
            *(f"hook_{name}" for name in STREAM),
        )
        return tuple(point if point.startswith(stack) else f"{stack}.{{l}}.{point}" for point in own)

    return (
        *layer("encoder", decodes=False),
        *(f"encoder_final_ln.{point}" for point in NORM_POINTS),
        *layer("decoder", decodes=True),
        *(f"decoder_final_ln.{point}" for point in NORM_POINTS),
        "unembed.hook_in",
        "unembed.hook_out",
        "hook_embed",
    )


def _sample(hf_config: Any) -> dict[str, Any]:
    tokens = torch.zeros(1, 2, dtype=torch.long)
    return {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}


_ADDED = "the position bias is added to the scores without passing it: hook attn.hook_attn_scores instead"

T5 = Family(
    architecture="T5ForConditionalGeneration",
    parts=_parts(gated=False),
    points=_points(gated=False),
    norm="RMS",
    norm_epsilon="variance_epsilon",
    config={
        "d_model": "d_model",
        "d_head": "d_kv",
        "n_heads": "num_heads",
        "d_mlp": "d_ff",
        "d_vocab": "vocab_size",
        "n_layers": "num_layers",
        "n_ctx": "n_positions",
        "eps": "layer_norm_epsilon",
        "act_fn": "dense_act_fn",
        "relative_attention_max_distance": "relative_attention_max_distance",
        "relative_attention_num_buckets": "relative_attention_num_buckets",
        "decoder_start_token_id": "decoder_start_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
        "gated_mlp": "is_gated_act",
    },
    constants={
        "n_ctx": 512,
        "positional_embedding_type": "relative_positional_bias",
        "attention_dir": "bidirectional",
        "use_attn_scale": False,
    },
    sample=_sample,
    alone={
        "embed": "shared",
        "encoder.{l}.attn": "encoder.block.{l}.layer.0.SelfAttention",
        "encoder.{l}.mlp": "encoder.block.{l}.layer.1.DenseReluDense",
        "decoder.{l}.attn": "decoder.block.{l}.layer.0.SelfAttention",
        "decoder.{l}.mlp": "decoder.block.{l}.layer.2.DenseReluDense",
        "unembed": "lm_head",
    },
    silent={f"{stack}.0.attn.rel_pos_hook": _ADDED for stack in ("encoder", "decoder")},
)

GATED_T5 = replace(T5, parts=_parts(gated=True), points=_points(gated=True))
