"""Where in the HuggingFace model does a value appear, and in which order do these places come?

A place is a module's input or output, or the softmax inside an attention's forward. Places are read and written while
nnsight interleaves with the forward pass, and only in the order in which the forward reaches them; that order differs
between families, so it is measured, once per model, by a run on two tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nnsight import NNsight
from nnsight.intervention.source import SourceNotAvailable
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import SourceNotFoundError

Side = Literal["input", "output"]


class View:
    """nnsight's view of a HF model, with its parts by path.

    nnsight puts a handle on every module, in place of its ``forward``. Here a module has its handle only during a run,
    and only if the run visits it: what nobody asked to see costs nothing, and at any other moment the HF model is just
    what it was.
    """

    def __init__(self, hf_model: nn.Module, sourced_paths: list[str]) -> None:
        #: path of an attention -> what the call and the softmax inside it are named in its source.
        self.softmax_names: dict[str, tuple[str, str]] = {}
        self._parts: dict[str, Any] = {}
        modules = dict(hf_model.named_modules())
        before = [(module.__dict__, _handle(module.__dict__)) for module in modules.values()]
        self._forwards = {path: _own_forward(module) for path, module in modules.items()}
        # The bare wrapper runs on exactly the arguments given; the tokenizing ones rebuild them on every run.
        self.nnsight = NNsight(hf_model)
        for path in sourced_paths:
            # nnsight has to be asked to see inside a forward before a run, not during one.
            _ = self[path].source
        self._modules = modules
        self._handles = {path: (module.__dict__, _handle(module.__dict__)) for path, module in modules.items()}
        for attributes, handle in before:
            _put(attributes, handle)

    def __getitem__(self, path: str) -> Any:
        part = self._parts.get(path)
        if part is None:
            part = self._parts[path] = self.nnsight.get(path)
        return part

    def fits(self, paths: Iterable[str]) -> bool:
        """Whether the modules at ``paths`` have the forwards around which the handles were made."""
        return all(_own_forward(self._modules[path]) == self._forwards[path] for path in paths)

    def show(self, point: nn.Module, value: Tensor) -> Any:
        """Call a hook point from inside a run; what its hooks run on the HF model is not part of this run."""
        interleaver = self.nnsight.interleaver
        interleaver.interleaving = False
        try:
            return point(value)
        finally:
            interleaver.interleaving = True

    @contextmanager
    def installed(self, paths: Iterable[str]) -> Iterator[None]:
        """The time of a run: nnsight's handles are on the modules at ``paths``."""
        here = [self._handles[path] for path in paths]
        before = [(attributes, _handle(attributes)) for attributes, _ in here]
        for attributes, handle in here:
            _put(attributes, handle)
        try:
            yield
        finally:
            for attributes, handle in before:
                _put(attributes, handle)


def _own_forward(module: nn.Module) -> tuple[Any, type]:
    """What decides which forward a module runs: its own attribute (accelerate sets one, say), else its class."""
    return module.__dict__.get("forward"), type(module)


def _handle(attributes: dict[str, Any]) -> tuple[Any, Any]:
    """What nnsight sets on a module: the function in front of the module's own, and its state."""
    return attributes.get("forward"), attributes.get("__nnsight__")


def _put(attributes: dict[str, Any], handle: tuple[Any, Any]) -> None:
    for key, value in zip(("forward", "__nnsight__"), handle, strict=True):
        if value is None:
            attributes.pop(key, None)
        else:
            attributes[key] = value


@dataclass(frozen=True)
class Place:
    """The input or output of a module of the HF model; of a tuple output, the first entry."""

    path: str
    side: Side

    def read(self, view: View) -> Tensor:
        """The live tensor; waits until the forward pass gets here."""
        value = getattr(view[self.path], self.side)
        return value[0] if isinstance(value, tuple) else value

    def write(self, view: View, value: Tensor) -> None:
        """Put ``value`` in the tensor's place for the rest of the forward pass."""
        envoy = view[self.path]
        # What a hook has rearranged or expanded has other strides, and HF's modules look at tensors with ``view``.
        value = value.contiguous()
        if self.side == "input":
            envoy.input = value
            return
        now = envoy.output
        envoy.output = (value, *now[1:]) if isinstance(now, tuple) else value


@dataclass(frozen=True)
class SoftmaxPlace:
    """What goes into an attention's softmax, or comes out of it."""

    path: str
    call: str
    operation: str
    side: Side

    def read(self, view: View) -> Tensor:
        return getattr(self._operation(view), self.side)

    def write(self, view: View, value: Tensor) -> None:
        setattr(self._operation(view), self.side, value)

    def _operation(self, view: View) -> Any:
        """The softmax, found by meaning: a call whose name has ``operation``, inside one whose name has ``call``."""
        outer = view[self.path].source
        known = view.softmax_names.get(self.path)
        if known is not None:
            return getattr(getattr(outer, known[0]).source, known[1])
        for name in outer.names:
            if not _stem(name).endswith(self.call):
                continue
            try:
                inner = getattr(outer, name).source
            except SourceNotAvailable:
                continue  # the assignment of the function to a variable of the same name
            found = [op for op in inner.names if self.operation in _stem(op)]
            if found:
                view.softmax_names[self.path] = (name, found[0])
                return getattr(inner, found[0])
        raise SourceNotFoundError(
            f"no {self.operation!r} inside a call of {self.call!r} in the forward of {self.path!r} "
            f"(its operations: {', '.join(outer.names)}). Attention scores and patterns need it; another version of "
            "transformers or another attention implementation may have moved it."
        )


AnyPlace = Place | SoftmaxPlace


def _stem(name: str) -> str:
    """An operation's name without the number that nnsight appends."""
    return name.rsplit("_", 1)[0]


class _SoftmaxRecorder(TorchFunctionMode):
    """Notes when a softmax runs while an attention module does."""

    def __init__(self, events: list[tuple[str, str]], inside: list[str]) -> None:
        super().__init__()
        self.events = events
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and "softmax" in getattr(func, "__name__", ""):
            self.events.append((self.inside[-1], "softmax"))
        return func(*args, **(kwargs or {}))


def measure_order(hf_model: nn.Module, attention_paths: list[str]) -> dict[tuple[str, str], int]:
    """(path, "input" | "output" | "softmax") -> rank of its first occurrence in a forward pass.

    The model must be using eager attention for the softmax to be seen. Random state and modes are left as they were.
    """
    events: list[tuple[str, str]] = []
    inside: list[str] = []
    handles = []
    for path, module in hf_model.named_modules():
        if not path:
            continue

        def enter(module: nn.Module, args: Any, path: str = path) -> None:
            events.append((path, "input"))
            if path in attention_paths:
                inside.append(path)

        def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            events.append((path, "output"))
            if path in attention_paths:
                inside.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    device = next(hf_model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _SoftmaxRecorder(events, inside):
            hf_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order: dict[tuple[str, str], int] = {}
    for rank, event in enumerate(events):
        order.setdefault(event, rank)
    return order
