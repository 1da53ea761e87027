"""Families without attention: what moves information between positions is a recurrence in every layer.

- Mamba 1 and 2 (Gu and Dao 2023, 2024), Falcon Mamba (TII 2024): one branch a layer
- RWKV-4 (Peng et al. 2023): LayerNorms, the first of them behind the embedding and inside the first layer; both
  branches read the token before as well
- xLSTM (Beck et al. 2024): a gated MLP; capped logits; longer texts than a chunk pass the layers piece by piece
"""

from dataclasses import replace

from .record import Architecture, Block, instead_of_attention, without_mlp

MAMBA = Architecture(
    model_type="mamba",
    hf_class="MambaForCausalLM",
    embed="backbone.embeddings",
    layers="backbone.layers",
    ln_final="backbone.norm_f",
    block=Block(ln1="norm", **without_mlp(), **instead_of_attention("mixer")),
)
MAMBA2 = replace(MAMBA, model_type="mamba2", hf_class="Mamba2ForCausalLM")
FALCON_MAMBA = replace(MAMBA, model_type="falcon_mamba", hf_class="FalconMambaForCausalLM")
RWKV = Architecture(
    model_type="rwkv",
    hf_class="RwkvForCausalLM",
    embed="rwkv.embeddings",
    embed_norm="rwkv.blocks.0.pre_ln",
    layers="rwkv.blocks",
    ln_final="rwkv.ln_out",
    unembed="head",
    block=Block(
        ln1="ln1",
        ln2="ln2",
        mlp="feed_forward",
        gate=None,
        mlp_in=None,
        mlp_out=None,
        **instead_of_attention("attention"),
    ),
    kinds={"pre_ln": {"enters": "pre_ln"}},
    norm="LN",
    config={"n_ctx": "context_length"},
    refused={
        "rescale_every": "its stream is halved every so many layers. Load it with rescale_every=0, which computes the "
        "same without"
    },
    loaded_with={"rescale_every": 0},
)
XLSTM = Architecture(
    model_type="xlstm",
    hf_class="xLSTMForCausalLM",
    embed="backbone.embeddings",
    layers="backbone.blocks",
    ln_final="backbone.out_norm",
    block=Block(
        ln1="norm_mlstm",
        ln2="norm_ffn",
        mlp="ffn",
        gate="ffn.proj_up_gate",
        mlp_in="ffn.proj_up",
        mlp_out="ffn.proj_down",
        **instead_of_attention("mlstm_layer"),
    ),
    kinds={"ffn.proj_up_gate_z": {"gate": None, "mlp_in": "ffn.proj_up_gate_z", "gate_up": True}},
    after_unembed="cap",
    config={"n_ctx": "max_inference_chunksize", "output_logits_soft_cap": "output_logit_soft_cap"},
    constants={"act_fn": "silu"},
    refused={"use_bias": "its RMSNorms have biases"},
)
