"""XLM (Conneau and Lample 2019).

Norms behind attention and MLP, and one of the sum of the embeddings; a layer's parts are in four lists. Unless its
config says ``causal``, every position attends to every other, and padding is set to zero in the stream.
"""

from .forms import Softmax
from .record import Architecture, Block

XLM = Architecture(
    model_type="xlm",
    hf_class="XLMWithLMHeadModel",
    embed="transformer.embeddings",
    pos_embed="transformer.position_embeddings",
    embed_norm="transformer.layer_norm_emb",
    embed_norm_of_sum=True,
    layers="transformer.attentions",
    ln_final=None,
    unembed="pred_layer.proj",
    key_value_cache="none",
    no_text="it is asked for a token by a mask token behind the text",
    block=Block(
        leaves="transformer.layer_norm2.{l}",
        ln1="transformer.layer_norm1.{l}",
        attn="",
        q="q_lin",
        k="k_lin",
        v="v_lin",
        o="out_lin",
        ln2="transformer.layer_norm2.{l}",
        mlp="transformer.ffns.{l}",
        gate=None,
        mlp_in="transformer.ffns.{l}.lin1",
        mlp_out="transformer.ffns.{l}.lin2",
        rotary=False,
        post_norm=True,
        softmax=Softmax(call=None),
    ),
    norm="LN",
    constants={"act_fn": "gelu"},
    variants={"gelu_activation=False": {"constants": {"act_fn": "relu"}}},
    refused={
        "asm": "its logits are an adaptive softmax of clusters of the vocabulary",
        "chunk_size_feed_forward": "its MLPs run on pieces of the text, one after the other",
    },
)
