"""How does nnsight's ``with model.trace(...)`` run on the engine's model, with TransformerLens' points in its body?

nnsight runs each body of a trace as a greenlet beside the forward pass. Here such a body gets a `Walk` too, which
serves the points; nnsight's own paths go on working beside it. As in every run, nnsight's handles are on the HF model's
modules only until the trace is over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from nnsight import Envoy, NNsight
from nnsight.intervention.batching import Batcher
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.source import STATE, State, instrument, make_op
from nnsight.intervention.tracer import InterleavingTracer
from torch import nn

from ..basis import Stream
from ..errors import TraceError
from ..hook_points import SERVER, HookPoint
from ..whole import home_of
from .operations import Operation
from .places import View
from .plan import Listeners, Span, edits_of, rank_of
from .sites import Site
from .turns import turn, watched_by
from .walk import TraceRun, Walk

if TYPE_CHECKING:
    from .run import Engine

#: What a body says that wants gradients.
GRADIENT_WORDS = frozenset({"backward", "autograd", "retain_grad"})


class Host(Protocol):
    """What a trace has to know of the model that offers it."""

    @property
    def engine(self) -> Engine: ...

    def points(self) -> Mapping[str, HookPoint]:
        """The hook points by name."""

    def listeners(self) -> Listeners:
        """The points that have hooks."""

    def check(self, name: str) -> None:
        """Raise for a point that is off."""

    def rows(self, *input: Any, **options: Any) -> int:
        """How many rows an input has; 0 for none."""

    def assemble(self, invokes: list[tuple[tuple, dict[str, Any]]], options: dict[str, Any]) -> dict[str, Any]:
        """Arguments for the HF model, from the inputs of all invokes with their options, and the trace's options."""


class _Body(Mediator):
    """nnsight's runner of one body, with a walk."""

    walk: Walk

    def _run(self) -> None:
        # A greenlet has a context of its own.
        SERVER.set(self.walk)
        super()._run()
        self.walk.finish()

    def wanted(self, location: str) -> int:
        """Called first thing whenever the body asks for something."""
        self.walk.move_on(location)
        return super().wanted(location)


class _Rows(Batcher):
    """Puts the inputs of all invokes together, by the model's own rules."""

    def assemble(self, fn: Any) -> tuple[tuple, dict[str, Any]]:
        return (), self.envoy.host.assemble(self.invokes, self.extra_kwargs)


class _Tracer(InterleavingTracer):
    """nnsight's tracer, which waits for its turn: the bodies that it collects are kept where all traces' are."""

    gradients: bool | None = None

    def execute(self, code: CodeType) -> None:
        root = self.envoy.root
        with turn(root.host.engine.hf_model):
            root.gradients = self.gradients
            super().execute(code)


class PartEnvoy(Envoy):
    """nnsight's handle on a module of the HF model, for use in traces of the whole model or of this module."""

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return home_of(self.root.host.engine.hf_model)

    def trace(self, *args: Any, gradients: bool | None = None, **kwargs: Any) -> Any:
        tracer = super().trace(*args, **{"tracer_cls": _Tracer} | kwargs)
        tracer.gradients = gradients
        return tracer

    def interleave(self, fn: Any, *args: Any, batcher: Batcher | None = None, **kwargs: Any) -> Any:
        with self.root.opened(batcher, whole=self.root is self):
            return super().interleave(fn, *args, batcher=batcher, **kwargs)

    @property
    def source(self) -> Any:
        """The operations inside the module's forward, as nnsight shows them."""
        with self.root.looking_into(self):
            return super().source


