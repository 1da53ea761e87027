"""Which keys may a query see?"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor


@lru_cache(maxsize=16)
def causal_mask(
    query_length: int, key_length: int, window: int | None, device: torch.device
) -> Bool[Tensor, "1 1 query key"]:
    """True where the last ``query_length`` of ``key_length`` positions may look: back, and at most ``window`` far.

    The layers of a model, and the steps of a training run, ask for the same few masks.
    """
    # What is made under inference mode could not be used in a later training step.
    with torch.inference_mode(False):
        keys = torch.arange(key_length, device=device)
        queries = keys[key_length - query_length :, None]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        return visible[None, None]
