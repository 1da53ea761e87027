"""How do weights of older formats get TransformerLens' names and shapes?

Two formats are older than the one of today: that of the first SoLU models, which called norms "norm" and wrote matrices
``[out, in]``, and minGPT's (https://github.com/karpathy/minGPT), a GPT-2 with separate queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

State = dict[str, Tensor]

#: The first SoLU models of at most so many layers have their positions, or all their matrices, the other way round.
TURNED_POSITIONS, TURNED_MATRICES = 8, 6


def _as_it_is(value: Tensor, n_heads: int) -> Tensor:
    return value


def _turned(weight: Tensor, n_heads: int) -> Tensor:
    return weight.T


def _by_head(bias: Tensor, n_heads: int) -> Tensor:
    """[n_heads * d_head] -> [n_heads, d_head]"""
    return bias.unflatten(0, (n_heads, -1))


def _into_heads(weight: Tensor, n_heads: int) -> Tensor:
    """[n_heads * d_head, d_model] -> [n_heads, d_model, d_head]"""
    return weight.unflatten(0, (n_heads, -1)).transpose(1, 2)


def _out_of_heads(weight: Tensor, n_heads: int) -> Tensor:
    """[d_model, n_heads * d_head] -> [n_heads, d_head, d_model]"""
    return weight.T.unflatten(0, (n_heads, -1))


#: (name in minGPT, name here, what is done to the weight, given the number of heads)
MINGPT: list[tuple[str, str, Callable[[Tensor, int], Tensor]]] = [
    (r"tok_emb\.weight", "embed.W_E", _as_it_is),
    (r"pos_emb", "pos_embed.W_pos", lambda positions, n_heads: positions.squeeze(0)),
    (r"ln_f\.(w|b)\w+", r"ln_final.\1", _as_it_is),
    (r"head\.weight", "unembed.W_U", _turned),
    (r"(blocks\.\d+\.ln[12])\.(w|b)\w+", r"\1.\2", _as_it_is),
    (r"(blocks\.\d+\.attn)\.proj\.weight", r"\1.W_O", _out_of_heads),
    (r"(blocks\.\d+\.attn)\.proj\.bias", r"\1.b_O", _as_it_is),
    (r"(blocks\.\d+\.mlp)\.0\.weight", r"\1.W_in", _turned),
    (r"(blocks\.\d+\.mlp)\.0\.bias", r"\1.b_in", _as_it_is),
    (r"(blocks\.\d+\.mlp)\.2\.weight", r"\1.W_out", _turned),
    (r"(blocks\.\d+\.mlp)\.2\.bias", r"\1.b_out", _as_it_is),
]
for _part in ("query", "key", "value"):
    MINGPT += [
        (rf"(blocks\.\d+\.attn)\.{_part}\.weight", rf"\1.W_{_part[0].upper()}", _into_heads),
        (rf"(blocks\.\d+\.attn)\.{_part}\.bias", rf"\1.b_{_part[0].upper()}", _by_head),
    ]


def converted(state_dict: Mapping[str, Tensor], architecture: str | None, n_layers: int, n_heads: int) -> State:
    """A state dict in today's names and shapes.

    Args:
        state_dict: as it was read.
        architecture: "neel-solu-old" or "mingpt"; any other format is today's.
        n_layers: of the model that was saved.
        n_heads: the same.
    """
    if architecture == "neel-solu-old":
        return _first_solu(state_dict, n_layers)
    if architecture == "mingpt":
        return _mingpt(state_dict, n_heads)
    return dict(state_dict)


def _first_solu(state_dict: Mapping[str, Tensor], n_layers: int) -> State:
    out = {}
    for old, value in state_dict.items():
        name = re.sub(r"^ln\.", "ln_final.", old.replace("norm", "ln"))
        positions = name.endswith("W_pos")
        turned = n_layers <= (TURNED_POSITIONS if positions else TURNED_MATRICES)
        out[name] = value.transpose(-2, -1) if turned and "W_" in name else value
    return out


def _mingpt(state_dict: Mapping[str, Tensor], n_heads: int) -> State:
    out = {}
    for old, value in state_dict.items():
        for pattern, new, change in MINGPT:
            match = re.fullmatch(pattern, old)
            if match is not None:
                out[match.expand(new)] = change(value, n_heads)
                break
        else:
            out[old] = value
    return out
