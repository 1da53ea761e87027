"""How does one recorded value depend on others?

Four questions are asked of a recording: whether two values are the same numbers, what a value was made from, which
elements of a projection end up where (`spread`: shape operations only move numbers, so they are run again on the
numbers of the columns), and what a value would be if another were different (`Flow.again`: the recorded operations run
again from there).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .recording import Call, Op, Recording, Ref, Value

#: Operations whose result has the same elements in the same order.
SAME = frozenset(
    "view _unsafe_view reshape clone _to_copy detach alias contiguous squeeze unsqueeze lift_fresh".split()
)
#: Operations whose result has elements of one argument, perhaps in another order, some left out or repeated.
MOVES = SAME | frozenset(
    "transpose permute t slice select split split_with_sizes chunk unbind expand repeat index index_select unfold "
    "repeat_interleave narrow flatten unflatten as_strided movedim unsafe_split unsafe_chunk flip roll".split()
)


@dataclass(frozen=True, eq=False)
class Held:
    """A value that is made of columns of another's last axis, and what was done to them on the way."""

    #: Of the value's shape: which column each element comes from.
    columns: Tensor
    #: The norms that they went through, and whether they were multiplied with or bounded by numbers.
    norms: tuple[Call, ...] = ()
    scaled: bool = False
    bounded: bool = False
    #: Whether they were bounded in place.
    clipped: bool = False

    @property
    def plain(self) -> bool:
        """Whether the numbers are those of the columns."""
        return not (self.norms or self.scaled or self.bounded or self.clipped)


