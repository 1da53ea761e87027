"""What must be true of the two points of a norm?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .subject import Look, Subject


def norm_identities(
    subject: Subject, prefix: str, source: Callable[[Look], Tensor], of: str
) -> Iterator[tuple[str, str, Callable[[Look], Tensor]]]:
    """The identities of the norm that TransformerLens calls ``prefix``, as rows of `Identity`.

    Args:
        source: what the norm reads, of a run's values.
        of: the same in words.
    """
    scale, normalized = f"{prefix}.hook_scale", f"{prefix}.hook_normalized"
    norm = subject.norm(prefix)

    def centred(look: Look) -> Tensor:
        x = source(look)
        x = x.reshape(*look[scale].shape[:-1], -1)
        return x - x.mean(-1, keepdim=True) if norm.centred else x

    def root(look: Look) -> Tensor:
        return torch.sqrt(centred(look).square().mean(-1, keepdim=True) + norm.eps)

    without = " without its mean" if norm.centred else ""
    yield scale, f"sqrt(mean(x^2) + eps), x = {of}{without}", root
    yield normalized, f"({of}){without} / scale", lambda look: centred(look) / look[scale]
