"""Mixtures of experts with Llama's attention, or close to it.

- Llama's block but for the experts: Qwen 2 and 3 (2024, 2025), dots.llm1 (2025), ERNIE 4.5 (2025), GLM-4.5 (2025),
  Hy 3, MiniMax M2, Mellum, Solar Open, Aria (Li et al. 2024), HunYuan; Phi-3.5 (Abdin et al. 2024) with LayerNorms
- FlexOlmo (Shi et al. 2025): OLMo 2's norms
- local attention with rotation and global attention without in turn: EXAONE, Flint (with sinks), Kolibri (with norms of
  what attention and MLP add), Command with experts (attention and MLP read one norm)
- gates on what the heads write: AFMoE, Laguna, whose layers have different numbers of heads
- MiMo V2 (2026): values are smaller than keys and scaled; local layers have sinks, and other numbers of heads
- MiniMax M3: an index chooses the blocks of keys that are attended to
- Llama 4 (2025): rotated queries and keys are normed; in layers without rotation, queries grow with their position
- JetMoe (Shen et al. 2024): experts for queries and for what the heads write
- DBRX (2024): LayerNorms, in the module around attention's; queries, keys and values are clipped
"""

from dataclasses import replace

from .cohere import COHERE2
from .granite import GRANITE, GRANITE_SWA
from .llama import HUNYUAN_DENSE
from .olmo import EXAONE4, OLMO2
from .record import Architecture, Block, Softmax, mixture

