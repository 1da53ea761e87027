"""Is the right training checkpoint chosen, and is a wrong one refused with those nearby?"""

from __future__ import annotations

from typing import Any

import pytest

from lensbridge.checkpoints import Checkpoint, Labels

STEPS = Labels([0, 10, 200, 3000], "step")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((0, None), (0, 0)),
        ((2, None), (2, 200)),
        ((-1, None), (3, 3000)),
        ((-4, None), (0, 0)),
        ((None, 0), (0, 0)),
        ((None, 200), (2, 200)),
        ((1, 10), (1, 10)),
    ],
)
def test_by_index_and_by_label(asked: tuple[Any, Any], expected: tuple[int, int]) -> None:
    assert STEPS.choose("'m'", *asked) == Checkpoint(*expected, "step")


def test_an_index_counts_in_the_order_of_the_list() -> None:
    tokens = Labels([100, 5, 30], "token")
    assert tokens.choose("'m'", 1, None) == tokens.choose("'m'", None, 5) == Checkpoint(1, 5, "token")
    assert tokens.choose("'m'", 1, None).fields() == {
        "from_checkpoint": True,
        "checkpoint_index": 1,
        "checkpoint_value": 5,
        "checkpoint_label_type": "token",
    }
    with pytest.raises(AssertionError, match=r"closest are 30 \(checkpoint_index=2\) and 100 \(checkpoint_index=0\)"):
        tokens.choose("'m'", None, 31)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ((4, None), IndexError, "'m' has 4 checkpoints, so none at index 4: index 0 is step 0, index 3 is step 3000"),
        ((-5, None), IndexError, "none at index -5"),
        ((None, 11), AssertionError, "'m' has no checkpoint at step 11; the closest are 10 .* and 200 "),
        ((None, 9000), AssertionError, r"the closest is 3000 \(checkpoint_index=3\)$"),
        ((None, -1), AssertionError, r"the closest is 0 \(checkpoint_index=0\)$"),
        ((1, 200), ValueError, "checkpoint_index=1 of 'm' is step 10, not 200"),
    ],
)
def test_what_is_not_there(asked: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STEPS.choose("'m'", *asked)
