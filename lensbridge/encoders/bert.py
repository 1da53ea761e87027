"""BERT (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers").

- norms stand behind the additions: ``resid_mid`` is what the first norm reads, and the MLP's skip is what it returns
- embeddings of token, position and token type are added, then normed
- two heads: masked language modelling (an affine map, a norm, the unembedding) and next sentence prediction (the pooler
  on the first token, an affine map); a HF model may have one of them only
"""

from __future__ import annotations

from typing import Any

import torch

from .record import Affine, At, AttentionAt, Family, NormAt, Stack, Table

BLOCK_POINTS = (
    *(f"attn.hook_{name}" for name in ("k", "q", "v", "z", "attn_scores", "pattern", "result")),
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    *(f"hook_{name}" for name in ("q_input", "k_input", "v_input", "attn_out", "mlp_in", "mlp_out")),
    *(f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "normalized_resid_post")),
)

BLOCK = (
    At("hook_resid_pre", "", "input"),
    AttentionAt(
        "attn",
        "attention.self",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        reads="",
    ),
    At("hook_attn_out", "attention.output.dropout"),
    At("hook_resid_mid", "attention.output.LayerNorm", "input"),
    At("hook_mlp_in", "attention.output.LayerNorm", "input", flag="use_hook_mlp_in"),
    NormAt("ln1", "attention.output.LayerNorm"),
    Affine("mlp.W_in", "intermediate.dense", "mlp.b_in"),
    At("mlp.hook_pre", "intermediate.dense"),
    At("mlp.hook_post", "output.dense", "input"),
    Affine("mlp.W_out", "output.dense", "mlp.b_out"),
    At("hook_mlp_out", "output.dropout"),
    At("hook_resid_post", "output.LayerNorm", "input"),
    NormAt("ln2", "output.LayerNorm"),
    At("hook_normalized_resid_post", ""),
)


def _sample(hf_config: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long)}


#: What belongs to each head alone.
MASKED_LANGUAGE_HEAD = ("mlm_head.", "unembed.")
NEXT_SENTENCE_HEAD = ("pooler.", "nsp_head.")

BERT = Family(
    architecture="BertForMaskedLM",
    parts=(
        Table("embed.embed.W_E", "bert.embeddings.word_embeddings"),
        At("embed.hook_embed", "bert.embeddings.word_embeddings"),
        Table("embed.pos_embed.W_pos", "bert.embeddings.position_embeddings"),
        At("embed.hook_pos_embed", "bert.embeddings.position_embeddings", per_row=True),
        Table("embed.token_type_embed.W_token_type", "bert.embeddings.token_type_embeddings"),
        At("embed.hook_token_type_embed", "bert.embeddings.token_type_embeddings", per_row=True),
        NormAt("embed.ln", "bert.embeddings.LayerNorm"),
        At("hook_full_embed", "bert.embeddings"),
        Stack("blocks", "bert.encoder.layer", BLOCK),
        Affine("mlm_head.W", "cls.predictions.transform.dense", "mlm_head.b"),
        NormAt("mlm_head.ln", "cls.predictions.transform.LayerNorm"),
        At("unembed.hook_in", "cls.predictions.decoder", "input"),
        Affine("unembed.W_U", "cls.predictions.decoder", "unembed.b_U"),
        At("unembed.hook_out", "cls.predictions.decoder"),
        Affine("pooler.W", "bert.pooler.dense", "pooler.b"),
        At("pooler.hook_pooler_out", "bert.pooler"),
        Affine("nsp_head.W", "cls.seq_relationship", "nsp_head.b"),
        At("nsp_head.hook_nsp_out", "cls.seq_relationship"),
    ),
    points=(
        "embed.ln.hook_scale",
        "embed.ln.hook_normalized",
        "embed.hook_embed",
        "embed.hook_pos_embed",
        "embed.hook_token_type_embed",
        *(f"blocks.{{l}}.{point}" for point in BLOCK_POINTS),
        "mlm_head.ln.hook_scale",
        "mlm_head.ln.hook_normalized",
        "unembed.hook_in",
        "unembed.hook_out",
        "nsp_head.hook_nsp_out",
        "pooler.hook_pooler_out",
        "hook_full_embed",
    ),
    norm="LN",
    norm_epsilon="eps",
    config={
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_mlp": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_ctx": "max_position_embeddings",
        "eps": "layer_norm_eps",
        "d_vocab": "vocab_size",
        "act_fn": "hidden_act",
    },
    constants={"attention_dir": "bidirectional"},
    sample=_sample,
    alone={
        "embed": "bert.embeddings",
        "blocks.{l}": "bert.encoder.layer.{l}",
        "mlm_head": "cls.predictions.transform",
        "unembed": "cls.predictions.decoder",
        "pooler": "bert.pooler",
        "nsp_head": "cls.seq_relationship",
    },
)
