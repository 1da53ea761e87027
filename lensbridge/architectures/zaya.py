"""ZAYA1 (Zyphra 2025).

Queries and keys are mixed over positions by convolutions, and half of each value is the position before's; both sides
of each sum have a factor and a bias for each coordinate, which the embedding has, too. Routers add what the router of
the layer before computed, and one of their choices is no expert.
"""

from typing import Any

from .block import Factor, mixture
from .record import Architecture, Block


def biases(path: str) -> Factor:
    """What the two biases of a sum, at ``path`` below a layer, add to it together."""

    def bias(layer: Any) -> Any:
        scaling = layer.get_submodule(path)
        of_stream = scaling.residual_bias * scaling.residual_scale
        return scaling.hidden_states_bias * scaling.hidden_states_scale + of_stream

    return bias


ZAYA = Architecture(
    model_type="zaya",
    hf_class="ZayaForCausalLM",
    embed_factor="model.input_hidden_states_scale",
    embed_extra="a bias is added",
    block=Block(
        q=None,
        k=None,
        v=None,
        attn_factor="post_attention_residual_scale.hidden_states_scale",
        attn_residual="post_attention_residual_scale.residual_scale",
        attn_bias=biases("post_attention_residual_scale"),
        between="post_attention_residual_scale",
        gate=None,
        mlp_in=None,
        mlp_out=None,
        mlp_factor="post_mlp_residual_scale.hidden_states_scale",
        mlp_residual="post_mlp_residual_scale.residual_scale",
        mlp_bias=biases("post_mlp_residual_scale"),
    ),
    # What is no expert counts as the first one, without weight: that shows where there is one choice.
    kinds={"mlp.experts": {}},
    by_attribute={"mlp.gate.top_k": {1: mixture()}},
    rereads="its routers add what those of the layers before computed",
)
