"""ModernBERT's decoder (Warner et al. 2024; Weller et al. 2025).

LayerNorms, one of them behind the embedding and none before the first attention; local and global attention in turn; a
gated MLP from one projection; a linear map, an activation function and a norm before the unembedding.
"""

from .record import Architecture, Block

MODERNBERT_DECODER = Architecture(
    model_type="modernbert-decoder",
    hf_class="ModernBertDecoderForCausalLM",
    embed="model.embeddings.tok_embeddings",
    embed_norm="model.embeddings.norm",
    ln_final="model.final_norm",
    head="lm_head",
    unembed="decoder",
    block=Block(
        ln1=None,
        attn="attn",
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        o="attn.Wo",
        ln2="mlp_norm",
        gate=None,
        mlp_in="mlp.Wi",
        gate_up=True,
        mlp_out="mlp.Wo",
    ),
    kinds={"attn_norm.weight": {"ln1": "attn_norm"}},
    norm="LN",
)
