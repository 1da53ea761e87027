"""How do scores and pattern lie in what a family's softmax is given and returns?

Nearly everywhere as TransformerLens has them, [batch, head, query, key]. Some families make one axis of batch and head;
with sinks (Xiao et al. 2024) there is a last column with a learned logit for each head, and scores are shifted by their
row's maximum; or the softmax goes without, and what the heads write is scaled by what the sink leaves of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parameters import factor_of
from .places import Parts
from .sites import Run


@dataclass(frozen=True)
class SquareForm:
    """The form of one layer's scores and pattern.

    Args:
        layer: the path of the layer in the HF model.
        mask: what masked scores are, or less; None for the smallest number there is.
        sinks: below it, the attribute that holds each head's extra logit.
        flat: whether batch and head are one axis.
        behind: whether the sinks have their share behind the softmax.
    """

    layer: str
    mask: float | None = None
    sinks: str | None = None
    flat: bool = False
    behind: bool = False

    @property
    def plain(self) -> bool:
        """Whether scores are in TransformerLens' form."""
        return (self.sinks is None or self.behind) and not self.flat

    @property
    def _has_column(self) -> bool:
        return self.sinks is not None and not self.behind

    def masked(self, x: Tensor) -> Tensor:
        """Scores as TransformerLens has them, -inf where they are masked."""
        limit = self.mask
        if limit is None:
            # Some models divide the mask with the scores, which are wide then.
            limit = torch.finfo(x.dtype).min / (2 if x.dtype == torch.float16 else 1e6)
        return x.masked_fill(x <= limit, -torch.inf)

    def scores(self, x: Tensor, run: Run) -> Tensor:
        """The scores in a softmax's input."""
        if self._has_column:
            # What was taken from the row shows in the last column.
            return x[..., :-1] + (self._sink(run) - x[..., -1:])
        return self.pattern(x, run)

    def scores_to_hf(self, value: Tensor, x: Tensor, run: Run) -> Tensor:
        """The softmax's input with other scores in it; ``x`` is what it was."""
        if not self._has_column:
            return self.pattern_to_hf(value, x)
        sink = self._sink(run)
        whole = torch.cat([value, sink.expand(*value.shape[:-1], 1)], dim=-1)
        return whole - whole.amax(-1, keepdim=True)

    def pattern(self, x: Tensor, run: Run) -> Tensor:
        """The pattern in a softmax's output."""
        if self._has_column:
            return x[..., :-1]
        return x.unflatten(0, (run.batch_size, -1)) if self.flat else x

    def pattern_to_hf(self, value: Tensor, x: Tensor) -> Tensor:
        """The softmax's output with another pattern in it; ``x`` is what it was."""
        if self._has_column:
            return torch.cat([value, x[..., -1:]], dim=-1)
        return value.flatten(0, 1) if self.flat else value

    def share(self, scores: Tensor, run: Run) -> Tensor:
        """What the sinks leave of each row of the pattern, ``[batch, head, query, 1]``."""
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        return torch.sigmoid((total - self._sink(run)).float()).to(scores.dtype)

    @staticmethod
    def own_scores(view: Parts, attention: str) -> Tensor:
        """What each query scores its own position with, ``[batch, head, query]``, by what attention is called with."""
        args, kwargs = view.operations[attention].around.inputs
        query, key = args[1], args[2][:, :, -args[1].shape[2] :]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return (query * key).sum(-1) * kwargs["scaling"]

    @staticmethod
    def unshifted(x: Tensor, own: Tensor) -> Tensor:
        """Scores from which a constant has been taken in each row, with it again; padding's rows stay as they are."""
        diagonal = x.diagonal(x.shape[-1] - x.shape[-2], -2, -1)
        shift = torch.where(diagonal < torch.finfo(x.dtype).min / 2, torch.zeros_like(own), own - diagonal)
        return x + shift.unsqueeze(-1)

    def _sink(self, run: Run) -> Tensor:
        sinks = factor_of(run.view.module(self.layer), self.sinks)
        return sinks.reshape(1, -1, 1, 1)
