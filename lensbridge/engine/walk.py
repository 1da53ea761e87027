"""How do the values of hook points reach code that asks for them one after the other?

A run shows values to hooks as it comes by; the body of a trace asks for them, in its own words and time. So each body
has a walk: a `Run` that stops inside the visit of a site, hands out the value, and goes on with what has become of it
when the body asks for the next thing. A visit is a greenlet within the body's, so that the sites' code serves hooks and
traces alike.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nnsight.intervention.interleaver import GreenletExit, OutOfOrderError, Pending, getcurrent, greenlet
from torch import Tensor

from ..errors import HookError, TraceError
from ..hook_points import HookPoint
from .norm_sites import FINAL_READERS, NormSite
from .passage import Event
from .plan import rank_of
from .sites import Run, Site

Rank = tuple[int, int]
START: Rank = (-1, 0)
END: Rank = (10**12, 0)


@dataclass
class Answer:
    """What a body has made of a value in the visit under way."""

    result: Tensor
    edited: bool
    #: Whether it goes back although nothing was edited, so that gradients come by.
    on_graph: bool


@dataclass
class TraceRun(Run):
    """A run with one more listener: the body of a trace, at the point that it has asked for."""

    #: The point that the body waits for.
    asked: str | None = None
    answers: dict[str, Answer] = field(default_factory=dict)
    #: Whether gradients at the points are wanted.
    gradients: bool = False
    #: The points at which something has changed.
    changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        # What the body does turns out later.
        self._any_edit = True

    def listens(self, name: str) -> bool:
        return name == self.asked or name in self.answers or super().listens(name)

    def edits(self, name: str) -> bool:
        # It turns out when the body has had the value.
        return True

    def forget_place(self) -> None:
        """Read the next place anew, though it be the last one: the body may have written there."""
        self._here = None

    def fire(self, name: str, value: Tensor, live: bool) -> tuple[Tensor, bool]:
        changed = False
        if name in self.listeners:
            value, changed = super().fire(name, value, live)
        answer = self.answers.get(name)
        if answer is not None:
            # The norm before attention fires for each of its readers: what was done at the first holds for all.
            if answer.edited or (answer.on_graph and torch.equal(value, answer.result)):
                value, changed = answer.result, True
        elif name == self.asked:
            answer = self.answers[name] = self._ask(name, value.clone() if live and not changed else value)
            value, changed = answer.result, changed or answer.edited or answer.on_graph
        if changed:
            self.changed.add(name)
        return value, changed

    def _ask(self, name: str, shown: Tensor) -> Answer:
        """Stop here and let the body have the value, until it asks for something else."""
        before = None if shown.is_inference() else shown._version
        result = getcurrent().parent.switch(shown)
        edited = result is not shown or before is None or result._version != before
        return Answer(result, edited, self.gradients and torch.is_grad_enabled() and result.requires_grad)


class Walk:
    """The way of one body through the model: serves `HookPoint.value`.

    Args:
        run: what the body's pass carries along.
        sites: all sites, in the order of the forward pass.
        order: the measured order of places.
        points: the model's hook points by name.
        check: raises for a point that cannot have a value.
    """

    def __init__(
        self,
        run: TraceRun,
        sites: Iterable[Site],
        order: Mapping[Event, int],
        points: Mapping[str, HookPoint],
        check: Any,
    ) -> None:
        self.run = run
        self.sites = list(sites)
        self.ranks = [rank_of(site, order) for site in self.sites]
        self.order = order
        self.points = points
        self.check = check
        self.index_of = {name: index for index, site in enumerate(self.sites) for name in site.names}
        #: The greenlet of the visit under way, and its site.
        self._visit: Any = None
        self._site = -1
        #: What the body holds in its hands, as it is now.
        self._shown: Tensor | None = None
        self._reached = START
        self._next = 0
        self._visited: set[int] = set()

    # --- what the body does -------------------------------------------------------------------------------------------

    def read(self, point: HookPoint) -> Tensor:
        """The value at a point: moves on to it first, unless the body is there already."""
        name = self._name(point)
        if self._visit is None or self.run.asked != name:
            self._go_to(name)
        assert self._shown is not None
        return self._shown

    def write(self, point: HookPoint, value: Tensor) -> None:
        """Put ``value`` in the place of the value at a point; it goes into the model when the body moves on.

        Raises:
            HookError: (a TypeError) for what is no tensor, or none of the activation's shape.
        """
        name = str(point.name)
        if not isinstance(value, Tensor):
            raise HookError(f"{name}.value was set to {type(value).__name__}; set it to a tensor")
        there = self.read(point)
        try:
            self._shown = value if value.shape == there.shape else value.expand(there.shape)
        except RuntimeError as error:
            raise HookError(
                f"{name}.value was set to a tensor of shape {list(value.shape)}, where the activation has "
                f"{list(there.shape)}"
            ) from error

    def move_on(self, location: str) -> None:
        """The body asks nnsight itself for something at ``location``: what lies before it is done first."""
        if self._is_visiting():
            return
        rank = self._rank_of(location)
        if rank is not None:
            self._pass_to(rank)
        elif self._visit is not None:
            self._finish_visit()
        # The body may change a value there.
        self.run.forget_place()

    def finish(self) -> None:
        """The body has ended: what it has changed takes effect, and hooks on later points run."""
        self._pass_to(END)

    def close(self) -> None:
        """The trace is over, maybe in the middle of a visit."""
        visit, self._visit, self._shown = self._visit, None, None
        if visit is not None and not visit.dead:
            visit.parent = getcurrent()
            visit.throw(GreenletExit)

    # --- moving -------------------------------------------------------------------------------------------------------

    def _name(self, point: HookPoint) -> str:
        name = str(point.name)
        if self.points.get(name) is not point:
            raise TraceError(f"{name!r} is a hook point of another model than the one that this trace runs")
        self.check(name)
        if name not in self.index_of:
            raise TraceError(
                f"{name!r} lies in a module that was put in a hook point's place, and has no value in a trace; "
                "run_with_cache and hooks reach it"
            )
        return name

    def _go_to(self, name: str) -> None:
        index = self.index_of[name]
        if self._visit is not None and self._site == index and name not in self.run.answers:
            # Further on in the same visit, unless it came by before the point where it stopped.
            self.run.asked = name
            self._resume(self._shown)
            if self._visit is not None:
                return
        self._pass_to(self.ranks[index], index)
        if self.ranks[index] < self._reached:
            raise TraceError(f"{name!r} was asked for too late: {self._too_late()}")
        try:
            self._start_visit(index, name)
        except OutOfOrderError:
            raise TraceError(
                f"{name!r} was asked for, but the forward pass had come past it, or never comes by: {self._too_late()}"
            ) from None
        if self._visit is None:
            raise TraceError(f"{name!r} has no value in this run: no token was sent to this expert")

    def _too_late(self) -> str:
        return (
            "values exist in the order of the forward pass, and what the body has asked for before comes later. "
            "Ask in the order of docs/hook-points.md, or keep an earlier value in a variable"
        )

    def _pass_to(self, rank: Rank, index: int | None = None) -> None:
        """End the visit under way, and make the visits that are necessary before ``rank`` (before site ``index``)."""
        self._finish_visit()
        for at in range(self._next, len(self.sites)):
            if self.ranks[at] > rank or at == index:
                break
            if at not in self._visited and self._needed(self.sites[at], ends=rank == END):
                self._start_visit(at, None)
                self._finish_visit()
        # Those at this very place may still be asked for.
        self._next = max(self._next, bisect_left(self.ranks, rank))
        self._reached = max(self._reached, rank)

    def _needed(self, site: Site, ends: bool) -> bool:
        run = self.run
        if any(name in run.listeners for name in site.names):
            return True
        if any(name in run.changed or run.edited.get(name) for name in site.after_edits_of):
            return site.needed_for_edit(run.basis)
        # Where gain and bias are folded, the norm's site computes what unembed.hook_in shows.
        asked_for = not ends or any(name in run.listeners for name in FINAL_READERS)
        return isinstance(site, NormSite) and site.final and run.basis.processing.fold_ln and asked_for

    def _rank_of(self, location: str) -> Rank | None:
        """Where nnsight's ``model.transformer.h.0.output`` comes; an operation counts as its module's input."""
        if location in ("result", "model.output"):
            return END
        path, _, inside = location.removeprefix("model.").partition(".source.")
        path, _, side = (path, "", "input") if inside else path.rpartition(".")
        rank = self.order.get((path, "output" if side == "output" else "input", 0))
        return None if rank is None else (rank, 0)

    # --- visits -------------------------------------------------------------------------------------------------------

    def _is_visiting(self) -> bool:
        return getcurrent() is self._visit

    def _start_visit(self, index: int, asked: str | None) -> None:
        run, site, body = self.run, self.sites[index], getcurrent()
        run.asked, run.answers = asked, {}
        self._visited.add(index)
        self._site, self._visit = index, greenlet(lambda: site.visit(run))
        # nnsight finds out by this who asks for a value.
        self._visit.mediator = body.mediator
        self._resume()

    def _finish_visit(self) -> None:
        if self._visit is not None:
            self.run.asked = None
            self._resume(self._shown)

    def _resume(self, *value: Any) -> None:
        """Let the visit go on until it shows a value or ends; what it asks of nnsight is asked by the body."""
        visit, self._shown = self._visit, None
        try:
            reply = visit.switch(*value)
            while isinstance(reply, Pending):
                reply = visit.switch(getcurrent().parent.switch(reply))
        except BaseException:
            self.close()
            raise
        if visit.dead:
            self._visit = None
        else:
            self._shown = reply
