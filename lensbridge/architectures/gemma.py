"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025) and VaultGemma (Sinha et al. 2025).

- Llama's block; norms store their gain less one; the embedding multiplies by sqrt(d_model)
- Gemma 2 and 3: a norm of what each branch writes, local and global attention in turn; Gemma 2 caps scores and logits,
  Gemma 3 has a norm of each head's queries and keys; its larger models also see
- Gemma 4 (2026): values are normed, too; the last layers may attend to keys and values of earlier ones; a layer may
  add what it makes of an embedding of its own, and multiplies the stream
- VaultGemma: Gemma 2 without those norms
"""

from dataclasses import replace

from .forms import Beside
from .irregular import KEYS_OF_ANOTHER
from .record import Architecture, Block

#: Patterns are shown by one of these, and logits may come of the other.
ONE_WAY_ONLY = {
    "use_bidirectional_attention": "HuggingFace's eager attention stays causal with it, and its scaled dot product "
    "attention does not"
}
GEMMA = Architecture(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    embed_scale="embed_scale",
    gain_offset=1.0,
    constants={"final_rms": True},
    refused=ONE_WAY_ONLY,
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    refused={},
    block=Block(
        ln1_post="post_attention_layernorm", ln2="pre_feedforward_layernorm", ln2_post="post_feedforward_layernorm"
    ),
    after_unembed="cap",
    config={
        "attn_scores_soft_cap": "attn_logit_softcapping",
        "output_logits_soft_cap": "final_logit_softcapping",
    },
)
VAULTGEMMA = replace(
    GEMMA2,
    model_type="vaultgemma",
    hf_class="VaultGemmaForCausalLM",
    block=Block(ln2="pre_feedforward_layernorm"),
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    block=replace(GEMMA2.block, qk_norm_heads_first=True),
    # HuggingFace's attention keeps the cap of scores, and does not use it.
    config={"output_logits_soft_cap": "final_logit_softcapping"},
)
GEMMA3_MULTIMODAL = replace(GEMMA3.within("gemma3", "Gemma3ForConditionalGeneration"), refused=ONE_WAY_ONLY)
SHARED_KEYS = {"num_kv_shared_layers": {"rereads": "the last layers attend to keys and values of earlier ones"}}
BESIDE = Beside(
    reads="pre_feedforward_layernorm_2",
    of_mlp="post_feedforward_layernorm_1",
    of_experts="post_feedforward_layernorm_2",
)
GEMMA4 = replace(
    GEMMA3,
    model_type="gemma4_text",
    hf_class="Gemma4ForCausalLM",
    gain_offset=0.0,
    block=replace(
        GEMMA2.block,
        k=None,
        v=None,
        extra="an embedding that the layer has for itself may add to it, and a scalar multiplies it",
        refusals=(KEYS_OF_ANOTHER,),
    ),
    kinds={
        "self_attn.q_norm": {"q_norm": "self_attn.q_norm"},
        "self_attn.v_norm": {"values": "self_attn.v_norm"},
        "self_attn.k_proj": {"k": "self_attn.k_proj", "k_norm": "self_attn.k_norm", "refusals": ()},
        "experts": {
            **dict.fromkeys(("gate", "mlp_in", "mlp_out")),
            **{"experts": "experts", "router": "router", "beside": BESIDE},
        },
    },
    variants={
        **SHARED_KEYS,
        "hidden_size_per_layer_input": {"rereads": "each layer has an embedding of its own of the tokens"},
    },
)
GEMMA4_MULTIMODAL = GEMMA4.within("gemma4", "Gemma4ForConditionalGeneration")
GEMMA4_UNIFIED = replace(
    GEMMA4, model_type="gemma4_unified_text", hf_class="Gemma4UnifiedForCausalLM", variants=SHARED_KEYS
)
GEMMA4_UNIFIED_MULTIMODAL = GEMMA4_UNIFIED.within("gemma4_unified", "Gemma4UnifiedForConditionalGeneration")
