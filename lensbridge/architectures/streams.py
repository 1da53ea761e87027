"""Families with several residual streams, or several steps in each layer.

- hyper-connections (Zhu et al. 2024): DeepSeek 4, Hunyuan 4, Qwen 4; latent or gated attention, the first two with
  learned logits in its softmax; layers of DeepSeek 4 attend to summaries of positions as well
- AltUp (Baykal et al. 2023): Gemma 3n, whose last layers attend to the keys of earlier ones
- LongCat-Flash (Meituan 2025): two attentions and three MLPs in each layer
"""

from dataclasses import replace

from .deepseek import DEEPSEEK2, LATENT
from .gemma import GEMMA3
from .irregular import ALTERNATING_UPDATES, COMPRESSED, HYPER_CONNECTIONS, KEYS_OF_ANOTHER, TWICE
from .record import Architecture, Block, instead_of_attention, without_mlp

DEEPSEEK4 = Architecture(
    model_type="deepseek_v4",
    hf_class="DeepseekV4ForCausalLM",
    block=replace(LATENT, o=None, sinks="self_attn.sinks", refusals=(HYPER_CONNECTIONS,)),
    kinds={"self_attn.compressor": {"refusals": (HYPER_CONNECTIONS, COMPRESSED)}},
)
HUNYUAN4 = replace(
    DEEPSEEK2,
    model_type="hy_v4",
    hf_class="HYV4ForCausalLM",
    block=replace(LATENT, sinks="self_attn.sinks", z_from_call=True, refusals=(HYPER_CONNECTIONS,)),
)
QWEN4 = Architecture(
    model_type="qwen4_exp",
    hf_class="Qwen4ExpForCausalLM",
    also=("qwen4_exp_text",),
    ln_final=None,
    gain_offset=1.0,
    block=Block(ln1=None, ln2=None, q_gate=True, z_from_call=True, refusals=(HYPER_CONNECTIONS,)),
    kinds={"linear_attn": instead_of_attention("linear_attn")},
)
GEMMA3N = replace(
    GEMMA3,
    model_type="gemma3n_text",
    hf_class="Gemma3nForCausalLM",
    gain_offset=0.0,
    config={"output_logits_soft_cap": "final_logit_softcapping"},
    block=replace(
        GEMMA3.block,
        k=None,
        v=None,
        qk_norm_heads_first=False,
        refusals=(ALTERNATING_UPDATES, KEYS_OF_ANOTHER),
    ),
    kinds={
        "self_attn.q_norm": {"q_norm": "self_attn.q_norm"},
        "self_attn.k_proj": {
            **{"k": "self_attn.k_proj", "k_norm": "self_attn.k_norm"},
            **{"refusals": (ALTERNATING_UPDATES,)},
        },
    },
)
LONGCAT = replace(
    DEEPSEEK2,
    model_type="longcat_flash",
    hf_class="LongcatFlashForCausalLM",
    block=replace(
        LATENT,
        ln1=None,
        attn=None,
        o=None,
        extra="what two attentions and three MLPs write",
        refusals=(TWICE,),
        **without_mlp(),
    ),
    kinds={"mlp.experts": {}, "mlp.router": {}},
)
