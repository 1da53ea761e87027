"""ProphetNet's decoder (Qi et al. 2020), alone.

BART's norms, and several streams, one behind the other on the axis of positions: the text's, and one for each token to
come that is predicted. All read the text's; the first prediction's is unembedded.
"""

from .forms import Refusal, Softmax
from .record import Architecture, Block

STREAMS = Refusal(
    tuple(f"attn.hook_{name}" for name in ("attn_scores", "pattern", "z", "result")),
    "attention runs twice in this layer, for the text and for the tokens to come, with patterns of two forms",
)

PROPHETNET = Architecture(
    model_type="prophetnet",
    hf_class="ProphetNetForCausalLM",
    embed="prophetnet.decoder.word_embeddings",
    pos_embed="prophetnet.decoder.position_embeddings",
    pos_after_padding=True,
    embed_norm="prophetnet.decoder.embeddings_layer_norm",
    embed_norm_of_sum=True,
    embed_extra="the streams of predictions are put behind the text's",
    layers="prophetnet.decoder.layers",
    ln_final=None,
    several_unembedded=True,
    rereads="how many positions the streams of predictions have comes of the text's",
    block=Block(
        ln1="self_attn_layer_norm",
        q="self_attn.query_proj",
        k="self_attn.key_proj",
        v="self_attn.value_proj",
        o="self_attn.out_proj",
        ln2="feed_forward_layer_norm",
        mlp="feed_forward",
        gate=None,
        mlp_in="feed_forward.intermediate",
        mlp_out="feed_forward.output",
        rotary=False,
        post_norm=True,
        softmax=Softmax(call=None),
        refusals=(STREAMS,),
    ),
    norm="LN",
    constants={"positional_embedding_type": "relative_positional_bias"},
)
