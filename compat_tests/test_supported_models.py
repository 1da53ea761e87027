"""Are the lists of names those of 3.9.0?"""

from __future__ import annotations

from importlib import import_module

import pytest
from transformer_lens import supported_models as theirs

from compat_tests.rough_models import SUBJECT

ours = import_module(f"{SUBJECT}.supported_models")


@pytest.mark.parametrize("name", ["OFFICIAL_MODEL_NAMES", "MODEL_ALIASES", "DEFAULT_MODEL_ALIASES"])
def test_the_list(name: str) -> None:
    mine, other = getattr(ours, name), getattr(theirs, name)
    assert mine == other
    assert list(mine) == list(other)
