"""Which sites does a model have, and where?

The record of its architecture says where each role lives in each layer; here each role becomes the sites that
TransformerLens' points are served at, in TransformerLens' firing order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..architectures import Architecture
from ..architectures.block import Factor
from .activation_sites import ActivationSite
from .attention_sites import (
    ArgumentSite,
    AttentionInputSite,
    HeadsSite,
    PatternSite,
    QKVSite,
    ResultSite,
    ScoresSite,
    SharedPatternSite,
    ZSite,
)
from .expert_sites import ChosenSite, NeuronsSite, ScoredSite
from .norm_sites import AgainNormedSite, CopySite, HeadNormSite, Norm, NormSite, ReaderSite, UnembedInSite
from .places import (
    AnyPlace,
    ArgumentPlace,
    FactorPlace,
    FirstPlace,
    Place,
    ResultPlace,
    RotatedPlace,
    Side,
    SoftmaxPlace,
)
from .sites import (
    AgainSite,
    BranchSite,
    GateUpSite,
    OutputSite,
    PartSite,
    PlainSite,
    PositionSite,
    Site,
    StreamSite,
    SumSite,
    UncentredEmbedSite,
    UnembedOutSite,
)
from .squares import SquareForm


def sites_of(
    architecture: Architecture, cfg: Any, norms: Mapping[str, Norm]
) -> tuple[list[Site], list[list[Site]], list[Site]]:
    """(before the blocks, one list per block, after the blocks), each in TransformerLens' firing order.

    Args:
        norms: the model's norms, by path.
    """
    before: list[Site] = []
    token = Place(architecture.project_in or architecture.embed, "output")
    norm = norms[architecture.embed_norm] if architecture.embed_norm is not None else None
    if norm is not None and not architecture.embed_norm_of_sum:
        before.append(NormSite("embed.ln", norm))
        before.append(UncentredEmbedSite(Place(norm.path, "output"), "hook_embed"))
    else:
        scaled = _scaled(token, "", architecture.embed_factor, power=architecture.embed_factor_power)
        before.append(BranchSite("hook_embed", scaled))
    for name, path in (("pos", architecture.pos_embed), ("token_type", architecture.type_embed)):
        if path is not None:
            before.append(PositionSite(f"hook_{name}_embed", Place(path, "output")))
    if norm is not None and architecture.embed_norm_of_sum:
        before += [NormSite("embed.ln", norm), UncentredEmbedSite(Place(norm.path, "output"))]
    layers = range(cfg.n_layers)
    blocks = [_called(_BlockLayout(architecture, n, norms, cfg).sites(), architecture.call(n)) for n in layers]
    return before, blocks, _behind(architecture, norms)


def _called(sites: list[Site], before: int) -> list[Site]:
    """The sites of a layer that has run so often before."""
    for site in sites if before else []:
        for name, place in vars(site).items():
            if isinstance(place, AnyPlace):
                setattr(site, name, replace(place, call=place.call + before))
    return sites


def _behind(architecture: Architecture, norms: Mapping[str, Norm]) -> list[Site]:
    """The sites after the last layer."""
    norm, head = norms[architecture.ln_final] if architecture.ln_final is not None else None, architecture.unembed
    read = norm if norm is not None and norm.folds else None
    after: list[Site] = []
    if norm is not None:
        after.append(NormSite("ln_final", norm, final=norm.folds, call=architecture.final_call))
    first = FirstPlace if architecture.several_unembedded else Place
    into = _scaled(first(architecture.project_out or head, "input"), "", architecture.unembed_divisor)
    after.append(UnembedInSite("unembed.hook_in", into, read))
    return [*after, UnembedOutSite("unembed.hook_out", first(head, "output"))]


def _scaled(place: Place, owner: str, factor: Factor | None, bias: Factor | None = None, power: float = 1.0) -> Place:
    """The place, with the factor and the bias that stand behind it."""
    if factor is None and bias is None:
        return place
    return FactorPlace(place.path, place.side, place.flat, owner=owner, factor=factor, bias=bias, power=power)


class _BlockLayout:
    """The sites of one layer."""

    def __init__(self, architecture: Architecture, layer: int, norms: Mapping[str, Norm], cfg: Any) -> None:
        self.key_values = cfg.n_key_value_heads or cfg.n_heads
        self.architecture = architecture
        self.block = architecture.blocks[layer]
        self.layer = layer
        self.norms = norms
        self.prefix = f"blocks.{layer}"
        self.root = architecture.layer(layer)
        self.start = Place(*architecture.entrance(layer))

    def path(self, role: str) -> str:
        """Where a role is in the HF model."""
        return self.architecture.in_layer(self.layer, role)

    def there(self, role: str) -> bool:
        """Whether the layer has a role."""
        return getattr(self.block, role) is not None

    def place(self, role: str, side: Side) -> Place:
        """A role of the MLP."""
        return Place(self.path(role), side, self.block.flat_mlp)

    def scaled(self, role: str) -> Place:
        """What a role's module returns, with the factor behind it if there is one."""
        flat = self.block.flat_mlp and role == "gate"
        return _scaled(Place(self.path(role), "output", flat), self.root, self.block.factors.get(role))

    def norm_sites(self, role: str, name: str) -> list[Site]:
        """The norm in a role, if there is one, under TransformerLens' name."""
        return [NormSite(f"{self.prefix}.{name}", self.norms[self.path(role)])] if self.there(role) else []

    def sites(self) -> list[Site]:
        """All of them."""
        block, prefix = self.block, self.prefix
        around = [[]] * 2 if block.post_norm else [self.norm_sites(*each) for each in block.post_norms]
        return [
            StreamSite(f"{prefix}.hook_resid_pre", self.start, in_place=block.shares_entrance),
            *self.attention(),
            *around[0],
            *self.branch("attn", (f"{prefix}.attn.hook_result",)),
            *self.middle(),
            *self.mlp(),
            *around[1],
            *self.branch("mlp", (f"{prefix}.attn.hook_result", f"{prefix}.hook_attn_out") if block.parallel else ()),
            *self.end(),
        ]

    def branch(self, part: str, after_edits_of: tuple[str, ...] = ()) -> list[Site]:
        """What attention or the MLP adds to the stream."""
        path = self.block.branches[part == "mlp"]
        if path is None:
            return []
        flat = part == "mlp" and (self.block.flat_mlp or self.block.flat_mlp_out)
        name = f"{self.prefix}.hook_{part}_out"
        factor, also = (getattr(self.block, f"{part}_{what}") for what in ("factor", "also"))
        bias: Factor | None = getattr(self.block, f"{part}_bias")
        call = 0
        if part == "attn":
            bias, call = bias or self.block.o_bias, self.block.attn_branch_call

        def place(path: str, factor: str | None) -> Place:
            there = Place(self.architecture.below(self.layer, path), "output", flat, call)
            return _scaled(there, self.root, factor, bias)

        edits, beside = after_edits_of, part == "attn" and self.block.parallel and self.block.branches[1] is not None
        if also is None:
            return [BranchSite(name, place(path, factor), edits, beside)]
        own = self.block.attn_also_factor if part == "attn" else None
        return [PartSite(name, place(also, own or factor)), SumSite(name, place(path, factor), edits, beside)]

    def middle(self) -> list[Site]:
        """The stream between attention and MLP."""
        block = self.block
        if "sequential" not in block.features:
            return []
        if block.post_norm:
            return [StreamSite(f"{self.prefix}.hook_resid_mid", Place(self.path("ln1"), "input"))]
        name = f"{self.prefix}.hook_resid_mid"
        if block.between is not None:
            return [StreamSite(name, Place(self.path("between"), "output"))]
        reader = block.middle or block.ln2 or block.mlp
        assert reader is not None
        place = Place(self.architecture.below(self.layer, reader), "input", block.flat_mlp)
        return [StreamSite(name, place, in_place=True)]

    def end(self) -> list[Site]:
        """The stream behind the MLP."""
        name = f"{self.prefix}.hook_resid_post"
        last = Place(self.architecture.exit(self.layer), "output")
        if not self.block.post_norm:
            return [StreamSite(name, last)]
        stream = StreamSite(name, Place(self.path("ln2"), "input"))
        after = StreamSite(f"{self.prefix}.hook_normalized_resid_post", last)
        return [stream, *self.norm_sites("ln2", "ln2"), after]

    # --- attention ----------------------------------------------------------------------------------------------------

    def attention(self) -> list[Site]:
        """From the norm before attention to what its heads write."""
        block, prefix = self.block, f"{self.prefix}.attn"
        before = self.there("ln1") and not block.post_norm
        if "queries" not in block.features:
            sites: list[Site] = self.norm_sites("ln1", "ln1") if before and block.attn_skip is None else []
            if block.attn_skip is not None:
                ln1 = NormSite(f"{self.prefix}.ln1", self.norms[self.path("ln1")], shared=True)
                assert block.attn_branch is not None
                read = Place(self.architecture.below(self.layer, block.attn_branch), "input")
                sites = [ln1, ReaderSite(ln1, read)]
        else:
            norm = self.norms[self.path("ln1")] if before else None
            fused = block.qkv is not None
            roles = ["qkv"] if fused else [role for role in ("q", "k", "v") if self.there(role)]
            # Where there are several streams, what the norm reads is none of them.
            several = self.architecture.why_refused(f"{self.prefix}.hook_resid_pre") is not None
            start = Place(norm.path, "input") if several and norm is not None else self.start
            shared = block.ln1 == block.ln2 or self.there("attn_also") or block.attn_skip is not None
            inputs = AttentionInputSite(self.layer, start, norm, "".join(roles), shared)
            places = [self.scaled(role) for role in roles]
            projections = zip(places, roles, strict=True)
            sites = [inputs, *(QKVSite(self.layer, place, inputs, role, block.clips) for place, role in projections)]
        if block.attn is None:
            return sites
        sites += [site for letter in "qk" for site in self.head_norm(letter)]
        query, key, value = (
            ArgumentPlace(self.path("attn"), block.query_argument + index, repeated=block.softmax.times > 1)
            for index in range(3)
        )
        if "rotary" in block.features:
            meet: list[AnyPlace] = [query, key]
            if block.softmax.queries is not None:
                meet = [RotatedPlace(self.path("attn"), letter, self.key_values) for letter in "qk"]
            names = (f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k")
            sites += [ArgumentSite(name, place) for name, place in zip(names, meet, strict=True)]
            sites += [site for name, place in zip(names, meet, strict=True) for site in self.again(place, name)]
        if block.values is not None:
            sites.append(HeadsSite(self.layer, "v", Place(self.path("values"), "output")))
        elif block.qkv is None and block.v is None:
            sites.append(ArgumentSite(f"{prefix}.hook_v", value, query))
        return [*sites, *self.heads()]

    def head_norm(self, letter: str) -> list[Site]:
        """The norm of queries or keys."""
        role, block = f"{letter}_norm", self.block
        if not self.there(role):
            return []
        name, norm = f"{self.prefix}.attn.{role}", self.norms[self.path(role)]
        if block.qk_norm_over == "head":
            # One module may norm queries first, and then keys.
            call = int(letter == "k" and block.q_norm == block.k_norm)
            return [HeadNormSite(name, norm, block.qk_norm_heads_first, call)]
        return [NormSite(name, norm)]

    def heads(self) -> list[Site]:
        """Scores, pattern, z and what the heads write."""
        block, layer = self.block, self.layer
        form = SquareForm(self.root, block.softmax.mask, block.sinks, block.flat_heads, block.sinks_behind)
        shifted = self.path("attn") if block.softmax.shifted and block.sinks is None else None
        scores = ScoresSite(layer, self.square("input"), form, shifted)
        pattern = (SharedPatternSite if form.behind else PatternSite)(layer, self.square("output"), scores)
        sites: list[Site] = [scores, pattern]
        upstream = (*scores.names, *pattern.names)
        sites += [*self.again(scores.place, *scores.names), *self.again(pattern.place, *upstream)]
        if block.z_from_call or block.o is None:
            sites.append(HeadsSite(layer, "z", ResultPlace(self.path("attn"))))
        if block.o is None:
            return sites
        written = _scaled(Place(self.path("o"), "output"), self.root, None, block.o_bias)
        if block.z_from_call:
            return [*sites, ResultSite(layer, self.path("o"), written)]
        return [*sites, ZSite(layer, self.path("o"), written, upstream)]

    def square(self, side: Side) -> AnyPlace:
        """The softmax of attention."""
        module = self.block.softmax.module
        if module is not None:
            return Place(self.architecture.below(self.layer, module), side)
        return SoftmaxPlace(self.path("attn"), side, repeated=self.block.softmax.times > 1)

    def again(self, place: AnyPlace, *after_edits_of: str) -> list[Site]:
        """The same place in the later calls of attention."""
        if not isinstance(place, ArgumentPlace | SoftmaxPlace):
            return []
        later = (replace(place, call=call, repeated=False) for call in range(1, self.block.softmax.times))
        return [AgainSite(place, again, after_edits_of) for again in later]

    # --- MLP ----------------------------------------------------------------------------------------------------------

    def mlp(self) -> list[Site]:
        """From the norm before the MLP to its neurons."""
        block, prefix = self.block, self.prefix
        if block.mlp is None:
            return []
        sites: list[Site] = []
        if block.post_norm:
            sites += [
                CopySite(f"{prefix}.hook_mlp_in", Place(self.path("ln1"), "input")),
                *self.norm_sites("ln1", "ln1"),
            ]
        elif block.ln2 is None:
            sites.append(CopySite(f"{prefix}.hook_mlp_in", self.place("mlp", "input")))
        else:
            shared = block.ln1 == block.ln2 or block.mlp_skip is not None
            norm = self.norms[self.path("ln2")]
            # What MLP and experts read is not the same where they have norms of their own.
            reads = f"{prefix}.mlp.hook_in" if block.beside is None else None
            ln2 = NormSite(f"{prefix}.ln2", norm, reader=reads, shared=shared, flat=block.flat_mlp)
            read = Place(norm.path, "input", block.flat_mlp, repeated=block.beside is not None)
            copy = CopySite(f"{prefix}.hook_mlp_in", read, ln2 if shared else None)
            sites += self.beside(copy, ln2)
            sites += [copy, ln2, *([ReaderSite(ln2, self.place("mlp", "input"), copy)] if shared else [])]
        return [*sites, *(self.neurons() if block.mlp_out is not None else self.experts()), *self.output()]

    def output(self) -> list[Site]:
        """What the MLP returns, for who puts a module in its place."""
        block, name = self.block, f"{self.prefix}.mlp.hook_out"
        if not block.replaceable_mlp:
            return []
        if block.ln2_post is not None:
            return [PlainSite(name, Place(self.path("mlp"), "output", block.flat_mlp))]
        branch = block.branches[1]
        assert branch is not None
        flat = block.flat_mlp or block.flat_mlp_out
        return [OutputSite(name, Place(self.architecture.below(self.layer, branch), "output", flat))]

    def beside(self, copy: CopySite, ln2: NormSite) -> list[Site]:
        """Where edits of what the MLP reads go in for experts beside it."""
        block = self.block
        if block.beside is None or block.router is None:
            return []
        path = self.architecture.below(self.layer, block.beside.reads)
        readers = (Place(each, "input", flat=True) for each in (self.path("router"), path))
        normed = AgainNormedSite(ln2, self.norms[path], Place(path, "output", flat=True))
        return [*(AgainSite(copy.place, reader, copy.names) for reader in readers), normed]

    def experts(self) -> list[Site]:
        """Which experts are chosen, and what they compute."""
        block, prefix = self.block, self.prefix
        if block.experts is None:
            return []
        path, form = self.path("experts"), block.expert_form
        choice = ScoredSite(prefix, self.path("router")) if block.weighs_all else ChosenSite(prefix, path, form.count)
        return [choice, *([NeuronsSite(prefix, path, form, block.weighs_all)] if form.shown else [])]

    def neurons(self) -> list[Site]:
        """The MLP's activations."""
        block, pre, linear = self.block, f"{self.prefix}.mlp.hook_pre", f"{self.prefix}.mlp.hook_pre_linear"
        sites: list[Site]
        last = Place(self.path("mlp_out"), "input", block.flat_mlp)
        name = f"{self.prefix}.mlp.hook_post"
        post = PlainSite(name, last)
        if block.gate_up:
            sites = [GateUpSite((pre, linear), self.place("mlp_in", "output"))]
        elif block.gate is not None:
            gate, up = PlainSite(pre, self.scaled("gate")), PlainSite(linear, self.place("mlp_in", "output"))
            sites, post = [gate, up], ActivationSite(name, last, gate, up)
        else:
            into = PlainSite(pre, self.place("mlp_in", "output"))
            sites, post = [into], ActivationSite(name, last, into)
        if block.neuron_norm is not None:
            sites.append(PlainSite(f"{self.prefix}.mlp.hook_mid", self.place("neuron_norm", "input")))
            sites += self.norm_sites("neuron_norm", "mlp.ln")
        return [*sites, post]
