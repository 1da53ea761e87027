"""Which places does a run have to visit, and in which order?

A plan is the part of all sites that somebody listens to (and what an edit there makes necessary), in the measured
order. It depends only on who listens where and on what is run, so it is made once per such combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..architectures import Architecture
from ..basis import Basis
from ..hook_points import HookPoint
from .norm_sites import NormSite
from .passage import Event
from .places import AnyPlace, ArgumentPlace, FirstPlace, Place, ResultPlace, RotatedPlace, SoftmaxPlace
from .sites import Site

#: The points that somebody listens to, by name.
Listeners = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Span:
    """The part of the model that a run covers: blocks ``[start, stop)``, and how far after them."""

    start: int
    stop: int
    embeds: bool
    norm: bool
    unembeds: bool


@dataclass(frozen=True)
class Ends:
    """Where a run starts, and where what it is for is to be read.

    Args:
        skipped: the layers that a run from a residual stream does not run.
        start: where the first block that runs reads the residual stream.
        overwrites: whether the residual has to go into the tensor there, which others read, too.
        stop: where the residual stream is behind the last block that runs.
        norm: what is read last in a run that ends with the final norm.
        logits: where the logits are; None if they are the model's own output.
        held: whether somebody else may hold the logits' tensor.
    """

    skipped: tuple[str, ...]
    start: Place
    overwrites: bool
    stop: Place
    norm: Place
    logits: Place | None
    held: bool

    @classmethod
    def of(cls, span: Span, architecture: Architecture, skipped: tuple[str, ...]) -> Ends:
        """The ends of a run over ``span``."""
        n_layers, blocks = len(architecture.blocks), architecture.blocks
        behind, several = entrance(architecture, n_layers), architecture.several_unembedded
        logits = (
            None if architecture.after_unembed else (FirstPlace if several else Place)(architecture.unembed, "output")
        )
        return cls(
            skipped,
            entrance(architecture, span.start),
            span.start < n_layers and blocks[span.start].shares_entrance,
            entrance(architecture, span.stop),
            behind if architecture.ln_final is None else replace(behind, side="output"),
            None if architecture.after_unembed else logits,
            several,
        )


def entrance(architecture: Architecture, layer: int) -> Place:
    """Where the residual stream before a layer is, or behind the last one."""
    path, side = architecture.entrance(layer)
    return Place(
        path, side, call=architecture.final_call if path == architecture.ln_final else architecture.call(layer)
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """The sites to visit, in order; the modules they are at; whether it sees inside an attention, and its softmax."""

    sites: tuple[Site, ...]
    paths: frozenset[str]
    looks_inside: bool
    needs_eager: bool
    #: None for a plan of one module.
    ends: Ends | None = None
    #: In a run that only fills a cache: what sites read besides, to see what they keep follows from.
    also: Mapping[Site, tuple[AnyPlace, ...]] = field(default_factory=dict)
    #: The points from which they do.
    awaited: frozenset[str] = frozenset()
    #: The way past the sites in nnsight's terms, for each view that has taken it (`stepping.Route`).
    routes: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary)


def edits_of(listeners: Listeners) -> dict[str, bool]:
    """Point name -> whether its listeners may change the value or its gradient (all but caches may)."""
    return {name: not (isinstance(point, HookPoint) and point.only_reads) for name, point in listeners.items()}


def make_plan(
    sites: Iterable[Site],
    listened: Iterable[str],
    edits: Mapping[str, bool],
    basis: Basis,
    order: Mapping[Event, int],
    flow: Mapping[Event, int],
    visited: Iterable[str],
    ends: Ends | None = None,
) -> Plan:
    """The sites to visit.

    Args:
        sites: those that the run passes.
        listened: names of the points with listeners.
        edits: point name -> whether its value may be changed.
        order: the measured order of places.
        flow: which places have the same tensor (`Passage.flow`).
        visited: modules that a run needs besides the sites'.
        ends: where the run starts and ends.
    """
    wanted = set(listened)
    chosen = [site for site in sites if _needed(site, wanted, edits, basis)]
    chosen.sort(key=lambda site: rank_of(site, order))
    also = {} if edits else {site: places for site in chosen if (places := site.derives_from(wanted, flow))}
    besides = (place.path for places in also.values() for place in places)
    paths = frozenset(path for site in chosen for path in (site.place.path, *site.writes_at)).union(visited, besides)
    eager = any(isinstance(site.place, SoftmaxPlace | RotatedPlace) for site in chosen)
    return Plan(
        tuple(chosen),
        paths,
        eager or any(isinstance(site.place, ArgumentPlace | ResultPlace) for site in chosen),
        eager,
        ends,
        also,
        frozenset(name for site in also for name in site.follows),
    )


def _needed(site: Site, listened: set[str], edits: Mapping[str, bool], basis: Basis) -> bool:
    if not listened.isdisjoint(site.names) or (site.always and basis.centres_stream):
        return True
    if any(edits.get(name) for name in site.after_edits_of):
        return site.needed_for_edit(basis)
    # Where gain and bias are folded, the norm's site computes what unembed.hook_in shows.
    final = isinstance(site, NormSite) and site.final
    return final and basis.processing.fold_ln and "unembed.hook_in" in listened


def rank_of(site: Site, order: Mapping[Event, int]) -> tuple[int, int]:
    """Sites at one place keep the list's order, by Python's stable sort; an operation's input precedes its output."""
    place = site.place
    if isinstance(place, ArgumentPlace | RotatedPlace):
        return order.get((place.path, "softmax", place.call), 0), -1
    if isinstance(place, ResultPlace):
        return order.get((place.path, "softmax", place.call), 0), 2
    if isinstance(place, SoftmaxPlace):
        return order.get((place.path, "softmax", place.call), 0), int(place.side == "output")
    return order[place.event], 0
