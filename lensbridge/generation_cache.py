"""How do the activations of many short runs become those of one long run?

Each step of a generation runs new positions only, so a point's activations are joined along their position axis.
Attention is the exception: each query row has seen the keys up to its own position, so its row is filled up with what a
masked key has in a run over the whole text, 0 in the pattern and -inf in the scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .hook_points import HookPoint, ReadOnlyHook
from .later import Later
from .points import SQUARE, point_of

#: What a masked key has at a point that is [batch, head, query_pos, key_pos].
MASKED = {"hook_attn_scores": -torch.inf, "hook_pattern": 0.0}


class GenerationRecording(ReadOnlyHook):
    """Keeps what passes the chosen points of each step, at the positions that are new in it.

    The engine fills it as it would a cache (`names`, `keep`); at points inside a user's own module it is a hook.

    Args:
        names: the points to keep.
        device: where to keep their values; None leaves them where they are.
    """

    def __init__(self, names: Iterable[str], device: torch.device | str | None = None) -> None:
        self.names = frozenset(names)
        self._axes = {name: _position_axis(name) for name in self.names}
        self.device = device
        #: name -> start of a step -> activations of its new positions.
        self._pieces: dict[str, dict[int, Tensor]] = {}
        self._start = self._stop = 0

    def begin(self, start: int, stop: int) -> None:
        """From now on it is the step in which positions ``start`` to ``stop`` are new."""
        self._start, self._stop = start, stop

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> None:
        self.keep(str(hook.name), tensor)

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a point's activations in this step; of several firings, the last.

        Raises:
            ValueError: the point is not one of the model's own, and what passes it has no position axis.
        """
        axis, new = self._axes[name], self._stop - self._start
        if value.dim() <= axis or value.shape[axis] < new:
            raise ValueError(
                f"what passes {name!r} has shape {list(value.shape)}, so it cannot be joined over the positions of a "
                f"generation, which are expected on axis {axis}: leave it out with names_filter, or use a hook"
            )
        kept = value.detach()
        if kept.shape[axis] > new:
            # Without key-value cache, earlier positions have been kept when they were new.
            kept = kept.narrow(axis, kept.shape[axis] - new, new)
        if self.device is not None:
            kept = kept.to(self.device)
        if kept.untyped_storage().nbytes() > kept.nbytes:
            # A slice, of fused queries, keys and values say, would keep all of them in memory.
            kept = kept.clone()
        self._pieces.setdefault(name, {})[self._start] = kept

    def keep_later(self, name: str, value: Later) -> None:
        """Keep what a value is computed from: here the value, because what it is cut from may be larger."""
        self.keep(name, value())

    def joined(self, keep: Any) -> None:
        """Hand each point's activations over all positions to ``keep(name, activations)``, and forget them."""
        while self._pieces:
            name = next(iter(self._pieces))
            pieces = list(self._pieces.pop(name).values())
            if _is_square(name):
                pieces = [_filled_up(name, piece, pieces[-1].shape[-1]) for piece in pieces]
            keep(name, torch.cat(pieces, dim=_position_axis(name)))


def _is_square(name: str) -> bool:
    point = point_of(name)
    return point is not None and point.shape == SQUARE


def _position_axis(name: str) -> int:
    return 2 if _is_square(name) else 1


def _filled_up(name: str, rows: Tensor, keys: int) -> Tensor:
    missing = keys - rows.shape[-1]
    return torch.nn.functional.pad(rows, (0, missing), value=MASKED[name.rsplit(".", 1)[-1]]) if missing else rows
