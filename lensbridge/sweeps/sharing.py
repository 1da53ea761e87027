"""Which interventions share a run, and how many?

As many as keep the device busy, and no more: beyond that a run only takes more memory. They start at the layer of the
lowest of them, so that a run begins afresh where the layer changes, unless it would be too small to be worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .interventions import Intervention

#: From about this many tokens in a run on, twice as many take twice as long.
BUSY_CPU, BUSY_ACCELERATOR = 256, 8192
#: What share of an accelerator's free memory a run may take.
_SHARE = 0.4
_UNKNOWN_MEMORY = 2 << 30


def batches(
    interventions: Iterable[Intervention], limit: int, enough: int, in_order: bool
) -> Iterator[list[Intervention]]:
    """Groups to run together, at most ``limit`` of them.

    Args:
        enough: from how many on a group is not filled up with interventions that start at another layer.
        in_order: whether only neighbours may share a run.
    """
    group: list[Intervention] = []
    for item in interventions if in_order else sorted(interventions, key=lambda i: (i.start, i.kind, i.index)):
        if group and not _fits(item, group, limit, enough):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _fits(item: Intervention, group: list[Intervention], limit: int, enough: int) -> bool:
    last = group[-1]
    if len(group) >= limit or item.alone or last.alone or item.kind != last.kind:
        return False
    return item.start == last.start or len(group) < enough


def busy_tokens(device: torch.device) -> int:
    """How many tokens it takes to keep a device busy."""
    return BUSY_CPU if device.type == "cpu" else BUSY_ACCELERATOR


def most_at_once(cfg: Any, batch: int, length: int, kept: int, device: torch.device) -> int:
    """How many interventions on an input ``[batch, length]`` share a run if nobody says.

    Args:
        kept: at how many positions logits are computed.
    """
    most = -(-busy_tokens(device) // (batch * length))
    if device.type == "cpu":
        return most  # so few tokens take little next to the model
    by_memory = int(_SHARE * free_memory(device)) // (batch * _bytes_per_row(cfg, length, kept))
    return max(1, min(most, by_memory))


def _bytes_per_row(cfg: Any, length: int, kept: int) -> int:
    """A generous guess at the largest memory that one row takes at a time."""
    logits = 2 * kept * cfg.d_vocab
    stream = length * (8 * cfg.d_model + 4 * (cfg.d_mlp or 0))
    squares = 4 * cfg.n_heads * length * length
    return (logits + stream + squares) * cfg.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """What a device has left, in bytes, with what PyTorch holds and does not use."""
    if device.type != "cuda":
        return _UNKNOWN_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
