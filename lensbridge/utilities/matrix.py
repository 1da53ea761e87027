"""How much of what one matrix writes does another one read?

The composition score of two matrices is ``|L R| / (|L| |R|)`` with Frobenius norms (A Mathematical Framework for
Transformer Circuits, https://transformer-circuits.pub/2021/framework/index.html).
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from lensbridge.factored_matrix import FactoredMatrix

from .tensors import get_corner


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> Float[torch.Tensor, "*leading_dims"]:
    """Composition scores between factored matrices.

    With ``broadcast_dims`` every matrix of ``left`` meets every matrix of ``right``: the result has the leading
    dimensions of ``left``, then those of ``right``. Without, they are broadcast against each other. Orthogonal factors
    change no norm and are left out of the computation.

    Raises:
        AssertionError: ``left.rdim`` is not ``right.ldim``.
    """
    if left.rdim != right.ldim:
        raise AssertionError(
            f"left @ right must exist: left has shape {tuple(left.shape)}, right has {tuple(right.shape)}."
        )
    reads, writes = left.collapse_l(), right.collapse_r()
    if broadcast_dims:
        pairs_left = left.shape[:-2] + (1,) * (right.ndim - 2)
        reads = reads.reshape(pairs_left + reads.shape[-2:])
    norms = torch.linalg.matrix_norm
    return norms(reads @ writes) / norms(writes) / norms(reads)


def get_matrix_corner(matrix: FactoredMatrix, n: int = 3) -> torch.Tensor:
    """The first ``n`` entries of the product along every dimension; for a quick look."""
    return get_corner(matrix, n).AB
