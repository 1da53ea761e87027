"""How do TransformerLens' five processing options change the weights?

Each option leaves the function of the model alone and changes the basis its intermediate values are written in. Here
they are as functions on the weights of one branch of a model (a layer's attention or MLP, or the unembedding, with the
norm before it), as dicts of TransformerLens-shaped weights: they return new dicts and touch no model. Weight views use
them as they are (`weights.py`), `weight_processing.py` applies them to whole state dicts; what the same options do to
activations is in `basis.py`.

Keys and values may have fewer heads than queries. A branch whose norm has no ``ln.b`` has an RMS norm: that one does
not remove the mean, so the weights that read it keep theirs.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", argues why these bases are the handier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .factored_matrix import FactoredMatrix

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Processing:
    """Which of TransformerLens' processing options are in force."""

    fold_ln: bool = False
    center_writing_weights: bool = False
    center_unembed: bool = False
    fold_value_biases: bool = False
    refactor_factored_attn_matrices: bool = False

    @property
    def any(self) -> bool:
        """Whether any option is on, so that weights are derived and not the model's own."""
        return self != Processing()

    @property
    def moves_value_bias(self) -> bool:
        """Whether values lose their bias to ``b_O`` (refactoring needs that too)."""
        return self.fold_value_biases or self.refactor_factored_attn_matrices


def _centred(weight: Tensor, dim: int) -> Tensor:
    return weight - weight.mean(dim, keepdim=True)


ATTENTION_READERS = {"W_Q": "b_Q", "W_K": "b_K", "W_V": "b_V"}
MLP_READERS = {"W_in": "b_in", "W_gate": "b_gate"}
UNEMBED_READERS = {"W_U": "b_U"}
#: In a mixture of experts, where weights lie [out, in]; in the branch of the MLP it is the router.
EXPERT_READERS = {"W_in.weight": "W_in.bias", "W_gate.weight": "W_gate.bias"}
EMBEDDINGS = ("W_E", "W_pos")
#: TransformerLens centres every reader but this one.
NOT_CENTRED = "W_gate"


def fold_norm_into(
    w: Mapping[str, Tensor], readers: Mapping[str, str], fold_biases: bool = True, center_weights: bool = True
) -> Weights:
    """Fold a norm's ``ln.w`` and ``ln.b`` into the weights that read its output.

    Args:
        w: weights of one branch. Without ``ln.w`` there is nothing to fold, and the readers are only centred.
        readers: weight -> its bias; the weights have d_model second from the end. Those that ``w`` lacks are passed
            over, and a bias that it lacks is made when it has something to take.
        fold_biases: fold ``ln.b`` too (into the biases).
        center_weights: make the readers ignore the input's mean, which the norm has removed.
    """
    out, gain = dict(w), w.get("ln.w")
    shift = w.get("ln.b") if fold_biases and gain is not None else None
    here = {weight: bias for weight, bias in readers.items() if weight in w}
    if not here:
        return out
    for weight, bias in here.items():
        if shift is not None:
            constant = (w[weight] * shift[:, None]).sum(-2)
            out[bias] = w[bias] + constant if bias in w else constant
        folded = w[weight] if gain is None else w[weight] * gain[:, None]
        out[weight] = _centred(folded, -2) if center_weights and weight != NOT_CENTRED else folded
    if gain is not None:
        out["ln.w"] = torch.ones_like(gain)
    if shift is not None:
        out["ln.b"] = torch.zeros_like(shift)
    return out


def center(w: Mapping[str, Tensor], names: tuple[str, ...]) -> Weights:
    """Make the named weights write nothing along the all-ones direction of their last axis."""
    return {**w, **{name: _centred(w[name], -1) for name in names if name in w}}


