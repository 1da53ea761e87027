"""How do TransformerLens' five processing options change the weights?

Each option leaves the function of the model alone and changes the basis its intermediate values are written in. Here
they are as functions on dicts of TransformerLens-shaped weights that return new dicts: on the weights of one layer's
branch, which is how weight views use them (`weights.py`), and on whole state dicts, which is how TransformerLens offers
them. Nothing here touches a model; what the same options do to activations is in `basis.py`.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", argues why these bases are the handier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def fold_norm_into(
    w: Mapping[str, Tensor], readers: Mapping[str, str], fold_biases: bool = True, center_weights: bool = True
) -> Weights:
    """Fold a norm's ``ln.w`` and ``ln.b`` into the weights that read its output.

    Args:
        w: weights of one branch, with ``ln.w`` and ``ln.b`` among them.
        readers: weight -> its bias; the weights have d_model second from the end.
        fold_biases: fold ``ln.b`` too (into the biases).
        center_weights: make the readers ignore the input's mean, which the norm has removed.
    """
    out = dict(w)
    for weight, bias in readers.items():
        if fold_biases:
            out[bias] = w[bias] + (w[weight] * w["ln.b"][:, None]).sum(-2)
        folded = w[weight] * w["ln.w"][:, None]
        out[weight] = _centred(folded, -2) if center_weights else folded
    out["ln.w"] = torch.ones_like(w["ln.w"])
    if fold_biases:
        out["ln.b"] = torch.zeros_like(w["ln.b"])
    return out


ATTENTION_READERS = {"W_Q": "b_Q", "W_K": "b_K", "W_V": "b_V"}
MLP_READERS = {"W_in": "b_in"}
UNEMBED_READERS = {"W_U": "b_U"}
EMBEDDINGS = ("W_E", "W_pos")


def center(w: Mapping[str, Tensor], names: tuple[str, ...]) -> Weights:
    """Make the named weights write nothing along the all-ones direction of their last axis."""
    return {**w, **{name: _centred(w[name], -1) for name in names if name in w}}


def move_value_bias(w: Mapping[str, Tensor]) -> Weights:
    """Carry ``b_V`` into ``b_O``: patterns sum to one, so a value bias adds a constant to the output."""
    return {
        **w,
        "b_O": w["b_O"] + torch.einsum("hd,hdm->m", w["b_V"], w["W_O"]),
        "b_V": torch.zeros_like(w["b_V"]),
    }


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
        w = fold_norm_into(w, ATTENTION_READERS)
    if processing.center_writing_weights:
        w = center(w, ("W_O", "b_O"))
    if processing.fold_value_biases:
        w = move_value_bias(w)
    if processing.refactor_factored_attn_matrices:
        w = refactor_attention(w)
    return w


def process_mlp(w: Weights, processing: Processing) -> Weights:
    """One layer's MLP with its norm."""
    if processing.fold_ln:
        w = fold_norm_into(w, MLP_READERS)
    if processing.center_writing_weights:
        w = center(w, ("W_out", "b_out"))
    return w


def process_unembed(w: Weights, processing: Processing) -> Weights:
    """The unembedding with the final norm."""
    if processing.fold_ln:
        w = fold_norm_into(w, UNEMBED_READERS)
    if processing.center_unembed:
        w = center(w, ("W_U", "b_U"))
    return w


# --- the same on whole state dicts ------------------------------------------------------------------------------------

#: branch of a state dict -> (prefix of its norm, prefix of its weights); ``{l}`` runs over the layers.
BRANCHES = {
    "attn": ("blocks.{l}.ln1.", "blocks.{l}.attn."),
    "mlp": ("blocks.{l}.ln2.", "blocks.{l}.mlp."),
    "unembed": ("ln_final.", "unembed."),
}


def on_branch(state_dict: Weights, branch: str, n_layers: int, change: Callable[[Weights], Weights]) -> Weights:
    """``state_dict`` with ``change`` applied to each instance of a branch in it; the argument stays as it is."""
    out = dict(state_dict)
    norm_prefix, prefix = BRANCHES[branch]
    for layer in range(n_layers if "{l}" in prefix else 1):
        norm, here = norm_prefix.format(l=layer), prefix.format(l=layer)
        keys = {f"ln.{part}": norm + part for part in ("w", "b") if norm + part in out}
        keys |= {key[len(here) :]: key for key in out if key.startswith(here) and "." not in key[len(here) :]}
        if any(not short.startswith("ln.") for short in keys):
            changed = change({short: out[key] for short, key in keys.items()})
            out |= {key: changed[short] for short, key in keys.items()}
    return out


def fold_layer_norm(
    state_dict: Weights, n_layers: int, fold_biases: bool = True, center_weights: bool = True
) -> Weights:
    """Every norm folded into the weights that read it; the norms' own parameters become ones and zeros."""
    for branch, readers in (("attn", ATTENTION_READERS), ("mlp", MLP_READERS), ("unembed", UNEMBED_READERS)):

        def fold(w: Weights, readers: Mapping[str, str] = readers) -> Weights:
            here = {weight: bias for weight, bias in readers.items() if weight in w}
            return fold_norm_into(w, here, fold_biases, center_weights) if "ln.w" in w else w

        state_dict = on_branch(state_dict, branch, n_layers, fold)
    return state_dict


def center_writing_weights(state_dict: Weights, n_layers: int) -> Weights:
    """Everything that writes to the residual stream, centred over d_model."""
    out = center(state_dict, ("embed.W_E", "pos_embed.W_pos"))
    out = on_branch(out, "attn", n_layers, lambda w: center(w, ("W_O", "b_O")))
    return on_branch(out, "mlp", n_layers, lambda w: center(w, ("W_out", "b_out")))


def center_unembed(state_dict: Weights, n_layers: int) -> Weights:
    """The unembedding, centred over the vocabulary."""
    return on_branch(state_dict, "unembed", n_layers, lambda w: center(w, ("W_U", "b_U")))


def fold_value_biases(state_dict: Weights, n_layers: int) -> Weights:
    """Every ``b_V`` carried into its layer's ``b_O``."""
    return on_branch(state_dict, "attn", n_layers, move_value_bias)


def refactor_factored_attn_matrices(state_dict: Weights, n_layers: int) -> Weights:
    """Every head's circuits rewritten by their singular value decomposition."""
    return on_branch(state_dict, "attn", n_layers, refactor_attention)
