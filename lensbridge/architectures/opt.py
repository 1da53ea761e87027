"""OPT (Zhang et al. 2022).

- LayerNorms; learned positions, whose first two rows belong to no position
- the MLP's projections are in the layer itself, which makes one axis of batch and position before them
"""

from .record import Architecture, Block

OPT = Architecture(
    model_type="opt",
    hf_class="OPTForCausalLM",
    embed="model.decoder.embed_tokens",
    pos_embed="model.decoder.embed_positions",
    pos_offset=2,
    layers="model.decoder.layers",
    ln_final="model.decoder.final_layer_norm",
    block=Block(
        ln1="self_attn_layer_norm",
        o="self_attn.out_proj",
        ln2="final_layer_norm",
        mlp="",
        gate=None,
        mlp_in="fc1",
        mlp_out="fc2",
        mlp_branch="fc2",
        flat_mlp=True,
        rotary=False,
    ),
    norm="LN",
    refused={
        "_remove_final_layer_norm": "its residual stream ends without a norm",
        "do_layer_norm_before=False": "its norms stand in the residual stream, behind attention and MLP",
    },
)
