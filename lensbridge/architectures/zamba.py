"""Zamba 1 and 2 (Zyphra 2024): layers of Mamba, some of which an attention that several layers share writes to.

- that attention reads the stream and the embedding, side by side; what it writes is added to what Mamba reads, not to
  the stream, so that these layers have scores, pattern and z of the attention, and Mamba's output as hook_attn_out
"""

from dataclasses import replace

from .irregular import BESIDE_STREAM
from .record import Architecture, Block, instead_of_attention, without_mlp

ZAMBA = Architecture(
    model_type="zamba",
    hf_class="ZambaForCausalLM",
    ln_final="model.final_layernorm",
    block=Block(rotary=False, **without_mlp(), **instead_of_attention("mamba")),
    kinds={
        "shared_transf": {
            "ln1": "mamba_decoder.input_layernorm",
            "attn": "shared_transf.self_attn",
            "attn_branch": "mamba_decoder.mamba",
            "refusals": (BESIDE_STREAM,),
        }
    },
    rereads="an attention reads the embedding again in some layers",
)
ZAMBA2 = replace(
    ZAMBA,
    model_type="zamba2",
    hf_class="Zamba2ForCausalLM",
    kinds={"shared_transformer": dict(ZAMBA.kinds["shared_transf"]) | {"attn": "shared_transformer.self_attn"}},
)
