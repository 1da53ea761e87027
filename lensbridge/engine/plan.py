"""Which places does a run have to visit, and in which order?

A plan is the part of all sites that somebody listens to (and what an edit there makes necessary), in the measured
order. It depends only on who listens where and on what is run, so it is made once per such combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..architectures import Architecture
from ..basis import Basis
from ..hook_points import HookPoint
from .attention_sites import AttentionInputSite, PatternSite, QKVSite, ScoresSite, ZSite
from .places import Place, SoftmaxPlace
from .sites import (
    BranchSite,
    CopySite,
    NormSite,
    PlainSite,
    PositionSite,
    Site,
    StreamSite,
    UnembedInSite,
    UnembedOutSite,
)

#: The points that somebody listens to, by name.
Listeners = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Plan:
    """The sites to visit, in order; the modules they are at; whether eager attention is needed to reach them."""

    sites: tuple[Site, ...]
    paths: frozenset[str]
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


def sites_of(
    architecture: Architecture, cfg: Any, eps: Mapping[str, float]
) -> tuple[list[Site], list[list[Site]], list[Site]]:
    """(before the blocks, one list per block, after the blocks), each in TransformerLens' firing order.

    Args:
        eps: path of a norm -> its epsilon.
    """
    before: list[Site] = [
        BranchSite("hook_embed", Place(architecture.embed, "output")),
        PositionSite("hook_pos_embed", Place(architecture.pos_embed, "output")),
    ]
    blocks = [_block_sites(architecture, layer, eps) for layer in range(cfg.n_layers)]
    norm, head = architecture.ln_final, architecture.unembed
    after: list[Site] = [
        NormSite("ln_final", norm, eps[norm], final=True),
        UnembedInSite("unembed.hook_in", Place(head, "input"), norm, eps[norm]),
        UnembedOutSite("unembed.hook_out", Place(head, "output")),
    ]
    return before, blocks, after


def _block_sites(architecture: Architecture, layer: int, eps: Mapping[str, float]) -> list[Site]:
    block = f"blocks.{layer}"

    def path(role: str) -> str:
        return architecture.in_layer(layer, role)

    def softmax(side: Any) -> SoftmaxPlace:
        where = architecture.block.softmax
        return SoftmaxPlace(path("attn"), where.call, where.operation, side)

    entry = Place(architecture.layer(layer), "input")
    inputs = AttentionInputSite(layer, entry, path("ln1"), eps[path("ln1")])
    qkv = QKVSite(layer, path("qkv"), inputs)
    scores = ScoresSite(layer, softmax("input"))
    pattern = PatternSite(layer, softmax("output"), scores)
    z = ZSite(layer, path("o"), (*scores.names, *pattern.names))
    return [
        StreamSite(f"{block}.hook_resid_pre", entry),
        inputs,
        qkv,
        scores,
        pattern,
        z,
        BranchSite(f"{block}.hook_attn_out", Place(path("attn"), "output"), (z.result,)),
        StreamSite(f"{block}.hook_resid_mid", Place(path("ln2"), "input"), in_place=True),
        CopySite(f"{block}.hook_mlp_in", Place(path("ln2"), "input")),
        NormSite(f"{block}.ln2", path("ln2"), eps[path("ln2")]),
        PlainSite(f"{block}.mlp.hook_pre", Place(path("mlp_in"), "output")),
        PlainSite(f"{block}.mlp.hook_post", Place(path("mlp_out"), "input")),
        BranchSite(f"{block}.hook_mlp_out", Place(path("mlp"), "output")),
        StreamSite(f"{block}.hook_resid_post", Place(architecture.layer(layer), "output")),
    ]


def make_plan(
    sites: Iterable[Site],
    listened: Iterable[str],
    edits: Mapping[str, bool],
    basis: Basis,
    order: Mapping[tuple[str, str], int],
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
    chosen.sort(key=lambda site: _rank(site, order))
    paths = frozenset(path for site in chosen for path in (site.place.path, *site.writes_at)) | frozenset(ends)
    return Plan(tuple(chosen), paths, any(isinstance(site.place, SoftmaxPlace) for site in chosen))


def _needed(site: Site, listened: set[str], edits: Mapping[str, bool], basis: Basis) -> bool:
    if not listened.isdisjoint(site.names):
        return True
    if any(edits.get(name) for name in site.after_edits_of):
        return site.needed_for_edit(basis)
    # Where gain and bias are folded, the norm's site computes what unembed.hook_in shows.
    final = isinstance(site, NormSite) and site.final
    return final and basis.processing.fold_ln and "unembed.hook_in" in listened


def _rank(site: Site, order: Mapping[tuple[str, str], int]) -> tuple[int, int]:
    """Sites at one place keep the list's order, by Python's stable sort; an operation's input precedes its output."""
    place = site.place
    if isinstance(place, SoftmaxPlace):
        return order.get((place.path, "softmax"), 0), int(place.side == "output")
    return order[(place.path, place.side)], 0
