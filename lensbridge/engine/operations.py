"""How is one operation inside a module's forward watched, without paying for all the others?

nnsight's ``.source`` brackets every call and assignment of a forward, and of a function that it calls, and drills into
that function anew in each run: about forty brackets an attention, of which one is wanted. Here the forward is
instrumented by nnsight's own means, but only the operation that was asked for is handed to it, under a location of its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nnsight.intervention.source import (
    STATE,
    SourceEnvoy,
    SourceNotAvailable,
    State,
    bind,
    instrument,
    run_op,
)

from ..architectures.record import Softmax
from ..errors import SourceNotFoundError


class Operation:
    """A softmax inside an attention's forward, or inside a function that it calls; found by name, without the numbers.

    Args:
        envoy: nnsight's handle on the module with the forward.
        softmax: what the call around the softmax is named, if there is one, and the softmax.
        required: whether not to find it is an error; otherwise the call around it is of use by itself.
    """

    def __init__(self, envoy: Any, softmax: Softmax, required: bool = True) -> None:
        self.required = required
        self.path = envoy.path
        self.call = call = softmax.call
        self.name = name = softmax.operation
        self._state: State = vars(envoy._module)[STATE]
        self._untouched = self._state.body, self._state.compiled
        #: function that was called -> its instrumented copy.
        self._inner: dict[Callable, Callable] = {}
        self._state.body, compiled = instrument(self._state.original, self._outer)
        #: What in the forward is labelled as the call (or the softmax); assignments can be among them.
        wanted = (
            self._wanted(compiled.names) if call is None else [n for n in compiled.names if _stem(n).endswith(call)]
        )
        self._labels = {f"source.{label}" for label in wanted}
        if call is None and not wanted:
            raise self._not_found("the forward", compiled.names)
        self._softmax, self._call = (f"{envoy.path}.source.{call}.{what}" for what in (name, "around"))
        #: The softmax's ``input`` and ``output`` and the call's ``inputs``, to be read and set in a run.
        self.softmax = SourceEnvoy(envoy, name, self._softmax, "", 0)
        self.around = SourceEnvoy(envoy, str(call), self._call, "", 0)
        #: What was called as the softmax last.
        self.called: Callable | None = None
        #: "q" -> the call that returns rotated queries and keys, "k" -> the one that transposes the keys.
        self.rotated: dict[str, SourceEnvoy] = {}
        self._others: dict[str, str] = {}
        for letter, stem in (("q", softmax.queries), ("k", softmax.keys)):
            if stem is not None:
                location = f"{envoy.path}.source.{stem}"
                self.rotated[letter] = SourceEnvoy(envoy, stem, location, "", 0)
                self._others |= dict.fromkeys(self._before(compiled.names, wanted, stem, letter), location)

    def close(self) -> None:
        """Let the forward be as it was before."""
        self._state.body, self._state.compiled = self._untouched

    def _outer(self, label: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the instrumented forward calls in place of each of its operations."""
        return self.watched(label, fn)(*args, **kwargs)

    def _before(self, names: tuple[str, ...], softmaxes: list[str], stem: str, letter: str) -> list[str]:
        """The labels of a call that precedes the softmax: of queries, in each branch; of keys, the last."""
        found = [name for name in names[: names.index(softmaxes[0])] if _stem(name).endswith(stem)]
        if not found:
            raise self._not_found("the forward", names, stem)
        return [f"source.{label}" for label in (found if letter == "q" else found[-1:])]

    def watched(self, label: str, fn: Callable) -> Callable:
        """What to call for ``fn`` at a label of the forward, so that what is watched there is handed over."""
        if label in self._others and fn is not bind:
            return partial(self._handed_over, self._others[label], fn)
        if label not in self._labels or fn is bind:
            return fn
        if self.call is None:
            return partial(self._handed_over, self._softmax, fn)
        return partial(self._handed_over, self._call, self._instrumented(fn))

    def _handed_over(self, location: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        if location is self._softmax:
            self.called = fn
        interleaver = self._state.active()[0]
        return fn(*args, **kwargs) if interleaver is None else run_op(interleaver, location, fn, args, kwargs)

    def _instrumented(self, fn: Callable) -> Callable:
        # A bound method is a new object each time it is looked up, but equal to the last one.
        if fn not in self._inner:
            self._inner[fn] = self._instrument(fn)
        return self._inner[fn]

    def _instrument(self, fn: Callable) -> Callable:
        wanted: set[str] = set()

        def inner(label: str, called: Callable, *args: Any, **kwargs: Any) -> Any:
            if label in wanted and called is not bind:
                return self._handed_over(self._softmax, called, *args, **kwargs)
            return called(*args, **kwargs)

        try:
            copy, compiled = instrument(fn, inner)
        except SourceNotAvailable:
            # A kernel without softmax (scaled dot product attention): what is inside is not to be had.
            return fn
        wanted |= {f"source.{label}" for label in self._wanted(compiled.names)}
        if not wanted and self.required:
            raise self._not_found(f"a call of {self.call!r} in the forward", compiled.names)
        return copy if wanted else fn

    def _wanted(self, names: tuple[str, ...]) -> list[str]:
        return [label for label in names if self.name in _stem(label)]

    def _not_found(self, where: str, names: tuple[str, ...], what: str | None = None) -> SourceNotFoundError:
        return SourceNotFoundError(
            f"no {(what or self.name)!r} inside {where} of {self.path!r} (its operations: {', '.join(names)}). What "
            "happens inside attention needs it; another version of transformers or another attention implementation "
            "may have moved it."
        )


def _stem(name: str) -> str:
    """An operation's name without the number that nnsight appends."""
    return name.rsplit("_", 1)[0]
