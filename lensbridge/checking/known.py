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
INDEXED: Known = {
    "padding": {"left, row by row": "HuggingFace's index cuts keys into blocks from the row's start, padding included"}
}
GROWING: Known = {
    "padding": {"left, row by row": "unrotated queries grow with their place in HuggingFace's row, padding included"}
}
CLAMPED = {"blocks.{l}.mlp.hook_post": "its dense layers, too, clamp gate and linear part, and add one to that"}
MAPPED = {"embed.ln.*": "the token embedding is mapped together with two others before the sum"}
#: ProphetNet's streams of predictions are put behind the text's before they are normed.
PUT_TOGETHER = {"embed.ln.*": "the streams that predict are normed with the text's, behind it"}
NORMED_TWICE = {"norms' outputs": "the norm behind the MLP is called before the adapter, too, and shown there"}
PROMPT = {"hook_embed": "the model embeds a prompt of its own before the text"}
#: Where the model does not look at the attention mask, or looks at positions of the padded text.
PADDING_COUNTS = {"padding": {"left, row by row": "HuggingFace's model lets padding on the left take part"}}
#: Doge's masks.
OF_VALUES: Known = {
    **dict.fromkeys(
        ("identities", "identities, processed"),
        {"blocks.{l}.attn.hook_attn_scores": "a mask that is computed from the values is added to the scores"},
    ),
    "effects": {"values are mixed by the pattern": "the mask on the scores is computed from the values, and changes"},
}
#: BLT's embeddings of several bytes.
HASHED = {"blocks.{l}.hook_resid_pre": "embeddings of the bytes before, by their hashes, are added to the first stream"}
#: Inkling's distances.
MIXED = {"blocks.{l}.attn.hook_attn_scores": "each position mixes a bias for its distance to others by what is there"}
SPARSE = {"blocks.{l}.mlp.hook_post": "some layers set what is small in pre to zero before the activation function"}

KNOWN: dict[str, Known] = {
    "deepseek_v4": PADDING_COUNTS,
    "blt": {
        "identities": HASHED,
        "identities, processed": HASHED,
        "padding": {"left, row by row": "HuggingFace's model makes patches, and hashes, of padding, too"},
    },
    "diffllama": {
        "gradients": {"parameters": "a norm behind it takes away most of what lambda does: 2e-4 of rounding are left"}
    },
    "doge": OF_VALUES,
    "doge@experts": {
        **OF_VALUES,
        "padding": {
            "*, row by row": "HuggingFace cuts the scores of all tokens of a batch into two halves, one for each "
            "half of the experts' keys, so that a token's experts depend on the other rows"
        },
    },
    "gemma3n_text": {"identities": SPARSE, "identities, processed": SPARSE},
    "hrm_text": {"gradients": {"blocks.{l}.*": "HuggingFace runs all but the last runs of a stack without gradients"}},
    "hy_v4": {
        "gradients": {"parameters": "what scales a gate has a gradient of large sums that cancel, to 2e-4 of rounding"}
    },
    **dict.fromkeys(("inkling_text", "inkling_text@padded"), {"identities": MIXED, "identities, processed": MIXED}),
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
    **dict.fromkeys(("llama4", "llama4_text", "llama4_text@interleaved"), GROWING),
    "minimax_m3_vl_text": {**INDEXED, "identities": CLAMPED, "identities, processed": CLAMPED},
    "xmod": {"HuggingFace's values": NORMED_TWICE, **COUNTS_FROM_ZERO},
    "xmod@pre_norm": {
        "HuggingFace's values": NORMED_TWICE,
        **COUNTS_FROM_ZERO,
    },
    "xlm": {"effects": {"patterns are causal and sum to 1": "every position attends to every other"}},
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
    "recurrent_gemma": {
        "padding": {"left, row by row": "HuggingFace's recurrence runs over the padding before a text, mask or no mask"}
    },
    "rwkv": PADDING_COUNTS
    | {
        "generation": {
            "greedy": "what HuggingFace's shift keeps of the last token has no axis of positions: with two texts, a "
            "step runs at two positions"
        }
    },
    "xlstm": PADDING_COUNTS | {"bfloat16": {"no hooks": "HuggingFace's own forward fails in bfloat16"}},
}
