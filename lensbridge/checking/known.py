"""What does not hold on a family although it is served, and why?

Each entry is a check by its group and name (or a pattern of names) on one family of `lensbridge.tiny.FAMILIES`. The
tests fail on an entry that no longer fails, and on anything that fails without an entry.
"""

from __future__ import annotations

from .outcome import Known

FIXED_POSITIONS: Known = {
    "gradients": {"hook_pos_embed": "positions are fixed numbers, which HuggingFace leaves off its graph"}
}
COUNTS_PADDING: Known = {
    "padding": {"left, row by row": "HuggingFace's decoder takes no positions, and counts padding on the left"}
}
COUNTS_FROM_ZERO: Known = {
    "generation": {"greedy": "HuggingFace's generate counts positions from 0, its forward from behind the padding row"}
}
MAPPED = {"embed.ln.*": "the token embedding is mapped together with two others before the sum"}
#: ProphetNet's streams of predictions are put behind the text's before they are normed.
PUT_TOGETHER = {"embed.ln.*": "the streams that predict are normed with the text's, behind it"}
NORMED_TWICE = {"norms' outputs": "the norm behind the MLP is called before the adapter, too, and shown there"}
PROMPT = {"hook_embed": "the model embeds a prompt of its own before the text"}

KNOWN: dict[str, Known] = {
    "moshi": {
        "generation": {
            "greedy": "HuggingFace's cache forgets keys beyond a window that its masks do not have: it generates "
            "otherwise with its cache than without; here as without"
        }
    },
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "mbart"), COUNTS_PADDING),
    **dict.fromkeys(("mvp", "musicgen", "musicgen_melody", "plbart", "trocr"), COUNTS_PADDING),
    **dict.fromkeys(("marian", "pegasus"), {**COUNTS_PADDING, **FIXED_POSITIONS}),
    "xglm": FIXED_POSITIONS,
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "xlm-roberta"), COUNTS_FROM_ZERO),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl"), COUNTS_FROM_ZERO),
    "roc_bert": {"identities": MAPPED, "identities, processed": MAPPED},
    "xmod": {"HuggingFace's values": NORMED_TWICE, **COUNTS_FROM_ZERO},
    "xmod@pre_norm": {
        "HuggingFace's values": NORMED_TWICE,
        "effects": {"adding to hook_mlp_out is adding to hook_resid_post": "the adapter reads the sum"},
        **COUNTS_FROM_ZERO,
    },
    "xlnet": {
        "effects": {"patterns are causal and sum to 1": "without a permutation mask, positions attend to later ones"}
    },
    "prophetnet": {
        "identities": PUT_TOGETHER,
        "identities, processed": PUT_TOGETHER,
        "padding": {"*, row by row": "HuggingFace's positions, and its masks of what predicts, count padding"},
    },
    "cpmant": {
        "identities": PROMPT,
        "identities, processed": PROMPT,
        "effects": {"patterns are causal and sum to 1": "positions of the prompt attend to all others of it"},
        "padding": {"*, row by row": "HuggingFace's model takes no mask, and attends to padding"},
    },
}
