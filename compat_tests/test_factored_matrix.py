"""Does FactoredMatrix give the numbers, shapes and errors of TransformerLens 3.9.0?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens import FactoredMatrix as Theirs

from lensbridge.factored_matrix import FactoredMatrix as Ours

# The shape of A and of B: leading dimensions alike, missing on one side, of length 1; mdim below, between, above.
SHAPES = [
    ((5, 2), (2, 7)),
    ((5, 9), (9, 7)),
    ((6, 3), (3, 6)),
    ((3, 6), (6, 3)),
    ((4, 5, 2), (4, 2, 5)),
    ((2, 4, 5, 3), (2, 4, 3, 6)),
    ((2, 1, 6, 3), (4, 3, 6)),
    ((6, 3), (2, 4, 3, 6)),
    ((2, 4, 2, 3), (2, 4, 3, 2)),
]
SQUARE = [shapes for shapes in SHAPES if shapes[0][-2] == shapes[1][-1]]
SEVERAL = [shapes for shapes in SHAPES if max(map(len, shapes)) == 4]


def pair(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Ours, Theirs]:
    torch.manual_seed(len(str(shapes)))
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return Ours(a, b), Theirs(a, b)


def close(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def same(ours: Any, theirs: Any) -> None:
    """Equal tensors, or equal products kept as equal factors."""
    if isinstance(theirs, torch.Tensor):
        close(ours, theirs)
        return
    assert isinstance(ours, Ours) and isinstance(theirs, Theirs)
    assert type(ours.shape) is type(theirs.shape) and repr(ours) == repr(theirs)
    fields = ("shape", "ldim", "mdim", "rdim", "ndim", "has_leading_dims")
    assert [getattr(ours, field) for field in fields] == [getattr(theirs, field) for field in fields]
    for mine, other in zip((*ours.pair, ours.AB), (*theirs.pair, theirs.AB), strict=True):
        close(mine, other)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(
    "use",
    [
        lambda m: m,
        lambda m: m.T,
        lambda m: m * 3,
        lambda m: -0.5 * m,
        lambda m: m * torch.tensor([2.0], dtype=torch.float64),
        lambda m: torch.tensor(2.0, dtype=torch.float64) * m,
        lambda m: m.make_even(),
        lambda m: m.collapse_l(),
        lambda m: m.collapse_r(),
        lambda m: m.norm(),
        lambda m: m.U,
        lambda m: m.S,
        lambda m: m.V,
        lambda m: m.unsqueeze(0),
        lambda m: m.get_corner(),
        lambda m: m.get_corner(2),
    ],
    ids=[
        "self",
        "T",
        "*3",
        "-.5*",
        "*tensor",
        "tensor*",
        "make_even",
        "collapse_l",
        "collapse_r",
        "norm",
        "U",
        "S",
        "V",
    ]
    + ["unsqueeze", "corner", "corner2"],
)
def test_one_matrix(shapes: Any, use: Callable[[Any], Any]) -> None:
    ours, theirs = pair(shapes)
    same(use(ours), use(theirs))


@pytest.mark.parametrize("shapes", SQUARE, ids=str)
def test_square(shapes: Any) -> None:
    ours, theirs = pair(shapes)
    close(ours.BA, theirs.BA)
    close(ours.eigenvalues, theirs.eigenvalues)


def test_square_is_asked_for() -> None:
    for matrix in pair(SHAPES[0]):
        for name in ("BA", "eigenvalues"):
            with pytest.raises(AssertionError):
                getattr(matrix, name)


def test_eigenvalues_of_16_bit() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(6, 3, dtype=dtype), torch.randn(3, 6, dtype=dtype)
        assert torch.equal(Ours(a, b).eigenvalues, Theirs(a, b).eigenvalues)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_products_with_tensors(shapes: Any) -> None:
    ours, theirs = pair(shapes)
    for right in ((ours.rdim,), (ours.rdim, 3), (ours.rdim, 11), (4, ours.rdim, 4)):
        other = torch.randn(right, dtype=torch.float64)
        same(ours @ other, theirs @ other)
    for left in ((ours.ldim,), (3, ours.ldim), (11, ours.ldim), (4, 4, ours.ldim)):
        other = torch.randn(left, dtype=torch.float64)
        same(other @ ours, other @ theirs)


@pytest.mark.parametrize("left", SQUARE, ids=str)
@pytest.mark.parametrize("right", SQUARE, ids=str)
def test_products_with_each_other(left: Any, right: Any) -> None:
    (ours, theirs), (ours_right, theirs_right) = pair(left), pair(right)
    if left[0][-2] == right[0][-2]:
        same(ours @ ours_right, theirs @ theirs_right)
        same(ours_right.__rmatmul__(ours), theirs_right.__rmatmul__(theirs))
    else:
        with pytest.raises((AssertionError, RuntimeError)) as theirs_says:
            theirs @ theirs_right
        with pytest.raises(theirs_says.type):
            ours @ ours_right


INDICES: list[Any] = [
    0,
    -1,
    slice(None),
    slice(0, 1),
    None,
    (0, 1),
    (1, -1),
    (None, 0),
    (0, None),
    (slice(None), 2),
    [1, 0],
    torch.tensor([1, 0, 1]),
    torch.tensor([True, False]),
    torch.tensor([[True, False, True, False], [False, False, True, True]]),
    (0, 1, slice(1, 3)),
    (slice(None), 2, 1),
    (0, 1, -1),
    (0, 1, -2),
    (0, slice(1, 3), slice(None), slice(2)),
    (0, 1, 0, 1),
    (1, 1, -1, -1),
    (slice(None), slice(None), 1, slice(None, None, 2)),
    (0, 0, torch.tensor([1, 0]), slice(None)),
    (0, 0, slice(None), [1, 0]),
    (None, 0, 1, 0, 1),
]


@pytest.mark.parametrize("shapes", SEVERAL, ids=str)
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing(shapes: Any, index: Any) -> None:
    ours, theirs = pair(shapes)
    same(ours[index], theirs[index])


@pytest.mark.parametrize("index", [2, (0, 4), (0, 0, 0, 0, 0), (slice(None),) * 5], ids=str)
def test_indices_that_are_refused(index: Any) -> None:
    ours, theirs = pair(SEVERAL[0])
    with pytest.raises((IndexError, ValueError)) as theirs_says:
        theirs[index]
    with pytest.raises(theirs_says.type):
        ours[index]


@pytest.mark.parametrize("shapes", [((3, 4), (5, 3)), ((2, 3, 4), (5, 4, 3)), ((4,), (4, 3)), ((4, 3), (3,))], ids=str)
def test_factors_that_are_refused(shapes: Any) -> None:
    a, b = map(torch.zeros, shapes)
    with pytest.raises((AssertionError, RuntimeError, IndexError)) as theirs_says:
        Theirs(a, b)
    with pytest.raises(theirs_says.type):
        Ours(a, b)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m * torch.ones(2),
        lambda m: m @ torch.ones(3, 3),
        lambda m: torch.ones(3, 3) @ m,
        lambda m: torch.ones(3) @ m,
        lambda m: m @ torch.ones(3),
        lambda m: m.unsqueeze(5),
    ],
    ids=["*vector", "@matrix", "matrix@", "vector@", "@vector", "unsqueeze"],
)
def test_operations_that_are_refused(use: Callable[[Any], Any]) -> None:
    a, b = torch.ones(5, 2), torch.ones(2, 7)
    with pytest.raises((AssertionError, RuntimeError, IndexError)) as theirs_says:
        use(Theirs(a, b))
    with pytest.raises(theirs_says.type):
        use(Ours(a, b))


def test_vh_warns() -> None:
    for matrix in pair(SHAPES[0]):
        with pytest.warns(DeprecationWarning):
            close(matrix.Vh, matrix.V)


def test_gradients() -> None:
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    gradients = []
    kinds: tuple[Any, ...] = (Ours, Theirs)
    for kind in kinds:
        leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        matrix = kind(*leaves)
        (matrix.norm() + (matrix @ torch.ones(6, 4, dtype=torch.float64)).AB.square().sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for mine, other in zip(*gradients, strict=True):
        close(mine, other)


def test_scores_of_composition() -> None:
    from transformer_lens.utilities import composition_scores as theirs_scores
    from transformer_lens.utilities import get_matrix_corner as theirs_corner

    from lensbridge.utilities import composition_scores, get_matrix_corner

    left, right = pair(((2, 4, 6, 3), (2, 4, 3, 5))), pair(((3, 5, 2), (3, 2, 7)))
    close(composition_scores(left[0], right[0]), theirs_scores(left[1], right[1]))
    one = pair(((5, 2), (2, 7)))
    close(composition_scores(left[0], one[0]), theirs_scores(left[1], one[1]))
    close(composition_scores(one[0].T, one[0]), theirs_scores(one[1].T, one[1]))
    for options in ({"broadcast_dims": False}, {}):
        again = pair(((2, 4, 5, 2), (2, 4, 2, 7)))
        close(composition_scores(left[0], again[0], **options), theirs_scores(left[1], again[1], **options))
    with pytest.raises(AssertionError):
        theirs_scores(right[1], right[1])
    with pytest.raises(AssertionError):
        composition_scores(right[0], right[0])
    for n in (1, 2, 3):
        close(get_matrix_corner(left[0], n), theirs_corner(left[1], n))


def test_no_warnings_of_our_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, _ = pair(SHAPES[4])
        ours.svd(), ours.eigenvalues, ours.make_even().T[0]