def move_value_bias(w: Mapping[str, Tensor]) -> Weights:
    """Carry ``b_V`` into ``b_O``: patterns sum to one, so a value bias adds a constant to the output.

    Raises:
        ValueError: if the heads of ``b_V`` and ``W_O`` do not match.
    """
    bias, out_of = w["b_V"], w["W_O"]
    if bias.ndim != 2 or out_of.ndim != 3 or len(out_of) % len(bias) or bias.shape[1] != out_of.shape[1]:
        raise ValueError(
            f"b_V has shape {tuple(bias.shape)} and W_O {tuple(out_of.shape)}: expected [heads, d_head], with as many "
            "heads as W_O or a part of them, and [heads, d_head, d_model]"
        )
    per_head = bias.repeat_interleave(len(out_of) // len(bias), dim=0)
    constant = torch.einsum("hd,hdm->m", per_head, out_of)
    return {**w, "b_O": w["b_O"] + constant if "b_O" in w else constant, "b_V": torch.zeros_like(bias)}


def refactor_attention(w: Mapping[str, Tensor]) -> Weights:
    """Rewrite each head's QK and OV circuits by their singular value decomposition.

    ``W_Q`` and ``W_K`` share the singular values evenly (biases ride along as an extra input row), ``W_O`` gets
    orthonormal rows, and ``b_V`` moves into ``b_O``.
    """
    query = torch.cat([w["W_Q"], w["b_Q"][:, None, :]], dim=1)
    key = torch.cat([w["W_K"], w["b_K"][:, None, :]], dim=1)
    even_query, even_key_t = FactoredMatrix(query, key.transpose(-1, -2)).make_even().pair
    even_key = even_key_t.transpose(-1, -2)
    left, singular, right = FactoredMatrix(w["W_V"], w["W_O"]).svd()
    return {
        **move_value_bias(w),
        "W_Q": even_query[:, :-1, :],
        "b_Q": even_query[:, -1, :],
        "W_K": even_key[:, :-1, :],
        "b_K": even_key[:, -1, :],
        "W_V": left @ singular.diag_embed(),
        "W_O": right.transpose(-1, -2),
    }


def process_embedding(w: Weights, processing: Processing) -> Weights:
    """``W_E`` and ``W_pos``."""
    return center(w, EMBEDDINGS) if processing.center_writing_weights else w


def process_attention(w: Weights, processing: Processing) -> Weights:
    """One layer's attention with its norm."""
    if processing.fold_ln:
        w = fold_norm_into(w, ATTENTION_READERS, center_weights="ln.b" in w)
    if processing.center_writing_weights:
        w = center(w, ("W_O", "b_O"))
    # A layer may have something else in attention's place.
    if processing.fold_value_biases and "b_V" in w:
        w = move_value_bias(w)
    if processing.refactor_factored_attn_matrices:
        w = refactor_attention(w)
    return w


def process_mlp(w: Weights, processing: Processing) -> Weights:
    """One layer's MLP with its norm; of a mixture of experts, the router."""
    if "W_gate.weight" in w:
        return process_expert(w, processing)
    if processing.fold_ln:
        w = fold_norm_into(w, MLP_READERS, center_weights="ln.b" in w)
    if processing.center_writing_weights:
        w = center(w, ("W_out", "b_out"))
    return w


def process_expert(w: Weights, processing: Processing) -> Weights:
    """One expert with the norm before the MLP; or a router with it."""
    flipped = {name: weight.T if name.endswith(".weight") else weight for name, weight in w.items()}
    if processing.fold_ln:
        flipped = fold_norm_into(flipped, EXPERT_READERS, center_weights="ln.b" in w)
    if processing.center_writing_weights:
        flipped = center(flipped, ("W_out.weight", "W_out.bias"))
    return {name: weight.T if name.endswith(".weight") else weight for name, weight in flipped.items()}


def process_unembed(w: Weights, processing: Processing) -> Weights:
    """The unembedding with the final norm."""
    if processing.fold_ln:
        w = fold_norm_into(w, UNEMBED_READERS, center_weights="ln.b" in w)
    if processing.center_unembed:
        w = center(w, ("W_U", "b_U"))
    return w
