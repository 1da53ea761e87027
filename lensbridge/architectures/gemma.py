"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025) and VaultGemma (Sinha et al. 2025).

- Llama's block; norms store their gain less one; the embedding multiplies by sqrt(d_model)
- Gemma 2 and 3: a norm of what each branch writes, local and global attention in turn; Gemma 2 caps scores and logits,
  Gemma 3 has a norm of each head's queries and keys; its larger models also see
- VaultGemma: Gemma 2 without those norms
"""

from dataclasses import replace

from .record import Architecture, Block

GEMMA = Architecture(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    embed_scale="embed_scale",
    gain_offset=1.0,
    constants={"final_rms": True},
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
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
)
GEMMA3_MULTIMODAL = GEMMA3.within("gemma3", "Gemma3ForConditionalGeneration")
