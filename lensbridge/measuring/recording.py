"""What happened in a forward pass: which operation made which tensor, inside which module?

PyTorch shows every operation to a dispatch mode, and every module call to hooks. What flows is numbered by content: a
tensor that is edited in place has a new number afterwards, and two views of the same memory with the same shape have
one, so that a number stands for one value from the moment it is made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

#: A tensor as it was at some moment.
Value = int


class Ref(NamedTuple):
    """A value among the recorded arguments of an operation."""

    value: Value


class Caller(NamedTuple):
    """A Python function that was running: its code, where it was, and which values its names had."""

    code: CodeType
    instruction: int
    line: int
    values: dict[str, Value]


@dataclass(frozen=True, eq=False)
class Op:
    """One operation, at position ``time`` in the run."""

    time: int
    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    #: The modules that were running, outermost first.
    inside: tuple[str, ...]
    in_place: bool = False


@dataclass(eq=False)
class Call:
    """One call of a module: between operations ``start`` and ``end``."""

    path: str
    start: int
    #: What nnsight would serve as the module's input: its first argument. None if that is no tensor of numbers.
    input: Value | None
    inputs: tuple[Value, ...]
    end: int = -1
    #: Its output, or the first entry of a tuple.
    output: Value | None = None
    outputs: tuple[Value, ...] = ()
    #: The type of what it returned, where that is neither a tensor nor a tuple.
    container: str | None = None


@dataclass
class Recording:
    """A forward pass of ``model``."""

    model: nn.Module
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    #: Where in memory each value was.
    memory: list[int] = field(default_factory=list)
    #: value -> what made it, for all but inputs and parameters.
    makers: dict[Value, Op] = field(default_factory=dict)
    #: time of a softmax -> who called it, innermost first, up to the forward of the innermost module.
    callers: dict[int, list[Caller]] = field(default_factory=dict)
    #: What was fed, and what came out of the model's head.
    tokens: Value = -1
    logits: Value = -1
    _numbers: dict[tuple[Any, ...], Value] = field(default_factory=dict)

    @cached_property
    def modules(self) -> frozenset[nn.Module]:
        """All modules of the model."""
        return frozenset(self.model.modules())

    def number(self, tensor: Tensor) -> Value:
        """The value that a tensor holds now."""
        found = self._numbers.get(_memory(tensor))
        return self.renumber(tensor) if found is None else found

    def renumber(self, tensor: Tensor) -> Value:
        """A new value, because the tensor is new or was edited."""
        # Kept alive, so that its memory is nobody else's.
        self.tensors.append(tensor)
        self.memory.append(tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor))
        value = self._numbers[_memory(tensor)] = len(self.tensors) - 1
        return value

    def known(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory has a number."""
        return _memory(tensor) in self._numbers

    def module(self, path: str) -> nn.Module:
        """A module of the model."""
        return self.model.get_submodule(path)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share if they are the same numbers in the same shape."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype


