"""How to compute with a product of two thin matrices without multiplying them out.

The matrices of interest in a transformer, such as an attention head's ``W_V @ W_O``, are huge and of low rank. Here the
factors A and B are kept apart, and products, norms, singular values and eigenvalues are found through the small
dimension between them. Any leading dimensions (layer, head) are carried along.
"""

from __future__ import annotations

import operator
import warnings
from functools import cached_property
from typing import Any, Protocol, cast, overload, runtime_checkable

import torch
from jaxtyping import Complex, Float


@runtime_checkable
class TensorLike(Protocol):
    """The part of a tensor's interface that is enough for a factor in constructions and products."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        ...

    @property
    def shape(self) -> Any:
        """Length of each dimension."""
        ...

    def size(self, dim: int) -> int:
        """Length of one dimension."""
        ...

    def unsqueeze(self, dim: int) -> Any:
        """Insert a dimension of length 1."""
        ...

    def squeeze(self, dim: int) -> Any:
        """Remove a dimension of length 1."""
        ...

    def broadcast_to(self, shape: Any) -> Any:
        """Expand dimensions of length 1."""
        ...

    def __matmul__(self, other: Any) -> Any: ...


def _precise(matrix: torch.Tensor) -> torch.Tensor:
    """16-bit values as float32, since decompositions do not exist for less."""
    return matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix


class FactoredMatrix:
    """The matrix ``A @ B``, kept as its two factors (TransformerLens' class of the same name).

    A is ``[..., ldim, mdim]`` and B ``[..., mdim, rdim]``; leading dimensions are broadcast against each other. The
    object behaves as the ``[..., ldim, rdim]`` product: it can be multiplied from both sides, transposed and indexed.
    :class:`TensorLike` factors serve for constructions and products only. The singular value decomposition is computed
    once and kept with the object, so A and B are not to be changed after it was asked for.

    Raises:
        AssertionError: the inner dimensions differ.
        RuntimeError: the leading dimensions cannot be broadcast.
    """

    A: Float[torch.Tensor, "*leading_dims ldim mdim"]
    B: Float[torch.Tensor, "*leading_dims mdim rdim"]
    ldim: int
    mdim: int
    rdim: int
    shape: torch.Size
    has_leading_dims: bool

    def __init__(
        self, A: Float[torch.Tensor, "... ldim mdim"] | TensorLike, B: Float[torch.Tensor, "... mdim rdim"] | TensorLike
    ) -> None:
        if A.size(-1) != B.size(-2):
            raise AssertionError(
                f"A @ B must exist: A has shape {tuple(A.shape)} and B {tuple(B.shape)}, so the inner dimensions are "
                f"{A.size(-1)} and {B.size(-2)}."
            )
        self.ldim, self.mdim, self.rdim = A.size(-2), B.size(-2), B.size(-1)
        self.has_leading_dims = max(A.ndim, B.ndim) > 2
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise RuntimeError(
                f"Shape mismatch: the leading dimensions of A {tuple(A.shape)} and B {tuple(B.shape)} cannot be "
                f"broadcast against each other. {error}"
            ) from error
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self.A = cast(torch.Tensor, A).broadcast_to((*leading, self.ldim, self.mdim))
        self.B = cast(torch.Tensor, B).broadcast_to((*leading, self.mdim, self.rdim))

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"

    @property
    def ndim(self) -> int:
        """Number of dimensions of the product."""
        return len(self.shape)

    @property
    def pair(
        self,
    ) -> tuple[Float[torch.Tensor, "*leading_dims ldim mdim"], Float[torch.Tensor, "*leading_dims mdim rdim"]]:
        """Both factors, ``(A, B)``."""
        return self.A, self.B

    @property
    def AB(self) -> Float[torch.Tensor, "*leading_dims ldim rdim"]:
        """The product itself, multiplied out: large, and not kept."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[torch.Tensor, "*leading_dims mdim mdim"]:
        """The product of the factors in reverse, which has the same nonzero eigenvalues.

        Raises:
            AssertionError: the matrix is not square.
        """
        if self.ldim != self.rdim:
            raise AssertionError(f"B @ A exists only for a square matrix, not for shape {tuple(self.shape)}.")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose, of the last two dimensions."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @overload
    def __matmul__(self, other: FactoredMatrix | Float[torch.Tensor, "... rdim new_rdim"]) -> FactoredMatrix: ...

    @overload
    def __matmul__(self, other: Float[torch.Tensor, " rdim"]) -> Float[torch.Tensor, "... ldim"]: ...  # type: ignore[overload-cannot-match]

    def __matmul__(self, other: Any) -> Any:
        """``self @ other`` as a FactoredMatrix; for a vector, the product itself.

        Raises:
            AssertionError: a matrix does not have ``rdim`` rows.
        """
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if other.ndim < 2:
            # As a column, so that leading dimensions broadcast.
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        if other.size(-2) != self.rdim:
            raise AssertionError(
                f"a matrix right of @ must have {self.rdim} rows: the shapes are {tuple(self.shape)} and "
                f"{tuple(other.shape)}."
            )
        # The smaller of the two possible inner dimensions.
        return FactoredMatrix(self.A, self.B @ other) if self.mdim < self.rdim else FactoredMatrix(self.AB, other)

    @overload
    def __rmatmul__(self, other: FactoredMatrix | Float[torch.Tensor, "... new_ldim ldim"]) -> FactoredMatrix: ...

    @overload
    def __rmatmul__(self, other: Float[torch.Tensor, " ldim"]) -> Float[torch.Tensor, "... rdim"]: ...  # type: ignore[overload-cannot-match]

    def __rmatmul__(self, other: Any) -> Any:
        """``other @ self`` as a FactoredMatrix; for a vector, the product itself.

        Raises:
            AssertionError: ``other`` does not have ``ldim`` columns (entries, for a vector).
        """
        if isinstance(other, FactoredMatrix):
            return other.A @ (other.B @ self)
        if other.size(-1) != self.ldim:
            raise AssertionError(
                f"what is left of @ must end in a dimension of {self.ldim}: the shapes are {tuple(other.shape)} and "
                f"{tuple(self.shape)}."
            )
        if other.ndim < 2:
            return (other.unsqueeze(-2) @ self.A @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B) if self.mdim < self.ldim else FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: int | float | torch.Tensor) -> FactoredMatrix:
        """The matrix times a number (a tensor must have one entry).

        Raises:
            AssertionError: the tensor has more than one entry.
        """
        if isinstance(scalar, torch.Tensor) and scalar.numel() != 1:
            raise AssertionError(
                f"* takes a single number, not a tensor of shape {tuple(scalar.shape)}; for a matrix product use @."
            )
        return FactoredMatrix(self.A * scalar, self.B)

    def __rmul__(self, scalar: int | float | torch.Tensor) -> FactoredMatrix:
        """A number times the matrix, as :meth:`__mul__`."""
        return self * scalar

    @cached_property
    def _decomposition(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U, S and V of the product, from those of the factors and of the small matrix between them."""
        left_u, left_s, left_vh = torch.linalg.svd(_precise(self.A), full_matrices=False)
        right_u, right_s, right_vh = torch.linalg.svd(_precise(self.B), full_matrices=False)
        between = (left_s.unsqueeze(-1) * left_vh) @ right_u * right_s.unsqueeze(-2)
        u, s, vh = torch.linalg.svd(between, full_matrices=False)
        return left_u @ u, s, right_vh.mT @ vh.mT

    def svd(
        self,
    ) -> tuple[
        Float[torch.Tensor, "*leading_dims ldim mdim"],
        Float[torch.Tensor, "*leading_dims mdim"],
        Float[torch.Tensor, "*leading_dims rdim mdim"],
    ]:
        """Singular value decomposition ``(U, S, V)``: the matrix is ``U @ diag(S) @ V.mT``, S descending.

        The third result is V and not its transpose. 16-bit factors are decomposed in float32.
        """
        return self._decomposition

    @property
    def U(self) -> Float[torch.Tensor, "*leading_dims ldim mdim"]:
        """Left singular vectors, one per column."""
        return self.svd()[0]

    @property
    def S(self) -> Float[torch.Tensor, "*leading_dims mdim"]:
        """Singular values, descending."""
        return self.svd()[1]

    @property
    def V(self) -> Float[torch.Tensor, "*leading_dims rdim mdim"]:
        """Right singular vectors, one per column."""
        return self.svd()[2]

    @property
    def Vh(self) -> Float[torch.Tensor, "*leading_dims rdim mdim"]:
        """V under the misleading name that TransformerLens 2.x gave it; deprecated."""
        warnings.warn(
            "FactoredMatrix.Vh holds V and not its transpose. Write .V, or .V.mT for the transpose.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.V

    @property
    def eigenvalues(self) -> Complex[torch.Tensor, "*leading_dims mdim"]:
        """The ``mdim`` eigenvalues of ``B @ A``; those of the matrix are these and zeros.

        Raises:
            AssertionError: the matrix is not square.
        """
        return torch.linalg.eigvals(_precise(self.BA))

    def norm(self) -> Float[torch.Tensor, "*leading_dims"]:
        """Frobenius norm, from the singular values."""
        return self.S.square().sum(dim=-1).sqrt()

    def make_even(self) -> FactoredMatrix:
        """The same matrix with evenly shared singular values: ``U sqrt(S)`` times ``sqrt(S) V.mT``."""
        share = self.S.sqrt()
        return FactoredMatrix(self.U * share.unsqueeze(-2), share.unsqueeze(-1) * self.V.mT)

    def collapse_l(self) -> Float[torch.Tensor, "*leading_dims mdim rdim"]:
        """``diag(S) @ V.mT``: the matrix up to an orthogonal factor on its left."""
        return self.S.unsqueeze(-1) * self.V.mT

    def collapse_r(self) -> Float[torch.Tensor, "*leading_dims ldim mdim"]:
        """``U @ diag(S)``: the matrix up to an orthogonal factor on its right."""
        return self.U * self.S.unsqueeze(-2)

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """Insert a leading dimension of length 1 at ``k`` (which may count from the end).

        Raises:
            IndexError: ``k`` is not among the leading dimensions.
        """
        place = k if k >= 0 else k + self.ndim + 1
        if not 0 <= place <= self.ndim - 2:
            raise IndexError(f"a new leading dimension can be at 0 to {self.ndim - 2} of {self!r}, not at {k}.")
        return FactoredMatrix(self.A.unsqueeze(place), self.B.unsqueeze(place))

    def get_corner(self, k: int = 3) -> torch.Tensor:
        """The first ``k`` entries of the product along every dimension; only these are computed."""
        lead = (slice(k),) * (self.ndim - 2)
        return self.A[lead + (slice(k),)] @ self.B[lead + (slice(None), slice(k))]

    def __getitem__(self, idx: Any) -> FactoredMatrix:
        """Index the product, as a tensor, into a FactoredMatrix.

        Leading dimensions take anything a tensor takes (None adds one). An int on one of the last two dimensions keeps
        it, with length 1, so that the result is a matrix again.

        Raises:
            ValueError: there are more indices than dimensions, or a None among the last two dimensions.
            IndexError: an int is out of range.
        """
        lead, rows, columns = _split_index(idx if isinstance(idx, tuple) else (idx,), self.shape)
        return FactoredMatrix(self.A[lead][..., rows, :], self.B[lead][..., :, columns])


def _split_index(idx: tuple[Any, ...], shape: torch.Size) -> tuple[tuple[Any, ...], Any, Any]:
    """The parts of an index that belong to the leading dimensions, to the rows and to the columns."""
    used = sum(_dimensions_of(part) for part in idx)
    if used > len(shape):
        raise ValueError(f"{idx} is too long an index for a FactoredMatrix with shape {tuple(shape)}.")
    rest = (slice(None),) * (len(shape) - used)
    dots = next((place for place, part in enumerate(idx) if part is Ellipsis), len(idx))
    full = idx[:dots] + rest + idx[dots + 1 :]
    lead, (rows, columns) = full[:-2], full[-2:]
    if rows is None or columns is None or sum(_dimensions_of(part) for part in lead) != len(shape) - 2:
        raise ValueError(
            f"{idx} does not fit a FactoredMatrix with shape {tuple(shape)}: the last two dimensions stay."
        )
    return lead, _as_range(rows, shape[-2]), _as_range(columns, shape[-1])


def _dimensions_of(part: Any) -> int:
    """How many dimensions one part of an index consumes: a mask as many as it has, None and Ellipsis none."""
    if part is None or part is Ellipsis:
        return 0
    is_mask = str(getattr(part, "dtype", "")).endswith("bool")
    return part.ndim if is_mask else 1


def _as_range(part: Any, length: int) -> Any:
    """An int as a slice of length 1; anything else as it is."""
    if isinstance(part, slice) or getattr(part, "ndim", 0) > 0:
        return part
    try:
        place = operator.index(part)
    except TypeError:
        return part
    if not -length <= place < length:
        raise IndexError(f"index {place} is out of range for a dimension of length {length}.")
    place %= length
    return slice(place, place + 1)
