"""How does code run in step with the HuggingFace model's forward pass?

nnsight has two ways of taking part in a pass: a worker, a greenlet that asks for one value after the other and may
change it, and a cache, which is told of each value as it passes. Hooks are run by a worker; a run that only fills a
cache is watched, which needs no switching between the two. Either way the pass is driven here and not by
``with model.trace(...)``: that captures its own source and collects inputs anew on every run, which costs more than the
rest of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from nnsight.intervention.interleaver import EarlyStopException, Mediator, OutOfOrderError

from .places import AnyPlace, ArgumentPlace, Place, ResultPlace, RotatedPlace, View
from .sites import Run, Site


class _Worker(Mediator):
    """nnsight's runner of one function, which may ask for values as the body of a trace does."""

    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(None, {}, {})
        self.body = body

    def _run(self) -> None:
        self.body()
        self.flush()


def in_step(view: View, body: Callable[[], Any], inputs: Mapping[str, Any], stops: bool = False) -> Any:
    """Run the HF model on these arguments with ``body`` beside it; returns what that returns.

    Args:
        stops: whether the pass ends when the body does.
    """
    result: list[Any] = []

    def run() -> None:
        result.append(body())
        if stops:
            raise EarlyStopException

    _drive(view, _Worker(run), inputs)
    return result[0]


def _drive(view: View, mediator: Mediator, inputs: Mapping[str, Any]) -> Any:
    """Run the model with one worker; returns what it returns, or None if it was stopped."""
    interleaver, output = view.nnsight.interleaver, None
    interleaver.mediators, interleaver.batcher = [mediator], None
    try:
        with interleaver:
            output = view.nnsight._module(**inputs)
        interleaver.check_dangling_mediators()
    except EarlyStopException:
        # Before the model has begun.
        pass
    finally:
        interleaver.cancel()
    return output


#: A location, in nnsight's words, and the number of the visit there.
Visit = tuple[str, int]


@dataclass
class Route:
    """What is recorded where, in nnsight's terms.

    Args:
        steps: location -> number of the visit -> what records there.
        visits: those at which something is recorded, in the measured order.
        forgets: visit -> those whose values are not read any more behind it.
        lasting: locations whose values are read again later in the pass.
        end: the place whose value is wanted, and the visit there.
    """

    steps: dict[str, dict[int, list[Site]]] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    forgets: dict[Visit, list[Visit]] = field(default_factory=dict)
    lasting: set[str] = field(default_factory=set)
    end: tuple[AnyPlace, Visit] | None = None

    @classmethod
    def of(
        cls, view: View, sites: Iterable[Site], also: Mapping[Site, tuple[AnyPlace, ...]], end: AnyPlace | None
    ) -> Route:
        """The route past these sites, which are in the order of the pass; ``also`` says what else they read."""
        route = cls()
        for site in sites:
            visit = _location(view, site.place), site.place.call
            route.steps.setdefault(visit[0], {}).setdefault(visit[1], []).append(site)
            if visit not in route.visits[-1:]:
                route.visits.append(visit)
            for place in (*site.also_reads, *also.get(site, ())):
                location = _location(view, place)
                route.steps.setdefault(location, {})
                route.lasting.add(location)
                route.forgets.setdefault(visit, []).append((location, place.call))
        if end is not None:
            route.end = end, (_location(view, end), end.call)
            route.steps.setdefault(route.end[1][0], {})
        return route


def _location(view: View, place: AnyPlace) -> str:
    """Where nnsight sees what is at a place."""
    if isinstance(place, Place):
        return f"{view[place.path].path}.{place.side}"
    operation = view.operations[place.path]
    if isinstance(place, RotatedPlace):
        return f"{operation.rotated[place.letter].path}.output"
    if isinstance(place, ArgumentPlace):
        return f"{operation.around.path}.input"
    if isinstance(place, ResultPlace):
        return f"{operation.around.path}.output"
    return f"{operation.softmax.path}.{place.side}"


def watched(view: View, run: Run, route: Route, inputs: Mapping[str, Any], stops: bool = False) -> tuple[Any, Any]:
    """Run the HF model on these arguments and let each site of the route record when its place is reached.

    Args:
        stops: whether the pass ends where the route does.

    Returns:
        What the model returns (None where it did not get there), and the value at the route's end.
    """
    watch = _Watch(route, run, Passing(view), stops)
    run.view = watch.passing
    output = _drive(view, watch, inputs)
    if watch.passed < len(route.visits):
        raise OutOfOrderError(f"{route.visits[watch.passed][0]} was not reached")
    return output, watch.at_end


