"""Llama (Touvron et al. 2023) and the families whose blocks are Llama's.

- sequential blocks, RMSNorm before each branch and at the end; rotary positions; grouped queries; gated MLP
- the same under other names: Code World Model (2025) and Ministral (2024) with local and global attention in turn, Emu3
  (Wang et al. 2024), Seed-OSS (2025)
- ERNIE 4.5 (2025), Helium (Kyutai 2025): rotation pairs neighbouring dimensions
- Ministral 3 (2025): rotated queries grow with their position
- SmolLM3 (2025): no rotation in every fourth layer
- Moshi (Défossez et al. 2024): gate and up in one projection; what it hears and says is left out
- HunYuan (2025): a norm of each head's queries and keys when they are rotated
- BitNet (Wang et al. 2023): a norm of what the output projection of attention is given, and of what the MLP's is
- Llama 3.2 with eyes (2024): layers that attend to an image, which a text does not pass, are not counted
- GOT-OCR 2 (Wei et al. 2024), MOSS-Transcribe-Diarize: a Qwen below a model that also sees or hears
"""

from .record import Architecture, Block

LLAMA = Architecture(
    model_type="llama", hf_class="LlamaForCausalLM", also=("internlm3", "iquestcoder"), constants={"final_rms": True}
)
MISTRAL = Architecture(model_type="mistral", hf_class="MistralForCausalLM")
#: Biases on queries, keys and values.
QWEN2 = Architecture(model_type="qwen2", hf_class="Qwen2ForCausalLM", constants={"final_rms": True})
#: A norm of each head's queries and keys.
QWEN3 = Architecture(model_type="qwen3", hf_class="Qwen3ForCausalLM", constants={"final_rms": True})
CWM = Architecture(model_type="cwm", hf_class="CwmForCausalLM")
EMU3 = Architecture(model_type="emu3", hf_class="Emu3ForCausalLM")
MINISTRAL = Architecture(model_type="ministral", hf_class="MinistralForCausalLM")
MINISTRAL3 = Architecture(model_type="ministral3", hf_class="Ministral3ForCausalLM")
SEED_OSS = Architecture(model_type="seed_oss", hf_class="SeedOssForCausalLM")
ERNIE4_5 = Architecture(
    model_type="ernie4_5", hf_class="Ernie4_5ForCausalLM", constants={"rotary_adjacent_pairs": True}
)
HELIUM = Architecture(model_type="helium", hf_class="HeliumForCausalLM", constants={"rotary_adjacent_pairs": True})
SMOLLM3 = Architecture(
    model_type="smollm3", hf_class="SmolLM3ForCausalLM", by_layer={"no_rope_layers": {0: {"rotary": False}}}
)
MOSHI = Architecture(
    model_type="moshi",
    hf_class="MoshiForCausalLM",
    block=Block(
        q="self_attn.q_proj.linear",
        k="self_attn.k_proj.linear",
        v="self_attn.v_proj.linear",
        o="self_attn.o_proj.linear",
        gate=None,
        mlp_in="mlp.fc1",
        gate_up=True,
        mlp_out="mlp.fc2",
    ),
)
HUNYUAN_DENSE = Architecture(
    model_type="hunyuan_v1_dense",
    hf_class="HunYuanDenseV1ForCausalLM",
    block=Block(
        q_norm="self_attn.query_layernorm",
        k_norm="self_attn.key_layernorm",
        qk_norm_heads_first=True,
        qk_norm_rotated=True,
    ),
)
BITNET = Architecture(
    model_type="bitnet",
    hf_class="BitNetForCausalLM",
    block=Block(z_from_call=True, z_norm="self_attn.attn_sub_norm", neuron_norm="mlp.ffn_sub_norm"),
)
MLLAMA = Architecture(model_type="mllama", hf_class="MllamaForCausalLM", unused_with="cross_attn")
MLLAMA_MULTIMODAL = MLLAMA.within("mllama", "MllamaForConditionalGeneration")
GOT_OCR2 = QWEN2.within("got_ocr2", "GotOcr2ForConditionalGeneration")
MOSS_TRANSCRIBE_DIARIZE = QWEN3.within("moss_transcribe_diarize", "MossTranscribeDiarizeForConditionalGeneration")
