"""Where in the HuggingFace model does a value appear, and in which order do these places come?

A place is a module's input or output, or the softmax inside an attention's forward. Places are read and written while
nnsight interleaves with the forward pass, and only in the order in which the forward reaches them; that order differs
between families, so it is measured, once per model, by a run on two tokens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from nnsight import NNsight
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..architectures.record import Softmax
from ..parameters import factor_of
from .operations import Operation

Side = Literal["input", "output"]
#: A module's path; "input", "output" or (of an attention) "softmax"; how often the forward pass had come there before.
Event = tuple[str, str, int]


class View:
    """nnsight's view of a HF model, with its parts by path.

    nnsight puts a handle on every module, in place of its ``forward``. Here a module has its handle only during a run,
    and only if the run visits it: what nobody asked to see costs nothing, and at any other moment the HF model is just
    what it was.
    """

    def __init__(
        self,
        hf_model: nn.Module,
        softmaxes: Mapping[str, Softmax] | None = None,
        wrap: Callable[[nn.Module], Any] = NNsight,
        required: bool = True,
    ) -> None:
        self._parts: dict[str, Any] = {}
        #: In a run, of modules on which another nnsight wrapper's handle was: (attributes, its handle, ours).
        self._foreign: list[tuple[dict[str, Any], Any, Any]] = []
        modules = dict(hf_model.named_modules())
        before = [(module.__dict__, _handle(module.__dict__)) for module in modules.values()]
        self._forwards = {path: _own_forward(module) for path, module in modules.items()}
        for module in modules.values():
            _take_off(module)
        # The bare wrapper runs on exactly the arguments given; the tokenizing ones rebuild them on every run.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Module .* has a submodule named", UserWarning)
            self.nnsight = wrap(hf_model)
        #: path of an attention -> the operation watched inside it.
        self.operations = {
            path: Operation(self[path], softmax.call, softmax.operation, required)
            for path, softmax in (softmaxes or {}).items()
        }
        self._modules = modules
        self._handles = {path: (module.__dict__, _handle(module.__dict__)) for path, module in modules.items()}
        for attributes, handle in before:
            _put(attributes, handle)

    def __getitem__(self, path: str) -> Any:
        part = self._parts.get(path)
        if part is None:
            # By the module: where one is called ``output``, nnsight's path is another.
            module = self.nnsight._module.get_submodule(path)
            part = self._parts[path] = self.nnsight.interleaver.envoys[id(module)]
        return part

    def module(self, path: str) -> nn.Module:
        """A module of the HF model itself."""
        return self._modules[path]

    @property
    def paths(self) -> list[str]:
        """The paths of all modules, the whole model's (which is empty) included."""
        return list(self._modules)

    def fits(self, paths: Iterable[str]) -> bool:
        """Whether the modules at ``paths`` have the forwards around which the handles were made."""
        return all(_own_forward(self._modules[path]) == self._forwards[path] for path in paths)

    def is_of(self, hf_model: nn.Module) -> bool:
        """Whether this is a view of the model as it is now: of these modules, with these forwards."""
        return dict(hf_model.named_modules()) == self._modules and self.fits(self._modules)

    def show(self, point: nn.Module, value: Tensor) -> Any:
        """Call a hook point from inside a run; what its hooks run on the HF model is not part of this run."""
        return self.apart(point, value)

    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call something from inside a run; what it runs on the HF model is not part of this run."""
        interleaver, foreign = self.nnsight.interleaver, self._foreign
        interleaver.interleaving = False
        for attributes, theirs, _ in foreign:
            _put(attributes, theirs)
        try:
            return function(*args)
        finally:
            for attributes, _, ours in foreign:
                _put(attributes, ours)
            interleaver.interleaving = True

    @contextmanager
    def installed(self, paths: Iterable[str]) -> Iterator[None]:
        """The time of a run: nnsight's handles are on the modules at ``paths``."""
        before = []
        for attributes, handle in [self._handles[path] for path in paths]:
            before.append((attributes, _handle(attributes), handle))
            attributes["forward"], attributes["__nnsight__"] = handle
        self._foreign = [entry for entry in before if entry[1][1] is not None]
        try:
            yield
        finally:
            for attributes, handle, _ in before:
                _put(attributes, handle)


def _own_forward(module: nn.Module) -> tuple[Any, type]:
    """What decides which forward a module runs: its own attribute (accelerate sets one, say), else its class."""
    return module.__dict__.get("forward"), type(module)


def _handle(attributes: dict[str, Any]) -> tuple[Any, Any]:
    """What nnsight sets on a module: the function in front of the module's own, and its state."""
    return attributes.get("forward"), attributes.get("__nnsight__")


