"""What does a run that only fills a cache keep of the values that it comes by?

As little as the rest can be made of. A point's value is kept as the tensor of the HuggingFace model that it is a
function of; and where the stream is, to the last bit, the sum of what is kept before it, it is not kept at all. That is
looked at in each run and never taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from ..basis import Stream
from ..later import Later, Source

#: Through how many sums the stream is followed back before it is kept as it is: four layers.
MOST_SUMS = 8


class Recording(Protocol):
    """A cache that a run fills: which points it wants, and what to do with a value."""

    @property
    def names(self) -> Collection[str]:
        """The points to keep."""

    def keep(self, name: str, value: Tensor) -> None:
        """Put away the value of a point."""

    def keep_later(self, name: str, value: Later) -> None:
        """Put away what the value of a point is to be computed from."""


class Keeping:
    """The half of a `Run` that fills its cache."""

    recording: Recording | None
    stream: Stream
    puts_off: bool
    #: The points of which others' values are yet to be made, and those of their values that are kept.
    awaited: Collection[str]
    sources: dict[str, Source]
    _kept: Collection[str]
    #: The last tensor of the stream that was kept, and its entry.
    _later: tuple[Tensor, Later] | None
    #: The last tensor that was kept.
    _last: tuple[Tensor, Source] | None
    #: The stream as it was kept last, and what has been added to it since.
    _trail: list[tuple[Tensor, Source]]

    def keeps(self, name: str) -> bool:
        """Whether the value of a point is to be kept."""
        return name in self._kept

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a value that is there already, where nobody listens."""
        if name in self._kept:
            self.recording.keep(name, value)  # type: ignore[union-attr]

    def keep_later(self, name: str, raw: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> None:
        """Keep ``function(raw)``, or ``raw`` itself, where nobody listens; it is computed when somebody looks.

        ``raw`` must be nobody else's: what the caller has in hand may be edited before that.
        """
        if name not in self._kept:
            return
        if self.puts_off:
            source = self._source(raw)
            if name in self.awaited:
                self.sources[name] = source
            self.keep_made(name, function, source)
        else:
            self.keep(name, raw if function is None else function(raw))

    def keep_made(self, name: str, function: Callable[..., Tensor] | None, *sources: Source) -> None:
        """Keep what follows from something that is kept already, where nobody listens."""
        self.recording.keep_later(name, Later(function, *sources))  # type: ignore[union-attr]

    def keep_stream(self, name: str, raw: Tensor) -> None:
        """Keep the residual stream ``raw``, where nobody listens; what ends a block and begins the next is one."""
        if not self.puts_off:
            self.keep(name, self.stream.read(raw))
        elif name in self._kept:
            if self._later is None or self._later[0] is not raw:
                source = self._summed(raw) or self._source(raw)
                self._last, self._trail = (raw, source), [(raw, source)]
                self._later = raw, Later(self.stream.read if self.stream.centred else None, source)
            self.recording.keep_later(name, self._later[1])  # type: ignore[union-attr]

    def keep_branch(self, name: str, raw: Tensor) -> None:
        """Keep what is added to the stream, where nobody listens."""
        self.keep_later(name, raw, self.stream.read_branch if self.stream.centred else None)
        if self.puts_off and name in self._kept:
            self._trail.append((raw, self._source(raw)))

    def _source(self, raw: Tensor) -> Source:
        if self._last is None or self._last[0] is not raw:
            self._last = raw, Source(raw)
        return self._last[1]

    def _summed(self, raw: Tensor) -> Source | None:
        """The stream as the sum of what is kept of it, if it is that."""
        trail: Any = self._trail
        if not 2 <= len(trail) <= 3 or raw.requires_grad or trail[0][1].depth >= MOST_SUMS:
            return None
        tensors, sources = zip(*trail, strict=True)
        if any((each.dtype, each.device, each.shape) != (raw.dtype, raw.device, raw.shape) for each in tensors):
            return None
        with torch.no_grad():
            return Source(None, _sum, sources) if same(_sum(*tensors), raw) else None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are the same bit by bit; many bits at a time, where they lie close together."""
    whole = a.shape == b.shape and a.is_contiguous() and b.is_contiguous() and a.dim() > 0
    if whole and a.shape[-1] * a.element_size() % 8 == 0 and a.storage_offset() == b.storage_offset() == 0:
        return torch.equal(a.view(torch.int64), b.view(torch.int64))
    return torch.equal(a, b)


def _sum(stream: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
    """The stream with what branches add: two that are beside each other are added to each other first."""
    return stream + (first if second is None else second + first)