class _Watch(Mediator):
    """A worker of nnsight's that does nothing but have a cache, which it is itself."""

    def __init__(self, route: Route, run: Run, passing: Passing, stops: bool) -> None:
        super().__init__(None, {}, {})
        self.route = route
        self.run = run
        self.passing = passing
        self.stops = stops
        self.at_end: Any = None
        #: How many of the route's visits there were.
        self.passed = 0
        self._calls: dict[str, int] = {}

    def start(self, interleaver: Any = None) -> None:
        """There is nothing to run: only the cache takes part."""
        self.interleaver = interleaver
        self.caches = [self]

    def subscriptions(self) -> dict[str, str]:
        """What nnsight asks a cache: which locations it wants to know of, and what it is to be told with each."""
        return {location: location for location in self.route.steps}

    def observe_selected(self, location: str, value: Any) -> None:
        """What nnsight tells a cache: the value at a location, each time that the pass comes by."""
        number = self._calls.get(location, 0)
        self._calls[location] = number + 1
        values, route = self.passing.values, self.route
        values[location, number] = value
        sites = route.steps[location].get(number)
        if sites is not None:
            self._record(sites, (location, number), value)
        if route.end is not None and route.end[1] == (location, number):
            if self.run.logits is None:
                self.at_end = route.end[0].read(self.passing)  # type: ignore[arg-type]
            if self.stops:
                raise EarlyStopException
        if location not in route.lasting:
            del values[location, number]

    def _record(self, sites: list[Site], visit: Visit, value: Any) -> None:
        run, route, place = self.run, self.route, sites[0].place
        if route.visits[self.passed] != visit:
            raise OutOfOrderError(f"{visit[0]} was reached before {route.visits[self.passed][0]}")
        self.passed += 1
        if type(place) is Place and self.passing.in_order:
            # What `Place.read` would find, without asking around.
            if place.side == "input":
                value = value[0][0] if value[0] else next(iter(value[1].values()))
            run.arrive(place, value[0] if isinstance(value, tuple | list) else value)
        for site in sites:
            site.record(run)
        if not isinstance(place, Place):
            # Squares are large.
            run.let_go()
        for earlier in route.forgets.get(visit, ()):
            self.passing.values.pop(earlier, None)


class Passing:
    """What places see of a pass that is watched: the values that are just there, in a view's stead."""

    def __init__(self, view: View) -> None:
        self._view = view
        #: Whether the batch comes first everywhere.
        self.in_order = view.batch_first
        self._parts: dict[str, _Part] = {}
        #: (location, number of the call) -> what nnsight has there.
        self.values: dict[tuple[str, int], Any] = {}
        self.call = 0
        self.operations = _Operations(self)
        self.has_positions_first, self.module, self.apart = view.has_positions_first, view.module, view.apart

    def __getitem__(self, path: str) -> _Part:
        part = self._parts.get(path)
        if part is None:
            part = self._parts[path] = _Part(self, self._view[path].path)
        return part

    def at_call(self, number: int) -> AbstractContextManager[None]:
        """The time in which what is asked for is that of a later call of a module."""
        return nullcontext() if number == 0 else _AtCall(self, number)


class _AtCall:
    def __init__(self, passing: Passing, number: int) -> None:
        self.passing = passing
        self.number = number

    def __enter__(self) -> None:
        self.passing.call = self.number

    def __exit__(self, *_: object) -> None:
        self.passing.call = 0


class _Part:
    """The values at one module or operation, by nnsight's names."""

    def __init__(self, passing: Passing, path: str) -> None:
        self._passing = passing
        self._input, self._output = f"{path}.input", f"{path}.output"

    @property
    def output(self) -> Any:
        """What it returns."""
        return self._passing.values[self._output, self._passing.call]

    @property
    def inputs(self) -> tuple[tuple, dict[str, Any]]:
        """Its arguments."""
        return self._passing.values[self._input, self._passing.call]

    @property
    def input(self) -> Any:
        """Its first argument."""
        args, kwargs = self.inputs
        return args[0] if args else next(iter(kwargs.values()))


class _Operations:
    """The operations that are watched inside attentions, by the attention's path."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing

    def __getitem__(self, path: str) -> _Operation:
        return _Operation(self._passing, self._passing._view.operations[path])


class _Operation:
    def __init__(self, passing: Passing, operation: Any) -> None:
        self._passing = passing
        self._operation = operation

    @property
    def called(self) -> Callable | None:
        """What was called as the softmax."""
        return self._operation.called

    @property
    def softmax(self) -> _Part:
        """The softmax."""
        return _Part(self._passing, self._operation.softmax.path)

    @property
    def around(self) -> _Part:
        """The call around it."""
        return _Part(self._passing, self._operation.around.path)

    @property
    def rotated(self) -> dict[str, _Part]:
        """The calls that return rotated queries and keys."""
        return {letter: _Part(self._passing, there.path) for letter, there in self._operation.rotated.items()}
