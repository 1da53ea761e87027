"""Where does the residual stream run, and what is added to it?

The layers are the list of modules that takes the stream through; inside one, the way from its output back to its input
leads through additions (whose other side is a branch), factors and norms, and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from .flow import Flow
from .norms import NormFact, formula
from .recording import Call, Op, Recording, Ref, Value

ADDITIONS = ("add", "add_", "sub", "sub_")
FACTORS = ("mul", "mul_", "div", "div_")


@dataclass(frozen=True, eq=False)
class Step:
    """One thing that happens to the stream: ``branch`` is added, it is multiplied by ``factor``, or it is normed."""

    kind: Literal["add", "factor", "norm"]
    before: Value
    after: Value
    time: int
    branch: Value | None = None
    factor: Any = None
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class Term:
    """One thing that is added to the stream."""

    #: The module whose output it is, and what that was; None if no module returns it.
    module: str | None
    value: Value
    #: Norms and factors between the module and the stream.
    norms: tuple[str, ...] = ()
    factors: tuple[Any, ...] = ()
    #: The addition.
    step: Step | None = None


@dataclass
class Trace:
    """A recording with what is found at once: the norms and when each module was called."""

    recording: Recording
    flow: Flow
    norms: dict[str, NormFact] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    #: What a norm returned, and what it was given -> its call.
    norm_outputs: dict[Value, Call] = field(default_factory=dict)
    norm_inputs: dict[Value, list[Call]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, recording: Recording) -> Trace:
        """The trace of a recorded run."""
        trace = cls(recording, Flow(recording))
        for call in recording.calls:
            trace.calls[call.path].append(call)
            if call.input is None or call.output is None:
                continue
            if call.path not in trace.norms:
                found = formula(recording.module(call.path), recording.tensors[call.input])
                if found is None:
                    continue
                trace.norms[call.path] = found
            trace.norm_outputs[trace.flow.root(call.output)] = call
            trace.norm_inputs[trace.flow.root(call.input)].append(call)
        return trace

    def within(self, call: Call) -> list[Call]:
        """The module calls inside another, itself left out."""
        prefix = f"{call.path}."
        return [each for each in self.recording.calls if each.path.startswith(prefix) and self.during(each, call)]

    @staticmethod
    def during(inner: Call, outer: Call) -> bool:
        """Whether one call ran in another's time."""
        return outer.start <= inner.start and inner.end <= outer.end

    def module_of(self, value: Value, calls: list[Call]) -> Call | None:
        """The outermost of the calls that returned this value, norms and modules that do nothing left out."""
        for call in self.flow.callers_of(value, calls):
            idle = call.input is not None and self.flow.same(call.input, call.output)
            if call.path not in self.norms and not idle:
                return call
        return None

    def way(self, value: Value, goal: Value, since: int = 0) -> list[Step] | None:
        """What happens to ``goal`` until it is ``value``, in order; None if other things than `Step` tells of do."""
        return _Way(self, self.flow.root(goal), since).to(value)

    def terms(self, value: Value, calls: list[Call], step: Step | None = None, since: int = 0) -> list[Term]:
        """The modules whose outputs sum up to ``value``, with what stands in between."""
        root, flow = self.flow.root(value), self.flow
        found = self.module_of(value, calls)
        if found is not None:
            return [Term(found.path, value, step=step)]
        norm = self.norm_outputs.get(root)
        if norm is not None and norm.input is not None and norm.start >= since:
            return [_wrapped(term, norm=norm.path) for term in self.terms(norm.input, calls, step, since)]
        op = flow.maker(root)
        if op is None or op.time < since:
            return [Term(None, value, step=step)]
        if op.name in ADDITIONS and len(sides := _sides(op)) == 2:
            return [term for side in sides for term in self.terms(side, calls, step, since)]
        if op.name in FACTORS:
            for side in _sides(op):
                factor = flow.factor_of(op, side)
                if factor is not None:
                    inner = self.terms(side, calls, step, since)
                    return [_wrapped(term, factor=_signed(op, factor)) for term in inner]
        return [Term(None, value, step=step)]


def _wrapped(term: Term, norm: str | None = None, factor: Any = None) -> Term:
    norms = term.norms if norm is None else (*term.norms, norm)
    factors = term.factors if factor is None else (*term.factors, factor)
    return Term(term.module, term.value, norms, factors, term.step)


