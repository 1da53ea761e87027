"""GPT-J (Wang and Komatsuzaki 2021), CodeGen (Nijkamp et al. 2023) and GPT-Neo (Black et al. 2021).

- GPT-J: LayerNorm; attention and MLP read one norm of the same stream; rotary positions on pairs of neighbours, on a
  part of each head; plain MLP; a bias on the logits
- CodeGen: GPT-J with one projection in four blocks, each of which holds queries, then values, then keys
- GPT-Neo: sequential; learned positions; global and local attention in turn; scores are not scaled
"""

from dataclasses import replace

from .forms import Layout, Softmax
from .record import Architecture, Block

GPTJ = Architecture(
    model_type="gptj",
    hf_class="GPTJForCausalLM",
    embed="transformer.wte",
    layers="transformer.h",
    ln_final="transformer.ln_f",
    block=Block(
        ln1="ln_1",
        attn="attn",
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        o="attn.out_proj",
        ln2="ln_1",
        gate=None,
        mlp_in="mlp.fc_in",
        mlp_out="mlp.fc_out",
        parallel=True,
        query_argument=0,
        softmax=Softmax(call="_attn"),
    ),
    norm="LN",
    config={"rotary_dim": "rotary_dim"},
    constants={"rotary_adjacent_pairs": True},
)
CODEGEN = replace(
    GPTJ,
    model_type="codegen",
    hf_class="CodeGenForCausalLM",
    block=replace(
        GPTJ.block,
        qkv="attn.qkv_proj",
        qkv_layout=Layout(4, "qvk"),
        # The softmax is a module that is made there and called.
        softmax=Softmax(call="_attn", operation="call"),
    ),
)
GPT_NEO = Architecture(
    model_type="gpt_neo",
    hf_class="GPTNeoForCausalLM",
    embed="transformer.wte",
    pos_embed="transformer.wpe",
    layers="transformer.h",
    ln_final="transformer.ln_f",
    block=Block(
        ln1="ln_1",
        attn="attn.attention",
        q="attn.attention.q_proj",
        k="attn.attention.k_proj",
        v="attn.attention.v_proj",
        o="attn.attention.out_proj",
        ln2="ln_2",
        gate=None,
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        rotary=False,
        softmax=Softmax(call="_attn"),
    ),
    norm="LN",
    config={
        "attn_types": "attention_layers",
        "window_size": "window_size",
    },
    constants={"use_attn_scale": False, "use_local_attn": True},
)
