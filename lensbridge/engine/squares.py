"""How do scores and pattern lie in what a family's softmax is given and returns?

Nearly everywhere as TransformerLens has them, [batch, head, query, key]. Some families make one axis of batch and head;
with sinks (Xiao et al. 2024) there is a last column with a learned logit for each head, and scores are shifted by their
row's maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parameters import factor_of
from .sites import Run


@dataclass(frozen=True)
class SquareForm:
    """The form of one layer's scores and pattern.

    Args:
        layer: the path of the layer in the HF model.
        sinks: below it, the attribute that holds each head's extra logit.
        flat: whether batch and head are one axis.
    """

    layer: str
    sinks: str | None = None
    flat: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is TransformerLens' form."""
        return self.sinks is None and not self.flat

    def scores(self, x: Tensor, run: Run) -> Tensor:
        """The scores in a softmax's input."""
        if self.sinks is not None:
            # What was taken from the row shows in the last column.
            return x[..., :-1] + (self._sink(run) - x[..., -1:])
        return self.pattern(x, run)

    def scores_to_hf(self, value: Tensor, x: Tensor, run: Run) -> Tensor:
        """The softmax's input with other scores in it; ``x`` is what it was."""
        if self.sinks is None:
            return self.pattern_to_hf(value, x)
        sink = self._sink(run)
        whole = torch.cat([value, sink.expand(*value.shape[:-1], 1)], dim=-1)
        return whole - whole.amax(-1, keepdim=True)

    def pattern(self, x: Tensor, run: Run) -> Tensor:
        """The pattern in a softmax's output."""
        if self.sinks is not None:
            return x[..., :-1]
        return x.unflatten(0, (run.batch_size, -1)) if self.flat else x

    def pattern_to_hf(self, value: Tensor, x: Tensor) -> Tensor:
        """The softmax's output with another pattern in it; ``x`` is what it was."""
        if self.sinks is not None:
            return torch.cat([value, x[..., -1:]], dim=-1)
        return value.flatten(0, 1) if self.flat else value

    def _sink(self, run: Run) -> Tensor:
        sinks = factor_of(run.view.module(self.layer), self.sinks)
        return sinks.reshape(1, -1, 1, 1)
