"""Does a course's notebook give the same numbers under the alias as on the real transformer-lens?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compat_tests.course.compare import NOTEBOOK, cells_of, differences, numbers, tensors
from compat_tests.rough_models import SUBJECT


@pytest.mark.skipif(SUBJECT == "transformer_lens", reason="both sides are run anyway")
def test_every_number_of_the_notebook(tmp_path: Path) -> None:
    theirs, ours = (numbers(NOTEBOOK, alias, tmp_path) for alias in (False, True))
    assert len(cells_of(NOTEBOOK)) >= 60 and len(theirs) > 500
    assert differences(theirs, ours) == []


def test_a_difference_would_show() -> None:
    """Else the test above could not fail."""
    one = dict(tensors("x", {"a": torch.ones(3), "b": [1.0, 2], "c": True}))
    assert sorted(one) == ["x['a']", "x['b'][0]", "x['b'][1]", "x['c']"]
    assert differences(one, one) == []
    assert differences(one, {**one, "x['a']": torch.tensor([1.0, 1.0, 1.001])})
    assert differences(one, {**one, "x['a']": torch.ones(3, dtype=torch.float64)})
    assert differences(one, {name: one[name] for name in list(one)[1:]})
