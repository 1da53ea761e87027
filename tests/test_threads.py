"""Do small models run on one thread, and is the number as before afterwards?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lensbridge.threads import SMALL, threads_for


@pytest.mark.parametrize(("width", "inside"), [(SMALL, 1), (SMALL + 1, 2)])
def test_small_models_have_one_thread(width: int, inside: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads_for(SimpleNamespace(cfg=SimpleNamespace(d_model=width))):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
