"""Which hook points exist, and what does each one mean?

One row of data per TransformerLens 3.9.0 name. Everything that needs to know about a point (the components that carry
it, the engine that serves it, error messages, docs and tests) reads this table; nothing else lists hook names.

Rows stand in the order in which TransformerLens fires them. ``{l}`` is a layer. Symbols of the equations: ``x`` is the
residual stream, ``n`` its normalised form, and a weight stands for its TransformerLens view in the active basis.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

RESID = "batch pos d_model"
PER_HEAD = "batch pos head d_model"
HEADS = "batch pos head d_head"
SQUARE = "batch head query_pos key_pos"
NEURONS = "batch pos d_mlp"
ROUTED = "batch*pos expert"
EXPERT = "routed d_mlp"
SCALE = "sqrt(mean((x - mean x)^2) + eps)"
NORMALIZED = "(x - mean x) / scale"

#: The features of GPT-2, around its layers and in each of them: what a row ``needs`` is one of these or of another's.
GPT2_FEATURES = frozenset({"learned positions", "final norm"})
GPT2_LAYER = frozenset(
    "attention, projections, queries, keys, values, heads out, attention branch, norms before, norm before MLP, "
    "sequential, MLP, neurons".split(", ")
)
#: feature -> why the points that need it do not exist where it is absent.
ABSENT = {
    "embedding norm": "there is no norm behind the embedding",
    "learned positions": "no learned positions are added to the embedding",
    "token types": "no token types are added to the embedding",
    "norm of the embeddings": "there is no norm behind the sum of the embeddings",
    "final norm": "there is no norm before the unembedding",
    "attention": "no softmax attention runs in this layer",
    "projections": "queries, keys and values are not all plain projections of what attention reads in this layer",
    "keys": "keys are no plain projection of what attention reads in this layer",
    "values": "values are no plain projection of what attention reads in this layer",
    "queries": "queries and keys are no plain projections of what attention reads in this layer",
    "heads out": "attention has no output projection in this layer that reads its heads",
    "attention branch": "nothing runs in attention's place in this layer",
    "norms before": "no norm stands before attention in this layer",
    "norm before MLP": "no norm stands before the MLP in this layer",
    "norm around": "no norm stands behind attention in this layer",
    "norm around MLP": "no norm stands behind the MLP in this layer",
    "norms after": "norms stand before attention and MLP in this layer",
    "norms behind": "norms do not stand in the residual stream itself",
    "sequential": "attention and MLP read the same residual stream, or one of them is missing: none lies between them",
    "rotary": "queries and keys are not rotated",
    "qk norm": "queries and keys are not normed",
    "MLP": "there is no MLP in this layer",
    "neurons": "the MLP of this layer has no neurons of its own (it chooses among experts, say)",
    "neuron norm": "the MLP of this layer does not norm its activations",
    "gate": "the MLP of this layer has no gate",
    "experts": "the MLP of this layer does not choose among experts, or not as a module of theirs is given them",
    "expert neurons": "the module of this layer's experts does not declare how they are laid out",
    "expert gates": "the experts of this layer have no gates, or their module does not declare how they are laid out",
}


_LAYER = re.compile(r"^blocks\.\d+\.")
_EXPERT = re.compile(r"(\.experts\.)\d+(\.)")


@dataclass(frozen=True)
class Point:
    """One hook point: its name (with ``{l}`` for a layer), shape and meaning.

    ``flag`` is the config flag that turns it on, ``needs`` the feature of an architecture that it exists with.
    """

    name: str
    shape: str
    meaning: str
    flag: str | None = None
    needs: str | None = None

    @property
    def in_layer(self) -> bool:
        """Whether there is one such point in every layer."""
        return "{l}" in self.name

    def exists_with(self, features: Collection[str]) -> bool:
        """Whether the point exists where there are these features."""
        return self.needs is None or self.needs in features


#: flag -> the setter that turns it on, for messages.
FLAG_SETTERS = {
    "use_attn_result": "set_use_attn_result",
    "use_split_qkv_input": "set_use_split_qkv_input",
    "use_attn_in": "set_use_attn_in",
    "use_hook_mlp_in": "set_use_hook_mlp_in",
}

POINTS: tuple[Point, ...] = (
    Point("embed.ln.hook_scale", "batch pos 1", SCALE, needs="embedding norm"),
    Point("embed.ln.hook_normalized", RESID, NORMALIZED, needs="embedding norm"),
    Point("hook_embed", RESID, "W_E[tokens]"),
    Point("hook_pos_embed", RESID, "W_pos[positions]", needs="learned positions"),
    Point("hook_token_type_embed", RESID, "the embedding of the token's type", needs="token types"),
    Point("embed.ln.hook_scale", "batch pos 1", f"{SCALE}, of the sum of these", needs="norm of the embeddings"),
    Point("embed.ln.hook_normalized", RESID, f"{NORMALIZED}, of the sum of these", needs="norm of the embeddings"),
    Point("blocks.{l}.hook_resid_pre", RESID, "x entering the block"),
    Point("blocks.{l}.hook_attn_in", PER_HEAD, "x, one copy per head", "use_attn_in", "projections"),
    Point("blocks.{l}.hook_q_input", PER_HEAD, "x, one copy per query head", "use_split_qkv_input", "queries"),
    Point("blocks.{l}.hook_k_input", PER_HEAD, "x, one copy per key head", "use_split_qkv_input", "keys"),
    Point("blocks.{l}.hook_v_input", PER_HEAD, "x, one copy per value head", "use_split_qkv_input", "values"),
    Point("blocks.{l}.ln1.hook_scale", "batch pos 1", f"{SCALE}; fires for q, k and v", needs="norms before"),
    Point("blocks.{l}.ln1.hook_normalized", RESID, f"{NORMALIZED}; fires for q, k and v", needs="norms before"),
    Point("blocks.{l}.attn.hook_q", HEADS, "n @ W_Q + b_Q", needs="queries"),
    Point("blocks.{l}.attn.hook_k", HEADS, "n @ W_K + b_K", needs="keys"),
    Point("blocks.{l}.attn.hook_v", HEADS, "n @ W_V + b_V", needs="attention"),
    Point("blocks.{l}.attn.q_norm.hook_scale", "... 1", f"{SCALE}, of q", needs="qk norm"),
    Point("blocks.{l}.attn.q_norm.hook_normalized", "... d_head", f"{NORMALIZED}, of q", needs="qk norm"),
    Point("blocks.{l}.attn.k_norm.hook_scale", "... 1", f"{SCALE}, of k", needs="qk norm"),
    Point("blocks.{l}.attn.k_norm.hook_normalized", "... d_head", f"{NORMALIZED}, of k", needs="qk norm"),
    Point("blocks.{l}.attn.hook_rot_q", HEADS, "q as it meets k: rotated by its position", needs="rotary"),
    Point("blocks.{l}.attn.hook_rot_k", HEADS, "k as it meets q, with those of the cache", needs="rotary"),
    Point("blocks.{l}.attn.hook_attn_scores", SQUARE, "q . k / attn_scale, masked entries -inf", needs="attention"),
    Point("blocks.{l}.attn.hook_pattern", SQUARE, "softmax(attn_scores) over key_pos", needs="attention"),
    Point("blocks.{l}.attn.hook_z", HEADS, "pattern @ v", needs="attention"),
    Point("blocks.{l}.attn.hook_result", PER_HEAD, "z @ W_O, by head", "use_attn_result", "heads out"),
    Point("blocks.{l}.ln1_post.hook_scale", "batch pos 1", f"{SCALE}, of attention's output", needs="norm around"),
    Point("blocks.{l}.ln1_post.hook_normalized", RESID, f"{NORMALIZED}, of attention's output", needs="norm around"),
    Point("blocks.{l}.ln1.hook_scale", "batch pos 1", f"{SCALE}, of attention's output", needs="norms after"),
    Point("blocks.{l}.ln1.hook_normalized", RESID, f"{NORMALIZED}, of attention's output", needs="norms after"),
    Point("blocks.{l}.hook_attn_out", RESID, "sum over heads of z @ W_O, + b_O", needs="attention branch"),
    Point("blocks.{l}.hook_resid_mid", RESID, "resid_pre + attn_out", needs="sequential"),
    Point("blocks.{l}.hook_mlp_in", RESID, "a copy of resid_mid that only the MLP sees", "use_hook_mlp_in", "MLP"),
    Point("blocks.{l}.ln1.hook_scale", "batch pos 1", f"{SCALE}, of resid_mid", needs="norms behind"),
    Point("blocks.{l}.ln1.hook_normalized", RESID, f"{NORMALIZED}, of resid_mid", needs="norms behind"),
    Point("blocks.{l}.ln2.hook_scale", "batch pos 1", SCALE, needs="norm before MLP"),
    Point("blocks.{l}.ln2.hook_normalized", RESID, NORMALIZED, needs="norm before MLP"),
    Point("blocks.{l}.mlp.hook_pre", NEURONS, "n @ W_in + b_in; n @ W_gate where there is a gate", needs="neurons"),
    Point("blocks.{l}.mlp.hook_pre_linear", NEURONS, "n @ W_in + b_in", needs="gate"),
    Point("blocks.{l}.mlp.hook_mid", NEURONS, "what mlp.ln norms, and hook_post is without it", needs="neuron norm"),
    Point("blocks.{l}.mlp.ln.hook_scale", "batch pos 1", f"{SCALE}, of mid", needs="neuron norm"),
    Point("blocks.{l}.mlp.ln.hook_normalized", NEURONS, f"{NORMALIZED}, of mid", needs="neuron norm"),
    Point(
        "blocks.{l}.mlp.hook_post",
        NEURONS,
        "act_fn(pre); times pre_linear where there is a gate; normed where there is a norm",
        needs="neurons",
    ),
    Point(
        "blocks.{l}.mlp.hook_expert_weights",
        ROUTED,
        "weight of each expert in a token's sum",
        needs="experts",
    ),
    Point("blocks.{l}.mlp.hook_expert_indices", "batch*pos chosen", "the experts chosen by a token", needs="experts"),
    Point("blocks.{l}.mlp.experts.{e}.hook_gate", EXPERT, "n @ W_gate, of the tokens sent here", needs="expert gates"),
    Point("blocks.{l}.mlp.experts.{e}.hook_pre", EXPERT, "n @ W_in, of the tokens sent here", needs="expert neurons"),
    Point("blocks.{l}.mlp.experts.{e}.hook_post", EXPERT, "act_fn(gate) * pre", needs="expert neurons"),
    Point("blocks.{l}.ln2_post.hook_scale", "batch pos 1", f"{SCALE}, of the MLP's output", needs="norm around MLP"),
    Point("blocks.{l}.ln2_post.hook_normalized", RESID, f"{NORMALIZED}, of the MLP's output", needs="norm around MLP"),
    Point("blocks.{l}.ln2.hook_scale", "batch pos 1", f"{SCALE}, of the MLP's output", needs="norms after"),
    Point("blocks.{l}.ln2.hook_normalized", RESID, f"{NORMALIZED}, of the MLP's output", needs="norms after"),
    Point("blocks.{l}.hook_mlp_out", RESID, "post @ W_out + b_out", needs="MLP"),
    Point("blocks.{l}.hook_resid_post", RESID, "resid_mid + mlp_out"),
    Point("blocks.{l}.ln2.hook_scale", "batch pos 1", f"{SCALE}, of resid_post", needs="norms behind"),
    Point("blocks.{l}.ln2.hook_normalized", RESID, f"{NORMALIZED}, of resid_post", needs="norms behind"),
    Point(
        "blocks.{l}.hook_normalized_resid_post", RESID, "ln2's output: x entering the next block", needs="norms behind"
    ),
    Point("ln_final.hook_scale", "batch pos 1", SCALE, needs="final norm"),
    Point("ln_final.hook_normalized", RESID, NORMALIZED, needs="final norm"),
    Point("unembed.hook_in", RESID, "what the unembedding reads: ln_final's output"),
    Point("unembed.hook_out", "batch pos d_vocab", "logits = in @ W_U + b_U"),
)

#: Points that libraries put into a model's components themselves (SAELens, circuit-tracer); served where they exist.
ADDED: tuple[Point, ...] = (
    Point("blocks.{l}.mlp.hook_in", RESID, "what the MLP reads: n"),
    Point("blocks.{l}.mlp.hook_out", RESID, "what the MLP returns: mlp_out, or what the norm behind it reads"),
)

#: template -> row.
BY_NAME = {point.name: point for point in POINTS}


def template(name: str) -> str:
    """The table's name of a point: ``blocks.3.hook_resid_pre`` -> ``blocks.{l}.hook_resid_pre``."""
    return _EXPERT.sub(r"\1{e}\2", _LAYER.sub("blocks.{l}.", name))