class Flow:
    """The data flow of one recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.users: dict[Value, list[Op]] = defaultdict(list)
        for op in recording.ops:
            for value in dict.fromkeys(op.inputs):
                self.users[value].append(op)

    def tensor(self, value: Value) -> Tensor:
        """What the value was."""
        return self.recording.tensors[value]

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's shape."""
        return tuple(self.recording.tensors[value].shape)

    def maker(self, value: Value) -> Op | None:
        """The operation that made the value; None for an input or a parameter."""
        return self.recording.makers.get(value)

    def root(self, value: Value) -> Value:
        """The earliest value of the same elements in the same order (a cast counts as the same)."""
        while True:
            op = self.maker(value)
            if op is None or not op.inputs or not (op.name in SAME or _adds_nothing(op)):
                return value
            value = op.inputs[0]

    def same(self, one: Value | None, other: Value | None) -> bool:
        """Whether two values are the same elements in the same order."""
        return one is not None and other is not None and self.root(one) == self.root(other)

    def ancestors(self, value: Value, stop: Collection[Value] = (), since: int = 0) -> set[Value]:
        """What the value was made from by operations at or after ``since``, itself included; not through ``stop``."""
        seen, todo = {value}, [value]
        while todo:
            here = todo.pop()
            op = self.maker(here)
            if here in stop or op is None or op.time < since:
                continue
            new = set(op.inputs) - seen
            seen |= new
            todo += new
        return seen

    def depends(self, value: Value, on: Collection[Value], stop: Collection[Value] = (), since: int = 0) -> bool:
        """Whether any of ``on`` is among the value's ancestors."""
        return not self.ancestors(value, stop, since).isdisjoint(on)

    def spread(
        self, source: Value, ends: int, norms: Mapping[Value, Call] | None = None, columns: Tensor | None = None
    ) -> dict[Value, Held]:
        """Every value before ``ends`` that consists of elements of ``source``, moved about, normed or scaled.

        Args:
            norms: input of a norm -> its call; these are gone through.
            columns: of the source's shape; the indices of its last axis if not given.
        """
        if columns is None:
            shape = self.shape(source)
            columns = torch.arange(shape[-1]).expand(shape).clone()
        found = {source: Held(columns)}
        todo = [source]
        while todo:
            value = todo.pop()
            held = found[value]
            for op in self.users[value]:
                if op.time >= ends:
                    continue
                for output, result in self._moved(op, value, held).items():
                    if output not in found:
                        found[output] = result
                        todo.append(output)
            call = (norms or {}).get(value)
            if call is not None and call.output is not None and call.output not in found and call.end <= ends:
                found[call.output] = replace(held, norms=(*held.norms, call))
                todo.append(call.output)
        return found

    def _moved(self, op: Op, value: Value, held: Held) -> dict[Value, Held]:
        """What an operation makes of columns, if it leaves them whole."""
        if op.name in MOVES:
            if op.inputs[0] != value:
                return {}
            moved = held.columns if op.name == "_to_copy" else _run(op, {value: held.columns}, self.tensor)
            pieces = moved if isinstance(moved, (list, tuple)) else [moved]
            return {out: replace(held, columns=piece) for out, piece in zip(op.outputs, pieces, strict=False)}
        if op.name == "clamp_":
            return {op.outputs[0]: replace(held, clipped=True)}
        if op.name in ("clamp", "clamp_min", "clamp_max"):
            return {op.outputs[0]: replace(held, bounded=True)}
        if op.name in ("mul", "mul_", "div", "div_") and self.factor_of(op, value) is not None:
            return {op.outputs[0]: replace(held, scaled=True)}
        return {}

    def factor_of(self, op: Op, value: Value) -> Any:
        """What an operation multiplies ``value`` with (a number or a value), if it is one number or a parameter."""
        others = [arg for arg in op.args[:2] if arg != Ref(value)]
        if len(others) != 1 or op.name not in ("mul", "mul_", "div", "div_"):
            return None
        other = others[0]
        if not isinstance(other, Ref):
            return other
        tensor = self.tensor(other.value)
        return other if tensor.numel() == 1 or (tensor.dim() == 1 and self.maker(other.value) is None) else None

    def again(self, value: Value, changed: Mapping[Value, Tensor]) -> Tensor:
        """What ``value`` would be if the ``changed`` values were different."""
        results: dict[Value, Tensor] = dict(changed)
        order = sorted(self._between(value, changed), key=lambda op: op.time)
        for op in order:
            out = _run(op, results, self.tensor)
            pieces = out if isinstance(out, (list, tuple)) else [out]
            results |= dict(zip(op.outputs, pieces, strict=False))
        return results.get(value, self.tensor(value))

    def _between(self, value: Value, changed: Collection[Value]) -> set[Op]:
        """The operations by which ``value`` depends on what is changed."""
        earliest = min((self._time(each) for each in changed), default=0)
        inner = self.ancestors(value, stop=set(changed), since=earliest)
        ops = {op for op in map(self.maker, inner) if op is not None and op.time >= earliest}
        touched, found = set(changed), set()
        for op in sorted(ops, key=lambda op: op.time):
            if not touched.isdisjoint(op.inputs) and not touched.issuperset(op.outputs):
                touched |= set(op.outputs)
                found.add(op)
        return found

    def _time(self, value: Value) -> int:
        op = self.maker(value)
        return -1 if op is None else op.time

    def callers_of(self, value: Value, calls: Iterable[Call]) -> list[Call]:
        """Which of the calls returned this value, the outermost first."""
        found = [call for call in calls if self.same(call.output, value)]
        return sorted(found, key=lambda call: (call.start, -call.end, call.path.count(".")))


def _adds_nothing(op: Op) -> bool:
    return op.name in ("add", "add_") and len(op.args) > 1 and isinstance(op.args[1], (int, float)) and op.args[1] == 0


def _run(op: Op, given: Mapping[Value, Tensor], recorded: Callable[[Value], Tensor]) -> Any:
    """Run a recorded operation again, on ``given`` values and, for the others, the recorded ones."""
    if op.function is None:
        raise LookupError("an edit of a part of a tensor is not run again")

    def fill(ref: Ref) -> Tensor:
        tensor = given[ref.value] if ref.value in given else recorded(ref.value)
        return tensor.clone() if op.in_place else tensor

    args, kwargs = _fill((op.args, op.kwargs), fill)
    with torch.no_grad():
        if op.name in ("view", "_unsafe_view"):
            # What is given may lie in memory in another order.
            return args[0].reshape(args[1])
        return op.function(*args, **kwargs)


def _fill(node: Any, fill: Callable[[Ref], Tensor]) -> Any:
    """Arguments with tensors in their references' places."""
    if isinstance(node, Ref):
        return fill(node)
    if isinstance(node, (list, tuple)):
        return type(node)(_fill(each, fill) for each in node)
    if isinstance(node, dict):
        return {key: _fill(each, fill) for key, each in node.items()}
    return node
