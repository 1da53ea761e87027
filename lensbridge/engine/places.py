"""Where in the HuggingFace model does a value appear?

A place is a module's input or output, or an operation inside an attention's forward. Places are read and written while
nnsight interleaves with the forward pass, and only in the order in which the forward reaches them (`passage.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from nnsight.intervention.fragments import Fragments
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.source import Controller
from torch import Tensor, nn

from ..architectures.block import Factor
from ..architectures.record import Softmax
from ..parameters import factor_of
from ..whole import is_spread, stand_in
from .envoys import Handle
from .operations import Operation
from .passage import Event
from .tensor_parallel import PartsInterleaver

Side = Literal["input", "output"]


class Parts:
    """nnsight's envoys of the modules of a HF model, by path.

    Args:
        hf_model: the model.
        nnsight: its envoy.
        positions_first: below this module, positions come before the batch.
    """

    def __init__(self, hf_model: nn.Module, nnsight: Any, positions_first: str | None) -> None:
        self.hf_model = hf_model
        self.nnsight = nnsight
        self.positions_first = positions_first
        #: How many calls of a module there are not, because it runs by itself.
        self.calls_before = 0
        self._parts: dict[str, Any] = {}
        #: path of an attention -> the operation watched inside it.
        self.operations: dict[str, Operation] = {}

    def __getitem__(self, path: str) -> Any:
        part = self._parts.get(path)
        if part is None:
            # By the module: where one is called ``output``, nnsight's path is another.
            part = self._parts[path] = self.nnsight.interleaver.envoys[id(self.hf_model.get_submodule(path))]
        return part

    @property
    def batch_first(self) -> bool:
        """Whether tensors have the batch before positions at all modules."""
        return self.positions_first is None

    def has_positions_first(self, path: str) -> bool:
        """Whether tensors at a module have positions before the batch."""
        return self.positions_first is not None and path.startswith(f"{self.positions_first}.")

    @contextmanager
    def at_call(self, number: int) -> Iterator[None]:
        """The time in which what is asked for is that of a later call of a module: nnsight's is the first one's."""
        if number == self.calls_before:
            yield
            return
        mediator = Mediator.current("a call")
        before, mediator.iteration = mediator.iteration, number - self.calls_before
        try:
            yield
        finally:
            mediator.iteration = before

    def module(self, path: str) -> nn.Module:
        """A module of the HF model itself."""
        return self.hf_model.get_submodule(path)

    def trace(self, **inputs: Any) -> Any:
        """A trace of the whole model."""
        return self.nnsight.trace(**inputs)

    def show(self, point: nn.Module, value: Tensor) -> Any:
        """Call a hook point from inside a run; what its hooks run on the HF model is not part of this run."""
        return self.apart(point, value)

    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call something from inside a run; what it runs on the HF model is not part of this run."""
        interleaver = self.nnsight.interleaver
        interleaver.interleaving = False
        try:
            return function(*args)
        finally:
            interleaver.interleaving = True


class View(Parts):
    """nnsight's view of a HF model that runs here.

    nnsight puts a handle on every module, in place of its ``forward``. Here a module has its handle only during a run,
    and only if the run visits it: what nobody asked to see costs nothing, and at any other moment the HF model is just
    what it was.
    """

    def __init__(
        self,
        hf_model: nn.Module,
        softmaxes: Mapping[str, Softmax] | None = None,
        wrap: Callable[..., Any] = Handle,
        required: bool = True,
        positions_first: str | None = None,
        parts: Fragments | None = None,
    ) -> None:
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
            # Where values are divided among processes, they are put together for the run.
            options = {} if parts is None else {"interleaver": PartsInterleaver(parts)}
            super().__init__(hf_model, wrap(hf_model, **options), positions_first)
        self.operations = {
            path: Operation(self[path], softmax, required) for path, softmax in (softmaxes or {}).items()
        }
        self._modules = modules
        self._handles = {path: (module.__dict__, _handle(module.__dict__)) for path, module in modules.items()}
        for attributes, handle in before:
            _put(attributes, handle)

    def module(self, path: str) -> nn.Module:
        """A module of the HF model itself, or what stands for it where its parameters are not whole."""
        module = self._modules[path]
        return stand_in(module) if is_spread(self._modules[""]) else module

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

    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call something from inside a run; what it runs on the HF model is not part of this run."""
        for attributes, theirs, _ in self._foreign:
            _put(attributes, theirs)
        try:
            return super().apart(function, *args)
        finally:
            for attributes, _, ours in self._foreign:
                _put(attributes, ours)

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
        forward = module.__dict__.get("forward")
        if not isinstance(forward, Controller):
            # Tensor parallelism's wrapper is around it.
            _put(module.__dict__, (forward, None))
            return
        original = None if state.original is type(module).forward else MethodType(state.original, module)
        _put(module.__dict__, (original, None))


def _put(attributes: dict[str, Any], handle: tuple[Any, Any]) -> None:
    attributes["forward"], attributes["__nnsight__"] = forward, state = handle
    if forward is None:
        del attributes["forward"]
    if state is None:
        del attributes["__nnsight__"]


@dataclass(frozen=True)
class Place:
    """The input or output of a module of the HF model; of a tuple output, the first entry.

    ``flat`` if batch and position are one axis there, which is for who reads it to undo; ``call`` is the number of the
    module's call, where it is called more than once; ``repeated`` if what is put here goes to other places, too.
    """

    path: str
    side: Side
    flat: bool = False
    call: int = 0
    repeated: bool = False

    @property
    def event(self) -> Event:
        """What is measured when the forward pass comes here."""
        return (self.path, self.side, self.call)

    def read(self, view: Parts) -> Tensor:
        """The live tensor; waits until the forward pass gets here."""
        with view.at_call(self.call):
            value = getattr(view[self.path], self.side)
        value = value[0] if isinstance(value, tuple | list) else value
        return value.transpose(0, 1) if view.has_positions_first(self.path) else value

    def write(self, view: Parts, value: Tensor) -> None:
        """Put ``value`` in the tensor's place for the rest of the forward pass."""
        envoy = view[self.path]
        # What a hook has rearranged or expanded has other strides, and HF's modules look at tensors with ``view``.
        value = (value.transpose(0, 1) if view.has_positions_first(self.path) else value).contiguous()
        with view.at_call(self.call):
            if self.side == "input":
                envoy.input = value
                return
            now = envoy.output
            envoy.output = type(now)((value, *now[1:])) if isinstance(now, tuple | list) else value


