"""Which tokens do the singular directions of a weight matrix speak of?

The directions that a head or an MLP layer reads or writes most strongly are the singular vectors of its weight matrix.
Multiplied with the unembedding, each becomes a score for every token (Millidge and Black 2022, "The Singular Value
Decompositions of Transformer Weight Matrices are Highly Interpretable").
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float

from .factored_matrix import FactoredMatrix

OUTPUT_EMBEDDING = "unembed.W_U"
VECTOR_TYPES = ["OV", "w_in", "w_out"]


class SVDInterpreter:
    """Singular vectors of a model's weights, read through its unembedding (TransformerLens' class of the same name).

    The weights are those that the model shows when asked, so in the basis of its processing, and after training the
    trained ones.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """All weights of the model under TransformerLens' names."""
        return self.model.state_dict()

    def get_singular_vectors(
        self,
        vector_type: Literal["OV", "w_in", "w_out"],
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> Float[torch.Tensor, "d_vocab 1 num_vectors"]:
        """The score of every token on the first right singular vectors of one matrix.

        Args:
            vector_type: "OV" for what a head writes, ``W_V @ W_O``; "w_in" for what an MLP layer reads; "w_out" for
                what it writes.
            layer_index: the layer, from 0.
            num_vectors: how many, strongest first.
            head_index: the head, needed for "OV" only.

        The sign of a singular vector is arbitrary, and may differ between devices.

        Raises:
            AssertionError: for a layer or head that does not exist, or "OV" without a head.
            ValueError: for another vector type.
            IndexError: for more vectors than the matrix has.
        """
        if head_index is None and vector_type not in ("w_in", "w_out"):
            raise AssertionError(f"Head index optional only for w_in and w_out, got {vector_type}")
        if vector_type not in VECTOR_TYPES:
            raise ValueError(f"Vector type must be in {VECTOR_TYPES}, instead got {vector_type}")
        _check_index("Layer", layer_index, self.cfg.n_layers)
        if vector_type == "OV":
            assert head_index is not None
            _check_index("Head", head_index, self.cfg.n_heads)
            attention = self.model.blocks[layer_index].attn
            directions = FactoredMatrix(attention.W_V[head_index], attention.W_O[head_index]).V.T
        else:
            matrix = self._w_in(layer_index) if vector_type == "w_in" else self.model.blocks[layer_index].mlp.W_out
            directions = torch.linalg.svd(matrix.float(), full_matrices=False).Vh
        if num_vectors > len(directions):
            raise IndexError(f"{vector_type} of layer {layer_index} has {len(directions)} singular vectors, no more")
        unembedding = self.model.W_U
        scores = directions[:num_vectors].to(unembedding.dtype) @ unembedding
        return scores.T.unsqueeze(1)

    def _w_in(self, layer: int) -> torch.Tensor:
        """What the MLP reads from its norm's input, ``[d_mlp, d_model]``: with the norm's gain, folded or not."""
        block = self.model.blocks[layer]
        gain = getattr(block.ln2, "w", None)
        return block.mlp.W_in.T if gain is None else block.mlp.W_in.T * gain


def _check_index(kind: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise AssertionError(f"{kind} index must be between 0 and {count - 1} but got {index}")
