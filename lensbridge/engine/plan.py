"""Which places does a run have to visit, and in which order?

A plan is the part of all sites that somebody listens to (and what an edit there makes necessary), in the measured
order. It depends only on who listens where and on what is run, so it is made once per such combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..basis import Basis
from ..hook_points import HookPoint
from .norm_sites import NormSite
from .passage import Event
from .places import ArgumentPlace, ResultPlace, RotatedPlace, SoftmaxPlace
from .sites import Site

#: The points that somebody listens to, by name.
Listeners = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Plan:
    """The sites to visit, in order; the modules they are at; whether it sees inside an attention, and its softmax."""

    sites: tuple[Site, ...]
    paths: frozenset[str]
    looks_inside: bool
    needs_eager: bool


@dataclass(frozen=True)
class Span:
    """The part of the model that a run covers: blocks ``[start, stop)``, and how far after them."""

    start: int
    stop: int
    embeds: bool
    norm: bool
    unembeds: bool


def edits_of(listeners: Listeners) -> dict[str, bool]:
    """Point name -> whether its listeners may change the value or its gradient (all but caches may)."""
    return {name: not (isinstance(point, HookPoint) and point.only_reads) for name, point in listeners.items()}


def make_plan(
    sites: Iterable[Site],
    listened: Iterable[str],
    edits: Mapping[str, bool],
    basis: Basis,
    order: Mapping[Event, int],
    ends: Iterable[str],
) -> Plan:
    """The sites to visit.

    Args:
        sites: those that the run passes.
        listened: names of the points with listeners.
        edits: point name -> whether its value may be changed.
        order: the measured order of places.
        ends: modules that a run needs besides the sites'.
    """
    wanted = set(listened)
    chosen = [site for site in sites if _needed(site, wanted, edits, basis)]
    chosen.sort(key=lambda site: rank_of(site, order))
    paths = frozenset(path for site in chosen for path in (site.place.path, *site.writes_at)) | frozenset(ends)
    eager = any(isinstance(site.place, SoftmaxPlace | RotatedPlace) for site in chosen)
    return Plan(
        tuple(chosen),
        paths,
        eager or any(isinstance(site.place, ArgumentPlace | ResultPlace) for site in chosen),
        eager,
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
