"""What does a job do on the machine that has the model?

The classes and functions here travel, and so does what they use of this package. They read a plan that was made where
the job was written, run it on the model that the server has, and leave that model as they found it. What comes back are
tensors and plain containers: the server can send nothing else.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...basis import Basis, Stream
from ...hook_points import watching_gradient
from ...weights import processed
from ..forward import Request, trace_once
from ..operations import Operation
from ..places import Parts, Place
from ..plan import Plan
from ..sites import Run, Site


class JobPoint:
    """Stands for a hook point in a job: its name, its ``ctx``, and the hooks that the run has there."""

    def __init__(self, name: str, ctx: dict, forward: Sequence[Callable]) -> None:
        self.name = name
        self.ctx = ctx
        self.forward = forward

    def layer(self) -> int:
        """The layer in the point's name."""
        return int(self.name.split(".")[1])

    def __call__(self, x: Tensor) -> Any:
        return self.run_forward_hooks(x)

    def run_forward_hooks(self, x: Tensor) -> Any:
        """Show ``x`` to the hooks in order; returns what they make of it."""
        for hook in self.forward:
            result = hook(x, hook=self)
            x = x if result is None else result
        return x


class JobPointBack(JobPoint):
    """A point that has hooks on the gradient, too."""

    def __init__(self, name: str, ctx: dict, forward: Sequence[Callable], backward: Sequence[Callable]) -> None:
        super().__init__(name, ctx, forward)
        self.backward = backward

    def __call__(self, x: Tensor) -> Any:
        if torch.is_grad_enabled():
            return watching_gradient(self, x, self.backward, True)
        return self.run_forward_hooks(x)


class Kept:
    """What a run keeps: a recording, and a hook that puts a gradient away.

    Args:
        names: the points whose values are wanted.
        cut: what is kept of a value, ``cut(name, value)``.
        ending: of the names in the cache.
    """

    def __init__(self, names: Any, cut: Callable[[str, Tensor], Tensor], ending: str = "") -> None:
        self.names = names
        self.cut = cut
        self.ending = ending
        self.values: dict[str, Tensor] = {}

    def __call__(self, tensor: Tensor, *, hook: Any) -> None:
        self.keep(hook.name, tensor)

    def keep(self, name: str, value: Tensor) -> None:
        """Put away the value of a point."""
        self.values[name + self.ending] = self.cut(name, value.detach())


class Setting:
    """What the runs of a job have in common: how to read the model."""

    def __init__(
        self,
        basis: Basis,
        cfg: Any,
        softmaxes: dict,
        watch: Callable[[Any, dict], dict] | None,
        overwritten: Any,
        positions_first: str | None,
    ) -> None:
        self.basis = basis
        self.cfg = cfg
        self.softmaxes = softmaxes
        #: Looks inside of attentions; what nothing needs does not travel.
        self.watch = watch
        self.overwritten = overwritten
        self.positions_first = positions_first


class Weights:
    """What reading and writing values asks of the weights."""

    def __init__(self, hf_model: Any, architecture: Any, parameters: Any, processing: Any) -> None:
        self.hf_model = hf_model
        self.architecture = architecture
        self.parameters = parameters
        self.processing = processing

    def module(self, path: str) -> Any:
        """A module of the HF model."""
        return self.parameters.module(path)


class WholeWeights(Weights):
    """The same where what attention writes, or how its heads are mapped, is asked for."""

    def __init__(self, hf_model: Any, architecture: Any, parameters: Any, processing: Any) -> None:
        super().__init__(hf_model, architecture, parameters, processing)
        self._processed: dict[tuple, dict[str, Tensor]] = {}

    def raw_branch(self, branch: str, layer: int) -> dict[str, Tensor]:
        """The weights of a branch, as views of the model's own."""
        return self.parameters.branch(branch, layer).weights

    def branch(self, branch: str, layer: int) -> dict[str, Tensor]:
        """The same in the active basis."""
        key = (branch, layer, torch.is_grad_enabled())
        if key not in self._processed:
            self._processed[key] = processed(branch, self.raw_branch(branch, layer), self.processing)
        return self._processed[key]

    def attention_output(self, layer: int) -> dict[str, Tensor]:
        """``W_O`` and ``b_O`` of one layer."""
        weights = (self.branch if self.processing.any else self.raw_branch)("attn", layer)
        return {name: weights[name] for name in ("W_O", "b_O")}


def watch(machine: Any, softmaxes: dict) -> dict:
    """Look inside of attentions."""
    return {path: Operation(machine[path], softmax) for path, softmax in softmaxes.items()}


