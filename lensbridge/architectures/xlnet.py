"""XLNet (Yang et al. 2019).

- norms behind attention and MLP; positions come before the batch in HuggingFace's layers
- projections are parameters of attention; scores are sums of products with the keys and with their distances, each with
  a bias of its own; without a permutation mask, every position attends to every other
"""

from .forms import Refusal, Softmax
from .record import Architecture, Block

WITH_BIASES = Refusal(
    ("attn.hook_rot_q", "attn.hook_rot_k"),
    "queries meet keys, and distances, with a bias for each: none is a query as it meets keys",
)

XLNET = Architecture(
    model_type="xlnet",
    hf_class="XLNetLMHeadModel",
    embed="transformer.word_embedding",
    layers="transformer.layer",
    ln_final=None,
    unembed="lm_loss",
    positions_first="transformer",
    key_value_cache="none",
    no_text="it is asked for a token by a mask of permutations, which is no argument here",
    block=Block(
        ln1="rel_attn.layer_norm",
        attn="rel_attn",
        q=None,
        k=None,
        v=None,
        o=None,
        # Its first call is on the pattern.
        attn_branch="rel_attn.dropout",
        attn_branch_call=1,
        ln2="ff.layer_norm",
        mlp="ff",
        gate=None,
        mlp_in="ff.layer_1",
        mlp_out="ff.layer_2",
        mlp_branch="ff.layer_2",
        query_argument=0,
        post_norm=True,
        softmax=Softmax(call="rel_attn_core", mask=-6e4),
        refusals=(WITH_BIASES,),
    ),
    norm="LN",
    config={"act_fn": "ff_activation", "d_head": "d_head"},
    constants={"positional_embedding_type": "relative_positional_bias"},
    refused={"chunk_size_feed_forward": "its MLPs run on pieces of the text, one after the other"},
)
