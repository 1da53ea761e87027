"""OPT (Zhang et al. 2022).

- LayerNorms; learned positions, whose first two rows belong to no position
- the MLP's projections are in the layer itself, which makes one axis of batch and position before them
- OPT-350m has norms behind attention and MLP, none at the end, and embeddings of another width
"""

from dataclasses import replace

from .bart import PRE_NORM
from .record import Architecture

OPT = Architecture(
    model_type="opt",
    hf_class="OPTForCausalLM",
    embed="model.decoder.embed_tokens",
    project_in="model.decoder.project_in",
    pos_embed="model.decoder.embed_positions",
    pos_offset=2,
    layers="model.decoder.layers",
    ln_final="model.decoder.final_layer_norm",
    project_out="model.decoder.project_out",
    optional=("project_in", "ln_final", "project_out"),
    block=replace(PRE_NORM, flat_mlp=True),
    norm="LN",
    variants={"do_layer_norm_before=False": {"post_norm": True}},
)