def watch_calls(machine: Any, softmaxes: dict) -> dict:
    """Look inside of attentions at what they are called with; there may be no softmax."""
    return {path: Operation(machine[path], softmax, False) for path, softmax in softmaxes.items()}


class Machine(Parts):
    """The model where a job runs, and the runs on it.

    Args:
        model: nnsight's model.
    """

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(model._module, model, setting.positions_first)
        self.setting = setting
        #: The tensors that gradients go back to.
        self.sources: list[Tensor] = []
        if setting.watch is not None:
            self.operations |= setting.watch(self, setting.softmaxes)

    def close(self) -> None:
        """Leave the model as it was."""
        for operation in self.operations.values():
            operation.close()

    def trace(self, **inputs: Any) -> Any:
        """A trace on just these inputs: the server's model would make others of them."""
        return self.nnsight.trace(torch.zeros(1), fn=self._on_these_alone, **inputs)

    def _on_these_alone(self, nothing: Tensor, **inputs: Any) -> Any:
        return self.hf_model(**inputs)

    def run(
        self,
        request: Request,
        plan: Plan,
        edits: dict[str, bool],
        points: dict[str, Any],
        kept: Any = None,
        gradients: bool = False,
    ) -> Tensor | None:
        """One forward pass, as `Engine.run`."""
        device, setting = next(self.hf_model.parameters()).device, self.setting
        if request.residual is not None:
            request.residual = request.residual.to(device).requires_grad_(gradients)
        stream = Stream(setting.basis.centres_stream)
        run = Run(self, setting.basis, setting.cfg, points, stream, request.batch_size, edits, kept)
        run.overwritten, run.puts_off, run.visits = setting.overwritten, False, True
        self.sources = run.roots = [] if request.residual is None else [request.residual]
        with torch.set_grad_enabled(gradients), run.explaining():
            return trace_once(self, run, plan, request)


class SourceSite(Site):
    """Where gradients end: what a module returns, and not the server's parameters."""

    names = ()
    reads_weights = False

    def __init__(self, place: Place) -> None:
        self.place = place

    def visit(self, run: Run) -> None:
        source = self.place.read(run.view).detach().requires_grad_()
        run.roots.append(source)
        # A leaf is not to be edited in place.
        run.write(self.place, source.view_as(source))


class Step:
    """One forward pass of a job."""

    def __init__(
        self, request: Request, plan: Plan, edits: dict[str, bool], points: dict[str, Any], kept: Kept | None
    ) -> None:
        self.request = request
        self.plan = plan
        self.edits = edits
        self.points = points
        self.kept = kept

    def on(self, machine: Machine, gradients: bool = False) -> Tensor | None:
        """Run it."""
        return machine.run(self.request, self.plan, self.edits, self.points, self.kept, gradients)


def execute(model: Any, setting: Setting, program: Callable[[Machine], Any], states: list[Any]) -> tuple[Any, Any]:
    """Run a job's program; (what it returns, what has become of the user's own objects)."""
    before = [_snapshot(state) for state in states]
    machine = Machine(model, setting)
    try:
        result = program(machine)
    finally:
        machine.close()
    return plain(result), _changes(states, before)


def plain(value: Any) -> Any:
    """Tensors off the graph, and without what a slice would keep of the rest; containers of them."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple([plain(each) for each in value])
    return value


def _snapshot(state: Any) -> Any:
    """What an object holds: the very values, as another one could come to have the identity of one that is gone."""
    if isinstance(state, Tensor):
        return state._version
    if isinstance(state, dict):
        return [each for item in state.items() for each in item]
    if isinstance(state, list | set | collections.deque):
        return list(state)
    return state.copy()


def _changes(states: list[Any], before: list[Any]) -> dict[int, Any]:
    """number of an object -> what it holds now, of those that have changed; objects in it that are known by number."""
    known = {id(state): number for number, state in enumerate(states)}

    def entry(value: Any) -> tuple[str, Any]:
        return ("known", known[id(value)]) if id(value) in known else ("new", plain(value))

    found: dict[int, Any] = {}
    for number, (state, was) in enumerate(zip(states, before, strict=True)):
        now = _snapshot(state)
        if not isinstance(state, Tensor | list | dict | set | collections.deque):
            if (now != was).any():
                found[number] = now
        elif isinstance(state, Tensor):
            if now != was:
                found[number] = plain(state)
        elif len(now) == len(was) and all(a is b for a, b in zip(now, was, strict=True)):
            continue
        elif isinstance(state, dict):
            found[number] = [(key, entry(value)) for key, value in state.items()]
        else:
            found[number] = [entry(value) for value in state]
    return found