def _sides(op: Op) -> list[Value]:
    return [arg.value for arg in op.args[:2] if isinstance(arg, Ref)]


def _signed(op: Op, factor: Any) -> Any:
    """The factor of a product; of a quotient, where that is a plain number, its inverse."""
    if op.name.startswith("div") and isinstance(factor, (int, float)):
        return 1 / factor
    return factor


class _Way:
    """The search for the way from a value back to a goal, with what is known already."""

    def __init__(self, trace: Trace, goal: Value, since: int) -> None:
        self.trace = trace
        self.flow = trace.flow
        self.goal = goal
        self.since = since
        self.known: dict[Value, list[Step] | None] = {}

    def to(self, value: Value) -> list[Step] | None:
        """The steps from the goal to ``value``."""
        root = self.flow.root(value)
        if root == self.goal:
            return []
        if root not in self.known:
            self.known[root] = None
            self.known[root] = self._last(root)
        return self.known[root]

    def _last(self, root: Value) -> list[Step] | None:
        norm = self.trace.norm_outputs.get(root)
        if norm is not None and norm.input is not None and norm.start >= self.since:
            steps = self.to(norm.input)
            if steps is None:
                return None
            return [*steps, Step("norm", norm.input, root, norm.start, norm=norm.path)]
        op = self.flow.maker(root)
        if op is None or op.time < self.since:
            return None
        if op.name in ADDITIONS:
            return self._sum(op, root)
        for side in _sides(op) if op.name in FACTORS else ():
            factor = self.flow.factor_of(op, side)
            steps = self.to(side) if factor is not None else None
            if steps is not None:
                return [*steps, Step("factor", side, root, op.time, factor=_signed(op, factor))]
        return None

    def _sum(self, op: Op, root: Value) -> list[Step] | None:
        """Of the two sides that are added, the stream is the one that was changed less."""
        sides = _sides(op)
        if len(sides) != 2 or any(self.flow.shape(side) != self.flow.shape(root) for side in sides):
            return None
        ways = [(steps, index) for index, side in enumerate(sides) if (steps := self.to(side)) is not None]
        if not ways:
            return None
        steps, index = min(ways, key=lambda way: (sum(step.kind == "norm" for step in way[0]), len(way[0])))
        return [*steps, Step("add", sides[index], root, op.time, branch=sides[1 - index])]


def find_layers(trace: Trace) -> tuple[str, list[Call]] | str:
    """(path, the call of each layer) of the list of layers that takes the stream through; else why there is none."""
    best: tuple[int, str, list[Call]] | None = None
    reasons: list[str] = []
    for path, module in trace.recording.model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        calls = [trace.calls.get(f"{path}.{index}", []) for index in range(len(module))]
        if not all(calls):
            continue
        if any(len(each) > 1 for each in calls):
            times = max(map(len, calls))
            reasons.append(f"a layer of {path!r} runs {times} times in a forward pass")
            continue
        layers = [each[0] for each in calls]
        if not all(_keeps_shape(trace, layer) for layer in layers):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, path, layers)
    if best is not None:
        return best[1], best[2]
    return (
        "; ".join(reasons) or "no list of modules takes one tensor (batch, pos, d_model) through, one after the other"
    )


def _keeps_shape(trace: Trace, call: Call) -> bool:
    if call.input is None or call.output is None or call.container is not None:
        return False
    shape, tokens = trace.flow.shape(call.input), trace.flow.shape(trace.recording.tokens)
    children = next(trace.recording.module(call.path).children(), None)
    return children is not None and shape == trace.flow.shape(call.output) and shape[:2] == tokens and len(shape) == 3


def attribute_of(model: nn.Module, path: str, factor: Any, recording: Recording) -> str | None:
    """The attribute of the module at ``path`` that holds a factor."""
    module = model.get_submodule(path)
    held: Mapping[str, Any] = {**vars(module), **module._parameters, **module._buffers}
    for name, value in held.items():
        if isinstance(factor, Ref):
            if value is not None and getattr(value, "data_ptr", None) and recording.number(value) == factor.value:
                return name
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value - factor) < 1e-9:
            return name
    return None