QWEN2_MOE = Architecture(model_type="qwen2_moe", hf_class="Qwen2MoeForCausalLM")
QWEN3_MOE = Architecture(model_type="qwen3_moe", hf_class="Qwen3MoeForCausalLM")
DOTS1 = Architecture(model_type="dots1", hf_class="Dots1ForCausalLM")
ERNIE4_5_MOE = Architecture(
    model_type="ernie4_5_moe", hf_class="Ernie4_5_MoeForCausalLM", constants={"rotary_adjacent_pairs": True}
)
GLM4_MOE = Architecture(model_type="glm4_moe", hf_class="Glm4MoeForCausalLM")
HY3 = Architecture(model_type="hy_v3", hf_class="HYV3ForCausalLM", block=Block(qk_norm_heads_first=True))
MELLUM = Architecture(model_type="mellum", hf_class="MellumForCausalLM")
SOLAR_OPEN = Architecture(model_type="solar_open", hf_class="SolarOpenForCausalLM")
ARIA_TEXT = Architecture(model_type="aria_text", hf_class="AriaTextForCausalLM")
#: A norm over all queries and over all keys.
MINIMAX_M2 = Architecture(model_type="minimax_m2", hf_class="MiniMaxM2ForCausalLM", block=Block(qk_norm_over="all"))
PHIMOE = Architecture(model_type="phimoe", hf_class="PhimoeForCausalLM", norm="LN")
FLEX_OLMO = replace(OLMO2, model_type="flex_olmo", hf_class="FlexOlmoForCausalLM")
HUNYUAN_MOE = replace(
    HUNYUAN_DENSE,
    model_type="hunyuan_v1_moe",
    hf_class="HunYuanMoEV1ForCausalLM",
    kinds={"mlp.experts": mixture(router="gate.wg")},
)
GRANITE_MOE = replace(
    GRANITE,
    model_type="granitemoe",
    hf_class="GraniteMoeForCausalLM",
    block=replace(GRANITE.block, mlp="block_sparse_moe", **mixture("block_sparse_moe", "router")),
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    hf_class="GraniteMoeSharedForCausalLM",
    kinds={"shared_mlp": {"mlp": "shared_mlp", "mlp_also": "block_sparse_moe"}},
)
GRANITE_MOE_SWA = replace(
    GRANITE_MOE_SHARED,
    model_type="granitemoe_swa",
    hf_class="GraniteMoeSWAForCausalLM",
    kinds={**GRANITE_MOE_SHARED.kinds, **GRANITE_SWA.kinds},
    by_layer=GRANITE_SWA.by_layer,
)
EXAONE_MOE = Architecture(
    model_type="exaone_moe",
    hf_class="ExaoneMoeForCausalLM",
    block=Block(qk_norm_heads_first=True),
    variants=EXAONE4.variants,
)
KOLIBRI = Architecture(
    model_type="kolibri1",
    hf_class="Kolibri1ForCausalLM",
    block=Block(qk_norm_heads_first=True, ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
    variants=EXAONE4.variants,
)
FLINT = Architecture(model_type="flint", hf_class="FlintForCausalLM", by_layer=COHERE2.by_layer)
COHERE2_MOE = replace(
    COHERE2,
    model_type="cohere2_moe",
    hf_class="Cohere2MoeForCausalLM",
    by_layer={},
    by_attribute={
        "self_attn.sliding_window": {None: {"rotary": False}},
        "self_attn.force_rope": {True: {"rotary": True}},
    },
    variants={"rms_norm_eps": {"norm": "RMS"}},
)
AFMOE = Architecture(
    model_type="afmoe",
    hf_class="AfmoeForCausalLM",
    block=Block(
        z_from_call=True,
        ln1_post="post_attention_layernorm",
        ln2="pre_mlp_layernorm",
        ln2_post="post_mlp_layernorm",
    ),
    kinds={"mlp.router": {"router": "mlp.router.gate"}},
    by_layer=COHERE2.by_layer,
    variants={"mup_enabled": {"embed_factor": "config.hidden_size", "embed_factor_power": 0.5}},
)
LAGUNA = Architecture(
    model_type="laguna",
    hf_class="LagunaForCausalLM",
    block=Block(z_from_call=True),
    # Layers differ in their queries' heads, so that keys may be fewer in some only.
    config={"n_key_value_heads": "num_key_value_heads"},
)
MIMO_V2_FLASH = Architecture(
    model_type="mimo_v2_flash",
    hf_class="MiMoV2FlashForCausalLM",
    block=Block(factors={"v": "self_attn.v_scale"}, softmax=Softmax(shifted=True)),
)
MINIMAX_M3 = Architecture(
    model_type="minimax_m3_vl_text",
    hf_class="MiniMaxM3VLForCausalLM",
    gain_offset=1.0,
    block=Block(gate=None, mlp_in="mlp.gate_up_proj", gate_up=True),
)
LLAMA4 = Architecture(
    model_type="llama4_text",
    hf_class="Llama4ForCausalLM",
    also=("llama4",),
    block=Block(
        mlp="feed_forward",
        gate="feed_forward.gate_proj",
        mlp_in="feed_forward.up_proj",
        mlp_out="feed_forward.down_proj",
    ),
    kinds={
        "self_attn.qk_norm": {"q_norm": "self_attn.qk_norm", "k_norm": "self_attn.qk_norm", "qk_norm_rotated": True},
        "feed_forward.experts": {"gate": None, "mlp_in": None, "mlp_out": None, "flat_mlp_out": True},
    },
    constants={"rotary_adjacent_pairs": True},
)
JETMOE = Architecture(
    model_type="jetmoe",
    hf_class="JetMoeForCausalLM",
    block=Block(attn="self_attention", q=None, k=None, v=None, o=None, gate=None, mlp_in=None, mlp_out=None),
)
DBRX = Architecture(
    model_type="dbrx",
    hf_class="DbrxForCausalLM",
    embed="transformer.wte",
    layers="transformer.blocks",
    ln_final="transformer.norm_f",
    block=Block(
        ln1="norm_attn_norm.norm_1",
        attn="norm_attn_norm.attn",
        qkv="norm_attn_norm.attn.Wqkv",
        clips=True,
        o="norm_attn_norm.attn.out_proj",
        ln2="norm_attn_norm.norm_2",
        mlp="ffn",
        **mixture("ffn", "router.layer"),
    ),
    norm="LN",
    config={
        "num_experts": "ffn_config.moe_num_experts",
        "experts_per_token": "ffn_config.moe_top_k",
        "clip_qkv": "attn_config.clip_qkv",
    },
)
