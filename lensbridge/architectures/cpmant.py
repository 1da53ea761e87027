"""CPM-Ant (OpenBMB 2022).

- RMSNorms; a learned bias on the scores for each pair of positions and segments; gated MLP; the norms are inside the
  modules that add to the stream
- each text is run behind a learned prompt of ``prompt_length`` positions, which the points in the layers show and the
  logits leave out
"""

from .forms import Softmax
from .record import Architecture, Block

CPM_ANT = Architecture(
    model_type="cpmant",
    hf_class="CpmAntForCausalLM",
    embed="cpmant.input_embedding",
    embed_extra="the embedding of each segment is added",
    layers="cpmant.encoder.layers",
    ln_final="cpmant.encoder.output_layernorm",
    # The positions of the prompt are left out before it.
    head="lm_head",
    key_value_cache="whole text",
    rereads="its masks and biases on scores are made of the tokens, and the stream begins with a prompt of its own",
    block=Block(
        ln1="self_att.layernorm_before_attention",
        attn="self_att.self_attention",
        q="self_att.self_attention.project_q",
        k="self_att.self_attention.project_k",
        v="self_att.self_attention.project_v",
        o="self_att.self_attention.attention_out",
        ln2="ffn.layernorm_before_ffn",
        mlp="ffn.ffn",
        gate="ffn.ffn.w_in.w_0",
        mlp_in="ffn.ffn.w_in.w_1",
        mlp_out="ffn.ffn.w_out",
        rotary=False,
        softmax=Softmax(call=None, module="self_att.self_attention.softmax"),
    ),
    config={"d_head": "dim_head"},
    constants={"act_fn": "gelu", "positional_embedding_type": "relative_positional_bias"},
)
