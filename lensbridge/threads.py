"""How many threads does a model of some size gain from?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Width (d_model) up to which a model's matrices are too small to share among threads.
SMALL = 256


@contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """One thread for a small model: waiting for each other costs threads more than they gain, a lot on a busy CPU."""
    before = torch.get_num_threads()
    if model.cfg.d_model <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
