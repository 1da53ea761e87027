"""Families in which some layers attend and others have a recurrence or a convolution instead.

- Mamba: Bamba, Jamba (Lieber et al. 2024), Granite 4, Nemotron-H (one branch a layer); gated linear recurrences:
  RecurrentGemma (De et al. 2024); delta rules: Qwen3-Next and 3.5, Kimi Linear, Ling 3, OLMo Hybrid; convolutions: LFM2
- Qwen's queries come with a gate on what their head writes; Kimi's and Ling's attention is latent
"""

from dataclasses import replace

from .deepseek import LATENT
from .olmo import OLMO2
from .record import Architecture, Block, instead_of_attention, mixture

BAMBA = Architecture(
    model_type="bamba",
    hf_class="BambaForCausalLM",
    ln_final="model.final_layernorm",
    block=Block(
        ln2="pre_ff_layernorm",
        mlp="feed_forward",
        gate="feed_forward.gate_proj",
        mlp_in="feed_forward.up_proj",
        mlp_out="feed_forward.down_proj",
    ),
    kinds={"mamba": instead_of_attention("mamba")},
)
JAMBA = replace(
    BAMBA,
    model_type="jamba",
    hf_class="JambaForCausalLM",
    block=replace(BAMBA.block, rotary=False),
    kinds=dict(BAMBA.kinds) | {"feed_forward.experts": mixture("feed_forward", "router")},
)
GRANITE_HYBRID = Architecture(
    model_type="granitemoehybrid",
    hf_class="GraniteMoeHybridForCausalLM",
    embed_factor="model.embedding_multiplier",
    block=Block(
        mlp="shared_mlp",
        gate=None,
        mlp_in="shared_mlp.input_linear",
        gate_up=True,
        mlp_out="shared_mlp.output_linear",
        attn_factor="residual_multiplier",
        mlp_factor="residual_multiplier",
    ),
    kinds={
        "mamba": instead_of_attention("mamba"),
        "block_sparse_moe": mixture("block_sparse_moe", "router") | {"mlp_also": "block_sparse_moe", "gate_up": False},
    },
    after_unembed="factor",
)
LFM2 = Architecture(
    model_type="lfm2",
    hf_class="Lfm2ForCausalLM",
    constants={"act_fn": "silu"},
    ln_final="model.embedding_norm",
    block=Block(
        ln1="operator_norm",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        o="self_attn.out_proj",
        ln2="ffn_norm",
        mlp="feed_forward",
        gate="feed_forward.w1",
        mlp_in="feed_forward.w3",
        mlp_out="feed_forward.w2",
    ),
    kinds={"conv": instead_of_attention("conv")},
)
LFM2_MOE = replace(
    LFM2,
    model_type="lfm2_moe",
    hf_class="Lfm2MoeForCausalLM",
    kinds=dict(LFM2.kinds) | {"feed_forward.experts": mixture("feed_forward")},
)
NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    hf_class="NemotronHForCausalLM",
    embed="model.embeddings",
    ln_final="model.norm_f",
    block=Block(
        ln1="norm",
        ln2=None,
        mlp=None,
        gate=None,
        mlp_in=None,
        mlp_out=None,
        rotary=False,
        **instead_of_attention("mixer"),
    ),
    kinds={
        "mixer.q_proj": {
            **{letter: f"mixer.{letter}_proj" for letter in "qkvo"},
            **{"attn": "mixer", "attn_branch": None},
        },
        "mixer.up_proj": {
            **{"mlp": "mixer", "mlp_in": "mixer.up_proj", "mlp_out": "mixer.down_proj"},
            **{"ln1": None, "ln2": "norm", "attn_branch": None},
        },
        "mixer.experts": {
            **{"mlp": "mixer", "ln1": None, "ln2": "norm", "attn_branch": None},
            **mixture("mixer"),
        },
    },
)
OLMO_HYBRID = replace(
    OLMO2,
    model_type="olmo_hybrid",
    hf_class="OlmoHybridForCausalLM",
    kinds={
        "linear_attn": instead_of_attention("linear_attn")
        | {"ln1": "input_layernorm", "ln1_post": None, "ln2": "post_attention_layernorm", "ln2_post": None}
    },
)
QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    hf_class="Qwen3NextForCausalLM",
    gain_offset=1.0,
    block=Block(q_gate=True, z_from_call=True),
    kinds={"linear_attn": instead_of_attention("linear_attn")},
)
QWEN3_5 = replace(QWEN3_NEXT, model_type="qwen3_5", hf_class="Qwen3_5ForCausalLM", also=("qwen3_5_text",))
QWEN3_5_MOE = replace(
    QWEN3_NEXT, model_type="qwen3_5_moe", hf_class="Qwen3_5MoeForCausalLM", also=("qwen3_5_moe_text",)
)
KIMI_LINEAR = Architecture(
    model_type="kimi_linear",
    hf_class="KimiLinearForCausalLM",
    block=replace(LATENT, rotary=False),
    kinds={"self_attn.forget_gate": instead_of_attention("self_attn")},
)
#: Its latent attention has a gate on what each head writes.
BAILING_HYBRID = Architecture(
    model_type="bailing_hybrid",
    hf_class="BailingHybridForCausalLM",
    block=replace(LATENT, z_from_call=True),
    kinds={"self_attn.forget_gate": instead_of_attention("self_attn")},
)
RECURRENT_GEMMA = Architecture(
    model_type="recurrent_gemma",
    hf_class="RecurrentGemmaForCausalLM",
    embed_factor="model.normalizer",
    ln_final="model.final_norm",
    gain_offset=1.0,
    block=Block(
        ln1="temporal_pre_norm",
        attn="temporal_block",
        q="temporal_block.q_proj",
        k="temporal_block.k_proj",
        v="temporal_block.v_proj",
        o="temporal_block.o_proj",
        ln2="channel_pre_norm",
        mlp="mlp_block",
        gate="mlp_block.gate_proj",
        mlp_in="mlp_block.up_proj",
        mlp_out="mlp_block.down_proj",
    ),
    kinds={"temporal_block.rg_lru": instead_of_attention("temporal_block")},
    after_unembed="cap",
)
