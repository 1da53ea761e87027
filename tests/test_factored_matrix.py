"""Does a FactoredMatrix behave as the product of its factors?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge.factored_matrix import FactoredMatrix, TensorLike

SHAPES = [((5, 2), (2, 7)), ((5, 9), (9, 7)), ((3, 4, 6, 2), (3, 4, 2, 6)), ((4, 6, 2), (3, 1, 2, 6))]


def make(shapes: Any, dtype: torch.dtype = torch.float64) -> tuple[FactoredMatrix, torch.Tensor]:
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return FactoredMatrix(a, b), a @ b


def close(one: Any, other: torch.Tensor) -> None:
    torch.testing.assert_close(one.AB if isinstance(one, FactoredMatrix) else one, other)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_it_stands_for_the_product(shapes: Any) -> None:
    matrix, product = make(shapes)
    assert (matrix.shape, matrix.ndim) == (product.shape, product.ndim)
    close(matrix, product)
    close(matrix.T, product.mT)
    close(2.5 * matrix * -1, -2.5 * product)
    close(matrix.norm(), torch.linalg.matrix_norm(product))
    close(matrix.make_even(), product)
    close(matrix.get_corner(2), product[(slice(2),) * product.ndim])
    close(matrix.unsqueeze(0), product.unsqueeze(0))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_products(shapes: Any) -> None:
    matrix, product = make(shapes)
    for other in (torch.randn(matrix.rdim), torch.randn(matrix.rdim, 3), torch.randn(matrix.rdim, 20)):
        close(matrix @ other.double(), product @ other.double())
    for other in (torch.randn(matrix.ldim), torch.randn(3, matrix.ldim), torch.randn(20, matrix.ldim)):
        close(other.double() @ matrix, other.double() @ product)
    close(matrix @ matrix.T, product @ product.mT)
    close(matrix.T.__rmatmul__(matrix), product @ product.mT)


def test_products_keep_the_smaller_inner_dimension() -> None:
    matrix, _ = make(((9, 2), (2, 9)))
    assert (matrix @ torch.ones(9, 9).double()).mdim == 2
    assert (torch.ones(9, 9).double() @ matrix).mdim == 2
    wide, _ = make(((3, 8), (8, 3)))
    assert (wide @ torch.ones(3, 9).double()).mdim == 3
    assert (torch.ones(9, 3).double() @ wide).mdim == 3


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_singular_values(shapes: Any) -> None:
    matrix, product = make(shapes)
    u, s, v = matrix.svd()
    close(u @ torch.diag_embed(s) @ v.mT, product)
    close(u.mT @ u, torch.eye(s.shape[-1]).double().expand(*s.shape, -1))
    close(v.mT @ v, torch.eye(s.shape[-1]).double().expand(*s.shape, -1))
    close(s, torch.linalg.svdvals(product)[..., : s.shape[-1]])
    assert (s[..., :-1] >= s[..., 1:]).all()
    close(matrix.U @ matrix.collapse_l(), product)
    close(matrix.collapse_r() @ matrix.V.mT, product)


def test_singular_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = make(SHAPES[0])
    first = matrix.svd()
    monkeypatch.delattr(torch.linalg, "svd")
    assert matrix.svd() is first
    assert (matrix.U is first[0], matrix.S is first[1], matrix.V is first[2]) == (True,) * 3
    with pytest.warns(DeprecationWarning, match=r"\.V"):
        assert matrix.Vh is first[2]


def test_eigenvalues_are_those_of_the_product() -> None:
    matrix, product = make(((6, 3), (3, 6)))
    largest = torch.linalg.eigvals(product).abs().sort(descending=True).values[:3]
    close(matrix.eigenvalues.abs().sort(descending=True).values, largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors_are_decomposed_in_float32(dtype: torch.dtype) -> None:
    matrix, _ = make(((6, 3), (3, 6)), dtype)
    exact = FactoredMatrix(matrix.A.float(), matrix.B.float())
    assert torch.equal(matrix.S, exact.S)
    assert torch.equal(matrix.norm(), exact.norm())
    assert torch.equal(matrix.eigenvalues, torch.linalg.eigvals(matrix.BA.float()))


INDICES: list[tuple[Any, Any]] = [
    (0, 0),
    (..., ...),
    ((..., 1), (..., slice(1, 2))),
    ((..., 1, slice(2)), (..., slice(1, 2), slice(2))),
    ((0, ..., -1), (0, ..., slice(-1, None))),
    ((0, 1, -2, 3), (0, 1, slice(4, 5), slice(3, 4))),
    ((torch.tensor([[True, False, True, True]] * 3), 2), (torch.tensor([[True, False, True, True]] * 3), slice(2, 3))),
    ((0, 0, torch.tensor(2)), (0, 0, slice(2, 3))),
    (([2, 0], 1), ([2, 0], 1)),
    ((None, 1, None, 2), (None, 1, None, 2)),
]


@pytest.mark.parametrize(("index", "of_product"), INDICES, ids=str)
def test_indexing(index: Any, of_product: Any) -> None:
    matrix, product = make(((3, 4, 6, 2), (3, 4, 2, 6)))
    close(matrix[index], product[of_product])


def test_each_axis_is_indexed_on_its_own() -> None:
    matrix, product = make(((3, 4, 6, 2), (3, 4, 2, 6)))
    close(matrix[torch.tensor([0, 2]), 1, torch.tensor([5, 0, 3])], product[[0, 2], 1][:, [5, 0, 3]])


@pytest.mark.parametrize(
    ("index", "error"),
    [((0, 0, 6), IndexError), ((0, 0, 0, -7), IndexError), ((0,) * 5, ValueError), ((0, 0, 0, None), ValueError)],
    ids=str,
)
def test_indices_that_do_not_fit(index: Any, error: type[Exception]) -> None:
    matrix, _ = make(((3, 4, 6, 2), (3, 4, 2, 6)))
    with pytest.raises(error):
        matrix[index]


def test_iteration_ends() -> None:
    matrix: Any
    matrix, product = make(((3, 6, 2), (3, 2, 6)))
    assert len(list(matrix)) == 3
    close(torch.stack([part.AB for part in matrix]), product)
    assert [row.shape for row in matrix[0]] == [(1, 6)] * 6


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda m: FactoredMatrix(m.A, m.A), AssertionError, r"\(5, 2\).*\(5, 2\)"),
        (lambda m: FactoredMatrix(m.A.expand(3, 5, 2), m.B.expand(4, 2, 7)), RuntimeError, r"\(3, 5, 2\).*\(4, 2, 7\)"),
        (lambda m: m * torch.ones(2), AssertionError, "use @"),
        (lambda m: m @ torch.ones(6, 2), AssertionError, "7 rows"),
        (lambda m: torch.ones(2, 6) @ m, AssertionError, "dimension of 5"),
        (lambda m: torch.ones(6) @ m, AssertionError, "dimension of 5"),
        (lambda m: m.BA, AssertionError, "square"),
        (lambda m: m.eigenvalues, AssertionError, "square"),
        (lambda m: m.unsqueeze(1), IndexError, "0 to 0"),
        (lambda m: m.unsqueeze(-1), IndexError, "not at -1"),
    ],
)
def test_errors_name_the_shapes(wrong: Any, error: type[Exception], message: str) -> None:
    matrix, _ = make(SHAPES[0])
    with pytest.raises(error, match=message):
        wrong(matrix)


class Wrapped:
    """A factor that is no tensor."""

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner
        self.ndim, self.shape = inner.ndim, inner.shape

    def size(self, dim: int) -> int:
        return self.inner.size(dim)

    def unsqueeze(self, dim: int) -> Wrapped:
        return Wrapped(self.inner.unsqueeze(dim))

    def squeeze(self, dim: int) -> Wrapped:
        return Wrapped(self.inner.squeeze(dim))

    def broadcast_to(self, shape: Any) -> Wrapped:
        return Wrapped(self.inner.broadcast_to(shape))

    def __matmul__(self, other: Any) -> Wrapped:
        return Wrapped(self.inner @ (other.inner if isinstance(other, Wrapped) else other))

    def __rmatmul__(self, other: Any) -> Wrapped:
        return Wrapped(other @ self.inner)


def test_factors_need_not_be_tensors() -> None:
    matrix, product = make(SHAPES[3])
    a, b = Wrapped(matrix.A), Wrapped(matrix.B)
    assert isinstance(a, TensorLike)
    assert not isinstance(3, TensorLike)
    wrapped = FactoredMatrix(a, b)
    close(wrapped.AB.inner, product)
    close((wrapped @ torch.ones(6, 2).double()).AB.inner, product @ torch.ones(6, 2).double())
    close((wrapped @ Wrapped(torch.ones(6).double())).inner, product.sum(-1))


def test_gradients_reach_the_factors() -> None:
    a, b = torch.randn(5, 2, requires_grad=True), torch.randn(2, 7, requires_grad=True)
    FactoredMatrix(a, b).norm().square().backward()
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(a.grad, 2 * (a @ b @ b.T).detach())
    torch.testing.assert_close(b.grad, 2 * (a.T @ a @ b).detach())
