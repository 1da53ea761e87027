"""Families with Llama's block and an MLP without a gate.

- Arcee (2025): squared ReLU
- NanoChat (Karpathy 2025): the same; norms have no gain, and one of them serves behind the embedding and at the end;
  another norms each head's queries and keys when they are rotated; logits are capped
- Apertus (2025): xIELU (Huang and Schlag 2024), whose two slopes are learned; a norm of each head's queries and keys
- Jais 2 (2025), Nemotron (Parmar et al. 2024), StarCoder 2 (Lozhkov et al. 2024): LayerNorms; Nemotron stores their
  gains less one and rotates a part of each head
- Persimmon (Elsen et al. 2023), Fuyu (Bavishi et al. 2023): LayerNorms, one projection that holds the query, key and
  value of a head next to each other, a norm of each head's queries and keys, squared ReLU
"""

from .forms import GROUPS
from .irregular import STAYS_CAUSAL
from .record import Architecture, Block

PLAIN = Block(gate=None)

ARCEE = Architecture(model_type="arcee", hf_class="ArceeForCausalLM", block=PLAIN)
APERTUS = Architecture(
    model_type="apertus",
    hf_class="ApertusForCausalLM",
    block=Block(
        ln1="attention_layernorm",
        ln2="feedforward_layernorm",
        act="mlp.act_fn",
        gate=None,
        qk_norm_heads_first=True,
    ),
    constants={"final_rms": True},
)
JAIS2 = Architecture(model_type="jais2", hf_class="Jais2ForCausalLM", block=PLAIN, norm="LN")
NEMOTRON = Architecture(
    model_type="nemotron",
    hf_class="NemotronForCausalLM",
    block=PLAIN,
    norm="LN",
    gain_offset=1.0,
    refused=STAYS_CAUSAL,
)
STARCODER2 = Architecture(
    model_type="starcoder2",
    hf_class="Starcoder2ForCausalLM",
    block=Block(gate=None, mlp_in="mlp.c_fc", mlp_out="mlp.c_proj"),
    norm="LN",
)
PERSIMMON = Architecture(
    model_type="persimmon",
    hf_class="PersimmonForCausalLM",
    ln_final="model.final_layernorm",
    block=Block(
        qkv="self_attn.query_key_value",
        qkv_layout=GROUPS,
        o="self_attn.dense",
        gate=None,
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
    ),
    norm="LN",
)
FUYU = PERSIMMON.within("fuyu", "FuyuForCausalLM")
NANOCHAT = Architecture(
    model_type="nanochat",
    hf_class="NanoChatForCausalLM",
    embed_norm="model.norm",
    block=Block(
        gate=None,
        mlp_in="mlp.fc1",
        mlp_out="mlp.fc2",
        qk_norm_heads_first=True,
        qk_norm_rotated=True,
    ),
    after_unembed="cap",
    config={"output_logits_soft_cap": "final_logit_softcapping"},
)
