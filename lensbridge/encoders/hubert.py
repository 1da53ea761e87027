"""HuBERT (Hsu et al. 2021) and wav2vec 2.0 (Baevski et al. 2020): encoders of sound.

- a convolution makes frames from the waveform, and another one the position embedding; TransformerLens has points
  for neither, so that its points begin with the first block
- blocks are BERT's, with other names
"""

from __future__ import annotations

from typing import Any

import torch

from .bert import BLOCK_POINTS
from .record import Affine, At, AttentionAt, Family, NormAt, Stack

BLOCK = (
    At("hook_resid_pre", "", "input"),
    AttentionAt(
        "attn",
        "attention",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.out_proj",
        reads="",
    ),
    At("hook_attn_out", "dropout"),
    At("hook_resid_mid", "layer_norm", "input"),
    At("hook_mlp_in", "layer_norm", "input", flag="use_hook_mlp_in"),
    NormAt("ln1", "layer_norm"),
    Affine("mlp.W_in", "feed_forward.intermediate_dense", "mlp.b_in"),
    At("mlp.hook_pre", "feed_forward.intermediate_dense"),
    At("mlp.hook_post", "feed_forward.output_dense", "input"),
    Affine("mlp.W_out", "feed_forward.output_dense", "mlp.b_out"),
    At("hook_mlp_out", "feed_forward"),
    At("hook_resid_post", "final_layer_norm", "input"),
    NormAt("ln2", "final_layer_norm"),
    At("hook_normalized_resid_post", ""),
)


def _sample(hf_config: Any) -> dict[str, Any]:
    """A waveform that gives two frames."""
    samples = 2
    for kernel, stride in zip(reversed(hf_config.conv_kernel), reversed(hf_config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return {"input_values": torch.linspace(-1, 1, samples).unsqueeze(0)}


HUBERT = Family(
    architecture=None,
    parts=(Stack("blocks", "encoder.layers", BLOCK),),
    points=tuple(f"blocks.{{l}}.{point}" for point in BLOCK_POINTS),
    norm="LN",
    norm_epsilon="eps",
    config={
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_mlp": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_ctx": "max_position_embeddings",
        "eps": "layer_norm_eps",
        "act_fn": "hidden_act",
    },
    constants={"attention_dir": "bidirectional", "n_ctx": 8192, "d_vocab": -1},
    sample=_sample,
    alone={
        "blocks.{l}": "encoder.layers.{l}",
        "blocks.{l}.attn": "encoder.layers.{l}.attention",
        "blocks.{l}.mlp": "encoder.layers.{l}.feed_forward",
    },
)
