"""Inkling's language model (Thinking Machines Lab 2026).

A norm behind the embedding; norms of each head's queries and keys; instead of a rotation, each position mixes a bias
for its distance to others. Keys, values and what attention and MLP write go through short convolutions over positions.
Local and global layers have different numbers of heads; a mixture of experts in all but the first layers.
"""

from .record import Architecture, Block

INKLING_TEXT = Architecture(
    model_type="inkling_text",
    hf_class="InklingForCausalLM",
    embed_norm="model.embed_tokens.embed_norm",
    unembed_divisor="config.logits_mup_width_multiplier",
    block=Block(
        k=None,
        v=None,
        values="self_attn.v_sconv",
        attn_through="attn_sconv",
        mlp_through="mlp_sconv",
    ),
    kinds={"mlp.global_scale": {"factors": {"mlp_out": "mlp.global_scale"}}},
    config={"num_experts": "n_routed_experts"},
    constants={"positional_embedding_type": "relative_positional_bias"},
    variants={"unpadded_vocab_size": {"after_unembed": "cut"}},
)