class _Operations(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self, recording: Recording, inside: list[str]) -> None:
        super().__init__()
        self.recording = recording
        self.inside = inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        record, kwargs = self.recording, kwargs or {}
        noted: Any = tree_map_only(Tensor, lambda tensor: Ref(record.number(tensor)), (args, kwargs))
        written = _written(func, args, kwargs)
        edited = [(record.number(tensor), tensor) for tensor in written]
        for value, tensor in edited:
            record.tensors[value] = tensor.clone()
        out = func(*args, **kwargs)
        known = len(record.tensors)
        makes = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        outputs = tuple(
            record.renumber(tensor) if written or not record.known(tensor) else record.number(tensor)
            for tensor in makes or written
        )
        inputs = tuple(leaf.value for leaf in tree_leaves(noted, is_leaf=_is_ref) if isinstance(leaf, Ref))
        if all(value < known for value in outputs):
            return out  # another view of what there is
        self._add(func, noted, inputs, outputs, bool(written))
        for tensor in written:
            self._base_changes(tensor, outputs[0])
        return out

    def _add(self, func: Any, noted: Any, inputs: Any, outputs: Any, in_place: bool) -> None:
        record = self.recording
        name = str(func.overloadpacket).removeprefix("aten.")
        args, kwargs = noted
        op = Op(len(record.ops), name, func, args, kwargs, inputs, outputs, tuple(self.inside), in_place)
        record.ops.append(op)
        record.makers |= {value: op for value in outputs if value not in inputs and value not in record.makers}
        if "softmax" in name:
            record.callers[op.time] = list(_callers(record))

    def _base_changes(self, view: Tensor, edit: Value) -> None:
        """An edit of a part of a tensor makes another tensor of the whole."""
        record, base = self.recording, view._base
        if base is None or not record.known(base) or base.shape == view.shape:
            return
        before = record.number(base)
        after = record.renumber(base)
        op = Op(len(record.ops), "edit", None, (Ref(before), Ref(edit)), {}, (before, edit), (after,), (*self.inside,))
        record.ops.append(op)
        record.makers[after] = op


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation edits in place."""
    if not func._schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [given] if isinstance(given, Tensor) else []
    return found


def _callers(recording: Recording) -> Iterator[Caller]:
    """The functions between an operation and the forward of the innermost module."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(60):
        if frame is None:
            return
        code = frame.f_code
        names = frame.f_locals
        if code.co_filename != __file__ and "/torch/" not in code.co_filename.replace("\\", "/"):
            values = {name: recording.number(held) for name, held in names.items() if isinstance(held, Tensor)}
            yield Caller(code, frame.f_lasti, frame.f_lineno, values)
        elif code.co_name == "_call_impl" and names.get("self") in recording.modules:
            return
        frame = frame.f_back


@contextmanager
def _watched(recording: Recording, inside: list[str]) -> Iterator[None]:
    """The time in which module calls are noted."""
    open_calls: list[Call] = []

    def enter(path: str, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        inputs = tuple(recording.number(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        call = Call(path, len(recording.ops), _number_of(recording, first), inputs)
        recording.calls.append(call)
        open_calls.append(call)
        inside.append(path)

    def leave(output: Any) -> None:
        inside.pop()
        call = open_calls.pop()
        call.end = len(recording.ops)
        call.outputs = tuple(recording.number(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        call.output = _number_of(recording, output[0] if isinstance(output, tuple) and output else output)
        call.container = None if isinstance(output, (Tensor, tuple)) else type(output).__name__

    handles = []
    for path, module in recording.model.named_modules():
        if path:
            before: Any = lambda module, args, kwargs, path=path: enter(path, args, kwargs)  # noqa: E731
            after: Any = lambda module, args, kwargs, output: leave(output)  # noqa: E731
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _number_of(recording: Recording, given: Any) -> Value | None:
    return recording.number(given) if isinstance(given, Tensor) and given.is_floating_point() else None


@contextmanager
def eager_attention(hf_model: Any) -> Iterator[None]:
    """The time in which a model computes attention step by step, if it has a way to."""
    before = getattr(hf_model.config, "_attn_implementation", None)
    if before in (None, "eager"):
        yield
        return
    hf_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf_model.set_attn_implementation(before)


def record(hf_model: Any, tokens: Tensor) -> Recording:
    """Run ``hf_model`` on ``tokens`` (batch, pos), and note what happens; the model is left as it was.

    Errors of the model's own forward pass are raised as they are.
    """
    recording = Recording(hf_model)
    inside: list[str] = []
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    modes = [(module, module.training) for module in hf_model.modules()]
    hf_model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), eager_attention(hf_model):
            recording.tokens = recording.number(tokens)
            with _watched(recording, inside), _Operations(recording, inside):
                output = _run(hf_model, tokens)
    finally:
        for module, training in modes:
            module.training = training
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if isinstance(logits, Tensor):
        recording.logits = recording.number(logits)
    return recording


def _run(hf_model: Any, tokens: Tensor) -> Any:
    try:
        return hf_model(input_ids=tokens, use_cache=False)
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        return hf_model(input_ids=tokens)
