"""What do families have no meaning for, although a place for it could be named?

Refused by name are families of which nothing between embedding and logits is one tensor for each layer. Where only some
points have no meaning, a layer's record says so with one of the refusals here; that they are right is tested, by what
these points would be if they were offered.
"""

from .forms import Refusal

#: Model type -> (its HF class, why there is no record of it).
REFUSED = {
    "reformer": (
        "ReformerModelWithLMHead",
        "its layers have two residual streams and no gradients: they run inside a function that runs them again in the "
        "backward pass, without the hooks",
    ),
}

#: What stands on the residual stream, or is added to it.
ON_STREAM = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    *("hook_attn_out", "attn.hook_result", "hook_mlp_out"),
)
#: Copies of it.
COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")

HYPER_CONNECTIONS = Refusal(
    (*ON_STREAM, *COPIES),
    "there are several residual streams, from which attention and MLP read a mix and to which they write in shares "
    "(hyper-connections)",
)
ALTERNATING_UPDATES = Refusal(
    (*ON_STREAM, *COPIES),
    "there are several residual streams, each of which is predicted from all and corrected by what the layer computes "
    "for one (AltUp)",
)
COMPRESSED = Refusal(
    tuple(f"attn.hook_{name}" for name in ("rot_q", "rot_k", "v", "attn_scores", "pattern", "z")),
    "attention in this layer reads summaries of positions beside positions, so that its keys are not the text's",
)
#: Layers with two attentions, one after the other, and an MLP behind each.
TWICE = Refusal(
    (
        *("hook_resid_mid", "hook_attn_out", "hook_mlp_out", *COPIES),
        *(f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")),
        *(f"{norm}.hook_{name}" for norm in ("ln1", "ln2") for name in ("scale", "normalized")),
        *(f"mlp.hook_{name}" for name in ("pre", "pre_linear", "post", "expert_weights", "expert_indices")),
    ),
    "each layer attends twice and has an MLP behind each time, beside a mixture of experts over both",
)
BESIDE_STREAM = Refusal(
    ("ln1.hook_scale", "ln1.hook_normalized"),
    "the norm before the mixer reads the stream and what the shared attention makes of it, added together",
)
KEYS_OF_ANOTHER = Refusal(
    ("attn.hook_k", "attn.k_norm.hook_scale", "attn.k_norm.hook_normalized"),
    "this layer attends to the keys and values of an earlier one",
)

#: What some families' code does with an option that transformers' masks ask every config for.
STAYS_CAUSAL = {
    "is_causal=False": "HuggingFace's scaled dot product attention stays causal with it, and its eager attention does "
    "not"
}
