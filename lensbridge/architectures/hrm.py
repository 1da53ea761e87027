"""HRM's language model (Wang et al. 2025).

Two stacks of Llama's layers, with norms without gains and gates on what heads write. They run several times in each
forward pass: the fast one on the sum of both states, a few times, then the slow one on that sum. What counts as a layer
here is one run of one, so that weights are those of several layers; the first layer of a stack begins from a sum of
normed streams. Gradients go through the last runs only.
"""

from typing import Any

from .record import Architecture, Block, LayerRun


def runs(hf_config: Any) -> tuple[LayerRun, ...]:
    """The runs of the layers of both stacks, in order."""
    found: list[LayerRun] = []
    for slow in range(hf_config.H_cycles):
        stacks = [("L", slow * hf_config.L_cycles + fast) for fast in range(hf_config.L_cycles)]
        for stack, before in [*stacks, ("H", slow)]:
            paths = (f"model.{stack}_module.layers.{layer}" for layer in range(hf_config.num_layers_per_stack))
            found += [LayerRun(path, before, fresh=not index) for index, path in enumerate(paths)]
    return tuple(found)


HRM_TEXT = Architecture(
    model_type="hrm_text",
    hf_class="HrmTextForCausalLM",
    embed_factor="model.embedding_scale",
    embed_extra="the state that the fast stack begins with is added",
    layers="model.L_module.layers",
    runs=runs,
    ln_final="model.H_module.final_norm",
    block=Block(z_from_call=True),
    rereads="the slow state, which the embedding is at first, is read in each run of a stack",
)
