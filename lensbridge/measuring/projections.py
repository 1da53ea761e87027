"""Which columns of which projection do queries, keys and values come from?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from ..affine import bias_of, matrix
from ..architectures.record import Layout
from .flow import Held
from .norms import CLOSE
from .recording import Call, Value
from .stream import Trace


@dataclass(frozen=True, eq=False)
class Source:
    """Where heads come from: columns [head, d_head] of a projection's output, and what was done to them since."""

    call: Call
    columns: Tensor
    #: The heads themselves.
    value: Value
    norms: tuple[Call, ...]
    scaled: bool
    bounded: bool
    clipped: bool
    #: Whether they are only that, and not rotated or mixed afterwards.
    whole: bool

    @property
    def path(self) -> str:
        """The projection's path."""
        return self.call.path


def affine_calls(trace: Trace, calls: Iterable[Call]) -> list[Call]:
    """Those of the calls that multiply with the matrix of their module, and add its bias."""
    return [call for call in calls if _is_affine(trace, call)]


def _is_affine(trace: Trace, call: Call) -> bool:
    module = trace.recording.module(call.path)
    weight = getattr(module, "weight", None)
    if call.input is None or call.output is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    x, y = trace.flow.tensor(call.input), trace.flow.tensor(call.output)
    by = matrix(module)
    if (x.shape[:-1], x.shape[-1], y.shape[-1]) != (y.shape[:-1], *by.shape) or weight.dtype != x.dtype:
        return False
    if type(module) is nn.Linear:
        return True
    bias = bias_of(module)
    with torch.no_grad():
        expected = x @ by if bias is None else x @ by + bias
    return bool((expected - y).abs().max() <= CLOSE.get(y.dtype, 1e-4) * (1 + y.abs().max()))


class Projections:
    """The projections before a softmax, and where their columns go."""

    def __init__(self, trace: Trace, calls: list[Call], since: int, ends: int) -> None:
        self.trace = trace
        self.since = since
        norms = {call.input: call for call in calls if call.path in trace.norms and call.input is not None}
        self.affine = [call for call in affine_calls(trace, calls) if call.end <= ends]
        self.held: dict[int, dict[Value, Held]] = {}
        for call in self.affine:
            assert call.output is not None
            self.held[id(call)] = trace.flow.spread(call.output, ends, norms)

    def behind(self, value: Value) -> list[Call]:
        """The projections that ``value`` is made of, without those that only others read."""
        ancestors = self.trace.flow.ancestors(value, since=self.since)
        found = [call for call in self.affine if call.output in ancestors]
        return [call for call in found if not any(self._reads(other, call) for other in found if other is not call)]

    def before(self, call: Call) -> list[Call]:
        """The projections that a projection reads."""
        return [other for other in self.affine if other is not call and self._reads(call, other)]

    def _reads(self, reader: Call, other: Call) -> bool:
        assert reader.input is not None and other.output is not None
        return self.trace.flow.depends(reader.input, {other.output}, since=self.since)

    def source(self, value: Value, size: int) -> Source | str:
        """Where the heads in ``value``, of which each has ``size`` columns, come from; else why that cannot be said."""
        calls = self.behind(value)
        if not calls:
            return "they come from no projection"
        if len(calls) > 1:
            return f"they are made of several projections ({', '.join(_last(call) for call in calls)})"
        call = calls[0]
        if self.before(call):
            chain = [*map(_last, self.before(call)), _last(call)]
            return f"they are projected more than once ({', then '.join(chain)})"
        held, flow = self.held[id(call)], self.trace.flow
        ancestors = flow.ancestors(value, since=self.since)
        inside = [each for each in held if each in ancestors]
        used = self._used(inside, held, ancestors, value)
        heads = [each for each in inside if self._heads(held[each], used, size) is not None]
        if not heads:
            return f"the output of {_last(call)} is not split into heads of one size"
        best = max(heads)
        columns = self._heads(held[best], used, size)
        assert columns is not None
        last = held[best]
        return Source(call, columns, best, last.norms, last.scaled, last.bounded, last.clipped, value in held)

    def _used(self, inside: list[Value], held: dict[Value, Held], ancestors: set[Value], value: Value) -> Tensor:
        """The columns that what follows reads."""
        flow = self.trace.flow
        leaves = [value] if value in held else []
        for each in inside:
            ops = flow.users[each]
            outputs = [out for op in ops for out in op.outputs if out in ancestors and out not in held]
            leaves += [each] if outputs else []
        return torch.unique(torch.cat([held[leaf].columns.flatten() for leaf in leaves]))

    def _heads(self, held: Held, used: Tensor, size: int) -> Tensor | None:
        """The columns by head, if the value has an axis of heads and all that is used."""
        batch, length = self.trace.flow.shape(self.trace.recording.tokens)
        columns = held.columns
        if columns.dim() == 4 and length in columns.shape[1:3]:
            rows = columns[0, :, 0] if columns.shape[2] == length else columns[0, 0]
        elif columns.dim() == 3 and columns.shape[1] == length and columns.shape[0] % batch == 0:
            rows = columns.unflatten(0, (batch, -1))[0, :, 0]
        elif columns.dim() == 3 and columns.shape[1] % length == 0:
            rows = columns[0].unflatten(0, (length, -1))[0]
        else:
            return None
        return rows if rows.shape[-1] == size and torch.equal(torch.unique(rows), used) else None


def _last(call: Call) -> str:
    return call.path.rpartition(".")[2]


def ungrouped(columns: Tensor) -> Tensor:
    """The columns of each different head, where heads are repeated for groups of queries."""
    different = [0] + [row for row in range(1, len(columns)) if not torch.equal(columns[row], columns[row - 1])]
    return columns[different]


def layout_of(width: int, queries: Tensor, keys: Tensor, values: Tensor) -> Layout | None:
    """The layout of a fused projection by the columns of its heads; None if it is no known one."""
    by_letter = dict(zip("qkv", (queries, keys, values), strict=True))
    size = values.shape[1]
    if any(columns.shape[1] != size for columns in by_letter.values()):
        return None
    heads = {letter: len(columns) for letter, columns in by_letter.items()}
    if sum(heads.values()) * size != width:
        return None
    for blocks in _block_counts(heads):
        for order in map("".join, permutations("qkv")):
            layout = Layout(blocks, order)
            expected = columns_of(layout, heads, size)
            if all(torch.equal(expected[letter], by_letter[letter]) for letter in "qkv"):
                return layout
    return None


def _block_counts(heads: dict[str, int]) -> list:
    fixed = [count for count in range(2, heads["k"] + 1) if not any(each % count for each in heads.values())]
    return ["one", "key-value heads", *fixed]


def columns_of(layout: Layout, heads: dict[str, int], size: int) -> dict[str, Tensor]:
    """The columns [head, d_head] of each letter in a projection of this layout."""
    blocks = layout.count(heads["k"])
    if any(count % blocks for count in heads.values()):
        return dict.fromkeys("qkv", torch.empty(0))
    shares = [heads[letter] // blocks * size for letter in layout.order]
    axis = torch.arange(sum(heads.values()) * size).unflatten(0, (blocks, -1))
    pieces = dict(zip(layout.order, axis.split(shares, dim=-1), strict=True))
    return {letter: pieces[letter].reshape(heads[letter], size) for letter in "qkv"}