def _take_off(module: nn.Module) -> None:
    """Let a module be as it was before somebody else's nnsight wrapper put its handle on it."""
    state = module.__dict__.get("__nnsight__")
    if state is not None:
        original = None if state.original is type(module).forward else MethodType(state.original, module)
        _put(module.__dict__, (original, None))


def _put(attributes: dict[str, Any], handle: tuple[Any, Any]) -> None:
    attributes["forward"], attributes["__nnsight__"] = forward, state = handle
    if forward is None:
        del attributes["forward"]
    if state is None:
        del attributes["__nnsight__"]


@contextmanager
def _at_call(number: int) -> Iterator[None]:
    """The time in which what is asked for is that of a later call of a module: nnsight's is the first one's."""
    if number == 0:
        yield
        return
    mediator = Mediator.current("a call")
    before, mediator.iteration = mediator.iteration, number
    try:
        yield
    finally:
        mediator.iteration = before


@dataclass(frozen=True)
class Place:
    """The input or output of a module of the HF model; of a tuple output, the first entry.

    ``flat`` if batch and position are one axis there, which is for who reads it to undo; ``call`` is the number of the
    module's call, where it is called more than once.
    """

    path: str
    side: Side
    flat: bool = False
    call: int = 0

    @property
    def event(self) -> Event:
        """What is measured when the forward pass comes here."""
        return (self.path, self.side, self.call)

    def read(self, view: View) -> Tensor:
        """The live tensor; waits until the forward pass gets here."""
        with _at_call(self.call):
            value = getattr(view[self.path], self.side)
        return value[0] if isinstance(value, tuple | list) else value

    def write(self, view: View, value: Tensor) -> None:
        """Put ``value`` in the tensor's place for the rest of the forward pass."""
        envoy = view[self.path]
        # What a hook has rearranged or expanded has other strides, and HF's modules look at tensors with ``view``.
        value = value.contiguous()
        with _at_call(self.call):
            if self.side == "input":
                envoy.input = value
                return
            now = envoy.output
            envoy.output = type(now)((value, *now[1:])) if isinstance(now, tuple | list) else value


@dataclass(frozen=True)
class SoftmaxPlace:
    """What goes into an attention's softmax, or comes out of it."""

    path: str
    side: Side

    def read(self, view: View) -> Tensor:
        return getattr(view.operations[self.path].softmax, self.side)

    def write(self, view: View, value: Tensor) -> None:
        setattr(view.operations[self.path].softmax, self.side, value)


@dataclass(frozen=True)
class ArgumentPlace:
    """A positional argument of the function that an attention calls on its queries, keys and values."""

    path: str
    argument: int

    def read(self, view: View) -> Tensor:
        return view.operations[self.path].around.inputs[0][self.argument]

    def write(self, view: View, value: Tensor) -> None:
        call = view.operations[self.path].around
        args, kwargs = call.inputs
        call.inputs = ((*args[: self.argument], value, *args[self.argument + 1 :]), kwargs)


@dataclass(frozen=True)
class ResultPlace:
    """What the function returns that an attention calls on its queries, keys and values (first of a tuple)."""

    path: str

    def read(self, view: View) -> Tensor:
        value = view.operations[self.path].around.output
        return value[0] if isinstance(value, tuple) else value

    def write(self, view: View, value: Tensor) -> None:
        call = view.operations[self.path].around
        now = call.output
        call.output = (value, *now[1:]) if isinstance(now, tuple) else value


@dataclass(frozen=True)
class FactorPlace(Place):
    """What is added to the stream where a factor stands between it and a module's output.

    ``owner`` is the module below which the attribute ``factor`` holds it.
    """

    owner: str = ""
    factor: str = ""

    def read(self, view: View) -> Tensor:
        value, factor = super().read(view), factor_of(view.module(self.owner), self.factor)
        return value if factor is None else value * factor

    def write(self, view: View, value: Tensor) -> None:
        factor = factor_of(view.module(self.owner), self.factor)
        super().write(view, value if factor is None else value / factor)


AnyPlace = Place | ArgumentPlace | SoftmaxPlace | ResultPlace


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


def measure_order(
    hf_model: nn.Module, attention_paths: list[str], inputs: Mapping[str, Any] | None = None
) -> dict[Event, int]:
    """Event -> its rank in a forward pass.

    The model must be using eager attention for the softmax to be seen. Random state and modes are left as they were.

    Args:
        inputs: what to run the model on; two tokens if not given.
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
            if inputs is None:
                inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device), "use_cache": False}
            hf_model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    order: dict[Event, int] = {}
    times: Counter[tuple[str, str]] = Counter()
    for rank, event in enumerate(events):
        path, moment = event
        order[path, moment, times[event]] = rank
        times[event] += 1
    return order