def layer_of(name: str) -> int | None:
    """The layer that a point is in, by its name; None for those around the layers."""
    return int(name.split(".")[1]) if _LAYER.match(name) else None


def point_of(name: str) -> Point | None:
    """The row that describes ``name``, or None when the table has no such point."""
    return BY_NAME.get(template(name))


#: The features of each layer, or how many layers there are like GPT-2's.
Layers = Sequence[Collection[str]] | int


def named_points(
    layers: Layers, features: Collection[str] = GPT2_FEATURES, n_experts: int = 0
) -> list[tuple[str, Point]]:
    """(name, row) of every point of a model, in firing order.

    Args:
        layers: the features of each layer.
        features: those of what is around the layers.
        n_experts: how many experts a layer with experts has.
    """
    first = next(index for index, point in enumerate(POINTS) if point.in_layer)
    found = [(p.name, p) for p in POINTS[:first] if p.exists_with(features)]
    for index, layer in enumerate([GPT2_LAYER] * layers if isinstance(layers, int) else layers):
        rows = [point for point in POINTS if point.in_layer and point.exists_with(layer)]
        for of_expert, group in groupby(rows, lambda point: "{e}" in point.name):
            together = list(group)
            for expert in map(str, range(n_experts if of_expert else 1)):
                found += [(p.name.replace("{l}", str(index)).replace("{e}", expert), p) for p in together]
    return found + [(p.name, p) for p in POINTS[first:] if not p.in_layer and p.exists_with(features)]


def added_names(n_layers: int) -> list[str]:
    """The names that points may have which libraries add to a model with ``n_layers`` layers."""
    return [point.name.replace("{l}", str(layer)) for layer in range(n_layers) for point in ADDED]


def names(layers: Layers, features: Collection[str] = GPT2_FEATURES, n_experts: int = 0) -> list[str]:
    """The name of every point of such a model, in firing order."""
    return [name for name, _ in named_points(layers, features, n_experts)]


def why_absent(name: str, layers: Sequence[Collection[str]], features: Collection[str]) -> str | None:
    """Why a model without the point ``name`` has none; None if no model has such a point, or not at this place."""
    rows = [point for point in POINTS if point.name == template(name)]
    there: Collection[str] = features
    if rows and rows[0].in_layer:
        layer = int(name.split(".")[1])
        if layer >= len(layers):
            return None
        there = layers[layer]
    lacking = [point.needs for point in rows if point.needs is not None and point.needs not in there]
    return ABSENT[lacking[0]] if lacking else None
