"""What is one layer of a model made of?

Of modules with roles, which are paths below the layer, and of a few facts about them. What is there says which hook
points the layer has (`Block.features`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..experts import ExpertForm, form_of
from .forms import PARTS, Beside, Layout, Refusal, Softmax

#: A factor: the path of the attribute that holds it, below a layer; or what makes it of the layer.
Factor = str | Callable[[Any], Any]


@dataclass(frozen=True)
class Block:
    """The roles inside one layer, as paths below the layer; None for a role that there is none of.

    Where a layer's modules are in several lists, a path with ``{l}`` in the place of its number begins at the root. The
    defaults are Llama's, so that most families say little.
    """

    #: The module whose output is the residual stream before attention, where that is not what the layer is given; and
    #: the one whose output is what the next layer is given, where that is not the layer's.
    enters: str | None = None
    leaves: str | None = None
    ln1: str | None = "input_layernorm"
    #: The module in whose forward scores and pattern are made; None where there is no softmax attention.
    attn: str | None = "self_attn"
    #: The projections that give hook_q, hook_k and hook_v. None: queries and keys are to be had after their rotation
    #: only, and values as attention is called with them.
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    #: The module that returns the values, where ``v`` is None for not being the last before them.
    values: str | None = None
    #: One projection in the place of ``q``, ``k`` and ``v``, and how its output axis holds them.
    qkv: str | None = None
    qkv_layout: Layout = PARTS
    #: Whether ``q`` holds for each head its query and then a gate on what the head writes.
    q_gate: bool = False
    #: Whether what the projections return is clipped, in place.
    clips: bool = False
    #: Norms of queries and keys, over each head or over all of them.
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    #: Whether heads come before positions in what these norms are given, and whether that is rotated already.
    qk_norm_heads_first: bool = False
    qk_norm_rotated: bool = False
    o: str | None = "self_attn.o_proj"
    #: A bias of what attention writes that is added behind ``o``: an attribute, which is None in layers without.
    o_bias: str | None = None
    #: Whether hook_z is what the attention call returns, because something stands between that and ``o``.
    z_from_call: bool = False
    #: What stands there, if it is a norm of all heads.
    z_norm: str | None = None
    #: Learned logits, one a head, that take part in the softmax as a last column: an attribute's path.
    sinks: str | None = None
    #: Whether the softmax goes without them, and what the heads write is scaled by what they leave of it.
    sinks_behind: bool = False
    #: A norm of what attention writes, before it is added.
    ln1_post: str | None = None
    ln2: str | None = "post_attention_layernorm"
    #: None for a layer that has nothing but attention or its substitute.
    mlp: str | None = "mlp"
    #: The projection that goes through the activation function, and the one it is multiplied with.
    gate: str | None = "mlp.gate_proj"
    mlp_in: str | None = "mlp.up_proj"
    #: Whether ``mlp_in`` holds both, the one that goes through the activation function first.
    gate_up: bool = False
    mlp_out: str | None = "mlp.down_proj"
    #: A norm of the activations before ``mlp_out``.
    neuron_norm: str | None = None
    #: The activation function, where it has weights of its own.
    act: str | None = None
    #: A mixture of experts in the place of ``gate``, ``mlp_in`` and ``mlp_out``: the module that is given tokens, the
    #: experts chosen for them and their weights; and the projection that scores experts.
    experts: str | None = None
    router: str | None = None
    #: Whether hook_expert_weights are a softmax over all experts of the first thing that the router returns, before
    #: some are chosen, and experts without tokens show empty values: as TransformerLens' MoE, not its GptOssMoE.
    weighs_all: bool = False
    #: What can be shown of the single experts, as their module declares it (`Architecture.block_of`).
    expert_form: ExpertForm = ExpertForm()
    #: Where the experts are beside ``mlp``, with norms of their own.
    beside: Beside | None = None
    ln2_post: str | None = None
    #: The modules whose output is added to the residual stream, where these are not ``ln1_post`` or ``attn`` and
    #: ``ln2_post`` or ``mlp``.
    attn_branch: str | None = None
    mlp_branch: str | None = None
    #: Modules that what attention or the MLP writes goes through before it is added (a convolution, say).
    attn_through: str | None = None
    mlp_through: str | None = None
    #: Which call of that module it is, counted from 0.
    attn_branch_call: int = 0
    #: A module that is called before them and whose output is added to theirs.
    attn_also: str | None = None
    mlp_also: str | None = None
    #: An attribute that holds a factor between that output and what is added; and one for the module called before, if
    #: that has another.
    attn_factor: Factor | None = None
    mlp_factor: Factor | None = None
    attn_also_factor: str | None = None
    #: What is added behind that factor, to the stream's side of the sum, too.
    attn_bias: Factor | None = None
    mlp_bias: Factor | None = None
    #: A factor on the stream that attention's or the MLP's output is added to.
    attn_residual: Factor | None = None
    mlp_residual: Factor | None = None
    #: Attributes that hold a factor between ``ln1`` and attention, and between what a role's module returns and what
    #: its point is (``k``, ``gate``, ``mlp_out``).
    attn_in_factor: str | None = None
    factors: Mapping[str, str] = field(default_factory=dict)
    #: A factor on what ``ln1`` and ``ln2`` return, where the branches are added to that instead of to the stream.
    attn_skip: Factor | None = None
    mlp_skip: Factor | None = None
    #: Whether batch and position are one axis from the norm before the MLP to the MLP's output, or in that output only.
    flat_mlp: bool = False
    flat_mlp_out: bool = False
    #: Whether batch and head are one axis in scores and pattern.
    flat_heads: bool = False
    #: Whether attention and MLP read the same residual stream, and are added together.
    parallel: bool = False
    #: Whether ``ln1`` and ``ln2`` norm the stream itself, behind attention and MLP (Vaswani et al. 2017).
    post_norm: bool = False
    #: Whether something stands between ``ln1`` and ``ln2`` and what reads them, so that no gain can be folded into it.
    gated_norms: bool = False
    #: Where the residual stream between attention and MLP is the input of, if not of ``ln2`` or the MLP.
    middle: str | None = None
    #: Or the module whose output it is.
    between: str | None = None
    #: What else the layer adds to the stream or does to it, in words; hook_resid_post is then no sum of the others.
    extra: str | None = None
    #: Whether queries and keys are rotated (Su et al. 2021) before they meet, and which argument of the function that
    #: attention calls on them is the query; the key is the next, then the value.
    rotary: bool = True
    query_argument: int = 1
    softmax: Softmax = Softmax()
    #: Points that follow from all this and are not offered, with the reasons.
    refusals: tuple[Refusal, ...] = ()

    @property
    def features(self) -> frozenset[str]:
        """What the table of hook points (`points.py`) asks of a layer."""
        attends, around = self.attn is not None, self.ln1_post is not None
        before = self.ln1 is not None and not self.post_norm
        found = {
            "attention": attends,
            "queries": attends and (self.q is not None or self.qkv is not None),
            "keys": attends and (self.k is not None or self.qkv is not None),
            "values": attends and (self.v is not None or self.qkv is not None),
            "projections": attends and (None not in (self.q, self.k, self.v) or self.qkv is not None),
            "heads out": attends and self.o is not None,
            "attention branch": attends or self.attn_branch is not None,
            "norms before": before,
            "norm before MLP": self.ln2 is not None and not self.post_norm,
            "norm around": around and before,
            "norm around MLP": self.ln2_post is not None and self.ln1 is not None,
            "norms after": around and self.ln1 is None,
            "norms behind": self.post_norm,
            "sequential": not self.parallel and self.mlp is not None and (attends or self.attn_branch is not None),
            "rotary": attends and (self.rotary or not (self.q or self.qkv)),
            "qk norm": self.q_norm is not None,
            "MLP": self.mlp is not None,
            "neurons": self.mlp_out is not None,
            "neuron norm": self.neuron_norm is not None,
            "gate": self.mlp_out is not None and (self.gate_up or self.gate is not None),
            "experts": self.experts is not None,
            "expert neurons": self.expert_form.shown > 0,
            "expert gates": self.expert_form.shown > 0 and self.expert_form.gated,
        }
        return frozenset(name for name, there in found.items() if there)

    @property
    def shares_entrance(self) -> bool:
        """Whether more than the layer's module reads the stream before it, because that module is attention."""
        return self.attn == ""

    @property
    def folds_ln1(self) -> bool:
        """Whether weights that are shown read ``ln1``, so that its gain can be folded into them."""
        return (
            not self.gated_norms
            and "norms before" in self.features
            and ("queries" in self.features or self.v is not None)
        )

    @property
    def folds_ln2(self) -> bool:
        """Whether weights that are shown read ``ln2``."""
        return (
            not self.gated_norms
            and "norm before MLP" in self.features
            and not self.features.isdisjoint({"neurons", "expert neurons"})
        )

    @property
    def replaceable_mlp(self) -> bool:
        """Whether a module can be put in the MLP's place: a norm is before it, and it is added as it is, or normed."""
        as_it_is = self.mlp_factor is None and self.mlp_also is None and "mlp_out" not in self.factors
        return bool(self.mlp) and "norm before MLP" in self.features and as_it_is

    @property
    def moves_value_bias(self) -> bool:
        """Whether a bias of the values adds a constant to what attention writes: rows of the pattern sum to one, and
        nothing stands between values, pattern and output projection."""
        plain = self.qkv is not None or self.v is not None
        between = self.clips or self.sinks is not None or self.z_from_call
        return plain and self.o is not None and not between

    @property
    def post_norms(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(role, TransformerLens' name) of the norms of what attention and MLP write."""
        if self.ln1 is None:
            return ("ln1_post", "ln1"), ("ln2_post", "ln2")
        return ("ln1_post", "ln1_post"), ("ln2_post", "ln2_post")

    @property
    def branches(self) -> tuple[str | None, str | None]:
        """The modules whose outputs attention and MLP add to the residual stream."""
        attn, mlp = self.attn_branch or self.attn_through, self.mlp_branch or self.mlp_through
        return (attn or self.ln1_post or self.attn, mlp or self.ln2_post or self.mlp)


def unscaled(layer: Any) -> float:
    """The factor of what is added as it is."""
    return 1.0


def mixture(mlp: str = "mlp", router: str = "gate") -> dict[str, Any]:
    """The changes of a layer whose MLP, at this path, is a mixture of experts."""
    dense = dict.fromkeys(("gate", "mlp_in", "mlp_out"))
    return {"experts": f"{mlp}.experts", "router": f"{mlp}.{router}", **dense}


def instead_of_attention(path: str) -> dict[str, Any]:
    """The changes of a layer where another module (a recurrence, say) stands in the place of attention."""
    return {"attn_branch": path, **dict.fromkeys(("attn", "q", "k", "v", "qkv", "q_norm", "k_norm", "o"))}


def without_mlp() -> dict[str, Any]:
    """The changes of a layer that has nothing but attention, or what stands in its place."""
    return {**dict.fromkeys(("ln2", "mlp", "gate", "mlp_in", "mlp_out"))}


#: What the presence of a module or parameter below a layer changes, in families whose modules go by Llama's names.
LLAMA_KINDS: Mapping[str, Mapping[str, Any]] = {
    "self_attn.q_norm": {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    "self_attn.q_layernorm": {"q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"},
    "self_attn.sinks": {"sinks": "self_attn.sinks"},
    "mlp.experts": mixture(),
    "mlp.router": {"router": "mlp.router"},
}


def with_experts(block: Block, layer: Any) -> Block:
    """The block with the form of a layer's experts, if it has some."""
    if block.experts is None:
        return block
    router = None if block.router is None else layer.get_submodule(block.router)
    return replace(block, expert_form=form_of(layer.get_submodule(block.experts), router))
