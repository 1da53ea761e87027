"""Beam (2026).

Norms before and behind attention and MLP; gates on what heads write; norms of each head's queries and keys. Layers with
local attention rotate, those with global attention let queries grow with their position. What is added is weighed
against the stream by the number of things added before, so that the stream keeps its size. Capped logits; a mixture of
experts in most layers.
"""

from typing import Any

from .block import Factor
from .record import Architecture, Block


def added(count: str) -> Factor:
    """The factor on what is added as the ``count``-th term."""
    return lambda layer: getattr(layer, count) ** -0.5


def kept(count: str) -> Factor:
    """The factor on the stream to which the ``count``-th term is added."""

    def factor(layer: Any) -> float:
        terms = getattr(layer, count)
        return ((terms - 1) / terms) ** 0.5

    return factor


BEAM = Architecture(
    model_type="beam",
    hf_class="BeamForCausalLM",
    block=Block(
        z_from_call=True,
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        attn_factor=added("attn_residual_add_idx"),
        mlp_factor=added("mlp_residual_add_idx"),
        attn_residual=kept("attn_residual_add_idx"),
        mlp_residual=kept("mlp_residual_add_idx"),
    ),
    after_unembed="cap",
    config={"output_logits_soft_cap": "final_logit_softcapping"},
)