class RootEnvoy(PartEnvoy, NNsight):
    """nnsight's handle on the whole HF model; what `HookedTransformer.envoy` is."""

    _batcher_class = _Rows

    def __init__(self, hf_model: nn.Module, host: Host, **options: Any) -> None:
        self.host = host
        #: Whether values have to lie on the graph; None if each body is to be looked at.
        self.gradients: bool | None = None
        #: Weak, because the view holds this.
        self.view_of: Callable[[], View | None] = lambda: None
        super().__init__(hf_model, envoys=PartEnvoy, **options)

    def view(self) -> View:
        """The engine's view that this is the nnsight side of."""
        view = self.view_of()
        if view is None:
            raise TraceError("modules of the HF model were replaced since this envoy was taken: use model.envoy anew")
        return view

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return self.host.rows(*inputs, **kwargs)

    @contextmanager
    def opened(self, batcher: Batcher | None, whole: bool) -> Iterator[None]:
        """The time of a trace: handles on all modules, eager attention, a walk for each body."""
        engine, view, hf_model = self.host.engine, self.view(), self.host.engine.hf_model
        with turn(hf_model):
            order = engine.order
            with watched_by(hf_model, self.interleaver), view.installed(view.paths), engine.eager_attention(whole):
                bodies = [*self._edits, *self.interleaver.mediators]
                served = _sites_in_order(engine), order, self.host.points(), self.host.check
                gradients = self.gradients
                if gradients is None:
                    gradients = any(_speaks_of(body.code, GRADIENT_WORDS) for body in bodies)
                for body in bodies:
                    # A body that sees the whole batch beside others does not run the hooks on it a second time.
                    hooked = body.batch_group is not None or bodies == [body]
                    body.__class__, body.walk = (
                        _Body,
                        Walk(self._run_for(body, view, batcher, hooked, gradients), *served),
                    )
                engine._running.append(view)
                try:
                    yield
                finally:
                    engine._running.remove(view)
                    for body in bodies:
                        body.walk.close()
                        del body.walk

    def _run_for(self, body: Any, view: View, batcher: Batcher | None, hooked: bool, gradients: bool) -> TraceRun:
        engine, group = self.host.engine, body.batch_group
        total = 0 if batcher is None else batcher.total
        listeners: Listeners = self.host.listeners() if hooked else {}
        return TraceRun(
            view,
            engine.basis,
            engine.cfg,
            listeners,
            Stream(engine.basis.centres_stream),
            total if group is None else group[1],
            edits_of(listeners),
            None,
            engine.passage.overwritten,
            gradients=gradients,
        )

    @contextmanager
    def looking_into(self, envoy: Envoy) -> Iterator[None]:
        """Let nnsight see inside a module's forward, and leave no handle there; what is watched already stays so."""
        view = self.view()
        path = envoy.path.removeprefix("model.")
        with view.installed([path]):
            operation, state = view.operations.get(path), envoy._module.__dict__[STATE]
            before = state.body
            yield
            if operation is not None and state.body is not before:
                state.body, state.compiled = instrument(state.original, _both(operation, state))


def running_envoy(engine: Engine) -> RootEnvoy | None:
    """nnsight's handle on the model in the innermost trace that runs, if there is one."""
    envoys = (view.nnsight for view in reversed(engine._running))
    return next((envoy for envoy in envoys if isinstance(envoy, RootEnvoy)), None)


def root_envoy(engine: Engine, host: Host) -> RootEnvoy:
    """nnsight's handle on the model for the next trace: a new one if it runs inside the body of another."""
    with turn(engine.hf_model):
        key = (len(engine._running), "trace")
        view = engine._views.get(key)
        if view is None or not (engine._running or view.is_of(engine.hf_model)):
            first = engine.architecture.positions_first
            wrap = lambda hf_model, **options: RootEnvoy(hf_model, host, **options)  # noqa: E731
            view = View(engine.hf_model, engine._softmaxes(), wrap, positions_first=first, parts=engine.parts)
            view.nnsight.view_of = weakref.ref(view)
            engine._views[key] = view
        return view.nnsight


def _sites_in_order(engine: Engine) -> list[Site]:
    """Every site, as the forward pass comes by."""
    order = engine.order
    whole = Span(0, engine.cfg.n_layers, embeds=True, norm=True, unembeds=True)
    return sorted(engine._sites_in(whole), key=lambda site: rank_of(site, order))


def _both(operation: Operation, state: State) -> Callable[..., Any]:
    """What a forward calls at each operation when nnsight shows them all and one inside of them is watched."""
    show = make_op(lambda: state.active()[:2])

    def op(label: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return show(label, operation.watched(label, fn), *args, **kwargs)

    return op


def _speaks_of(code: CodeType, words: frozenset[str]) -> bool:
    """Whether a body, or a function that is defined in it, uses one of these names."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return not words.isdisjoint(code.co_names) or any(_speaks_of(one, words) for one in inner)
