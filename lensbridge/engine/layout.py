"""Which sites does a model have, and where?

The record of its architecture says where each role lives; here each role becomes the sites that TransformerLens' points
are served at, in TransformerLens' firing order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architectures import Architecture
from .attention_sites import AttentionInputSite, PatternSite, QKVSite, RotarySite, ScoresSite, ZSite
from .norm_sites import CopySite, HeadNormSite, Norm, NormSite, ReaderSite, UnembedInSite
from .places import ArgumentPlace, Place, Side, SoftmaxPlace
from .sites import (
    BranchSite,
    GateUpSite,
    PlainSite,
    PositionSite,
    Site,
    StreamSite,
    UncentredEmbedSite,
    UnembedOutSite,
)


def sites_of(
    architecture: Architecture, cfg: Any, norms: Mapping[str, Norm]
) -> tuple[list[Site], list[list[Site]], list[Site]]:
    """(before the blocks, one list per block, after the blocks), each in TransformerLens' firing order.

    Args:
        norms: the model's norms, by path.
    """
    before: list[Site] = []
    if architecture.embed_norm is not None:
        before.append(NormSite("embed.ln", norms[architecture.embed_norm]))
        before.append(UncentredEmbedSite("hook_embed", Place(architecture.embed_norm, "output")))
    else:
        before.append(BranchSite("hook_embed", Place(architecture.embed, "output")))
    if architecture.pos_embed is not None:
        before.append(PositionSite("hook_pos_embed", Place(architecture.pos_embed, "output")))
    blocks = [_block_sites(architecture, layer, norms) for layer in range(cfg.n_layers)]
    norm, head = norms[architecture.ln_final], architecture.unembed
    after: list[Site] = [
        NormSite("ln_final", norm, final=True),
        UnembedInSite("unembed.hook_in", Place(head, "input"), norm),
        UnembedOutSite("unembed.hook_out", Place(head, "output")),
    ]
    return before, blocks, after


def _block_sites(architecture: Architecture, layer: int, norms: Mapping[str, Norm]) -> list[Site]:
    prefix, block, path = f"blocks.{layer}", architecture.block, architecture.layer(layer)
    post: list[list[Site]] = []
    for role, name in architecture.post_norms:
        there = getattr(block, role) is not None
        post.append([NormSite(f"{prefix}.{name}", norms[architecture.in_layer(layer, role)])] if there else [])
    middle: list[Site] = []
    if not block.parallel:
        reader = architecture.in_layer(layer, "ln2" if block.ln2 is not None else "mlp")
        middle.append(StreamSite(f"{prefix}.hook_resid_mid", Place(reader, "input", block.flat_mlp), in_place=True))
    attn_branch, mlp_branch = (f"{path}.{branch}" for branch in architecture.branches)
    return [
        StreamSite(f"{prefix}.hook_resid_pre", Place(path, "input")),
        *_attention_sites(architecture, layer, norms),
        *post[0],
        BranchSite(f"{prefix}.hook_attn_out", Place(attn_branch, "output"), (f"{prefix}.attn.hook_result",)),
        *middle,
        *_mlp_sites(architecture, layer, norms),
        *post[1],
        BranchSite(f"{prefix}.hook_mlp_out", Place(mlp_branch, "output", block.flat_mlp)),
        StreamSite(f"{prefix}.hook_resid_post", Place(path, "output")),
    ]


def _attention_sites(architecture: Architecture, layer: int, norms: Mapping[str, Norm]) -> list[Site]:
    block, prefix = architecture.block, f"blocks.{layer}.attn"

    def path(role: str) -> str:
        return architecture.in_layer(layer, role)

    norm = None if block.ln1 is None else norms[path("ln1")]
    inputs = AttentionInputSite(layer, Place(architecture.layer(layer), "input"), norm, block.ln1 == block.ln2)
    sites: list[Site] = [inputs]
    for letters in ("q", "k", "v") if block.qkv is None else ("qkv",):
        sites.append(QKVSite(layer, path(letters), inputs, letters))
    for letter in "qk":
        role = f"{letter}_norm"
        if getattr(block, role) is not None:
            norm = norms[path(role)]
            per_head = block.qk_norm_over == "head"
            site = (
                HeadNormSite(f"{prefix}.{role}", norm, block.qk_norm_heads_first)
                if per_head
                else NormSite(f"{prefix}.{role}", norm)
            )
            sites.append(site)
    if block.rotary:
        for index, letter in enumerate("qk", start=block.query_argument):
            sites.append(RotarySite(f"{prefix}.hook_rot_{letter}", ArgumentPlace(path("attn"), index)))
    scores = ScoresSite(layer, SoftmaxPlace(path("attn"), "input"))
    pattern = PatternSite(layer, SoftmaxPlace(path("attn"), "output"), scores)
    return [*sites, scores, pattern, ZSite(layer, path("o"), (*scores.names, *pattern.names))]


def _mlp_sites(architecture: Architecture, layer: int, norms: Mapping[str, Norm]) -> list[Site]:
    block, prefix = architecture.block, f"blocks.{layer}"

    def place(role: str, side: Side) -> Place:
        return Place(architecture.in_layer(layer, role), side, block.flat_mlp)

    sites: list[Site] = []
    if block.ln2 is None:
        sites.append(CopySite(f"{prefix}.hook_mlp_in", place("mlp", "input")))
    else:
        shared = block.ln1 == block.ln2
        norm = norms[architecture.in_layer(layer, "ln2")]
        ln2 = NormSite(f"{prefix}.ln2", norm, reader=f"{prefix}.mlp.hook_in", shared=shared, flat=block.flat_mlp)
        copy = CopySite(f"{prefix}.hook_mlp_in", ln2.place, ln2 if shared else None)
        sites += [copy, ln2, *([ReaderSite(ln2, copy, place("mlp", "input"))] if shared else [])]
    pre, linear = f"{prefix}.mlp.hook_pre", f"{prefix}.mlp.hook_pre_linear"
    if block.gate_up:
        sites.append(GateUpSite((pre, linear), place("mlp_in", "output")))
    elif block.gate is not None:
        sites += [PlainSite(pre, place("gate", "output")), PlainSite(linear, place("mlp_in", "output"))]
    else:
        sites.append(PlainSite(pre, place("mlp_in", "output")))
    return [*sites, PlainSite(f"{prefix}.mlp.hook_post", place("mlp_out", "input"))]