@dataclass(frozen=True)
class SoftmaxPlace:
    """What goes into an attention's softmax, or comes out of it.

    ``call`` and ``repeated`` are as of `Place`.
    """

    path: str
    side: Side
    call: int = 0
    repeated: bool = False

    def read(self, view: Parts) -> Tensor:
        with view.at_call(self.call):
            return getattr(view.operations[self.path].softmax, self.side)

    def write(self, view: Parts, value: Tensor) -> None:
        with view.at_call(self.call):
            setattr(view.operations[self.path].softmax, self.side, value)


@dataclass(frozen=True)
class ArgumentPlace:
    """A positional argument of the function that an attention calls on its queries, keys and values.

    ``call`` and ``repeated`` are as of `Place`.
    """

    path: str
    argument: int
    call: int = 0
    repeated: bool = False

    def read(self, view: Parts) -> Tensor:
        with view.at_call(self.call):
            value = view.operations[self.path].around.inputs[0][self.argument]
        return value.permute(1, 2, 0, 3) if view.has_positions_first(self.path) else value

    def write(self, view: Parts, value: Tensor) -> None:
        call = view.operations[self.path].around
        value = value.permute(2, 0, 1, 3) if view.has_positions_first(self.path) else value
        with view.at_call(self.call):
            args, kwargs = call.inputs
            call.inputs = ((*args[: self.argument], value, *args[self.argument + 1 :]), kwargs)


@dataclass(frozen=True)
class ResultPlace:
    """What the function returns that an attention calls on its queries, keys and values (first of a tuple)."""

    path: str
    call: int = 0

    def read(self, view: Parts) -> Tensor:
        with view.at_call(self.call):
            value = view.operations[self.path].around.output
        value = value[0] if isinstance(value, tuple) else value
        return value.transpose(0, 1) if view.has_positions_first(self.path) else value

    def write(self, view: Parts, value: Tensor) -> None:
        call = view.operations[self.path].around
        value = value.transpose(0, 1) if view.has_positions_first(self.path) else value
        with view.at_call(self.call):
            now = call.output
            call.output = (value, *now[1:]) if isinstance(now, tuple) else value


@dataclass(frozen=True)
class FactorPlace(Place):
    """What is added to the stream where a factor, or a bias, stands between it and a module's output.

    ``owner`` is the module below which the attributes ``factor`` (to a power) and ``bias`` hold them, or which these
    are made of.
    """

    owner: str = ""
    factor: Factor | None = None
    bias: Factor | None = None
    power: float = 1.0

    def read(self, view: Parts) -> Tensor:
        value = super().read(view)
        factor, bias = self._terms(view, value.device)
        value = value if factor is None else value * factor
        return value if bias is None else value + bias

    def write(self, view: Parts, value: Tensor) -> None:
        factor, bias = self._terms(view, value.device)
        value = value if bias is None else value - bias
        super().write(view, value if factor is None else value / factor)

    def _terms(self, view: Parts, device: torch.device) -> tuple[Any, ...]:
        owner = view.module(self.owner)
        terms = factor_of(owner, self.factor, self.power), factor_of(owner, self.bias)
        return tuple(_at(device, term) for term in terms)


def _at(device: torch.device, term: Any) -> Any:
    """A term on a device; a number is nowhere."""
    return term.to(device) if isinstance(term, Tensor) else term


@dataclass(frozen=True)
class FirstPlace(Place):
    """The first of several tensors that are put together along an axis behind the batch."""

    def read(self, view: Parts) -> Tensor:
        return super().read(view)[:, 0]

    def write(self, view: Parts, value: Tensor) -> None:
        super().write(view, torch.cat([value.unsqueeze(1), super().read(view)[:, 1:]], dim=1))


@dataclass(frozen=True)
class RotatedPlace:
    """Queries ("q") or keys ("k") as they meet, ``[batch, head, pos, d_head]``, where both do so in the forward itself.

    The keys of ``key_values`` heads may be there once for each of their queries' heads.
    """

    path: str
    letter: str
    key_values: int
    call: int = 0

    def read(self, view: Parts) -> Tensor:
        with view.at_call(self.call):
            value = view.operations[self.path].rotated[self.letter].output
        return value[0] if self.letter == "q" else value.transpose(-1, -2)[:, :: value.shape[1] // self.key_values]

    def write(self, view: Parts, value: Tensor) -> None:
        call = view.operations[self.path].rotated[self.letter]
        with view.at_call(self.call):
            now = call.output
            if self.letter == "q":
                call.output = type(now)((value, *now[1:]))
            else:
                times = now.shape[1] // self.key_values
                call.output = value.repeat_interleave(times, dim=1).transpose(-1, -2)


AnyPlace = Place | ArgumentPlace | SoftmaxPlace | ResultPlace | RotatedPlace
