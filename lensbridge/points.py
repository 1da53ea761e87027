"""Which hook points exist, and what does each one mean?

One row of data per TransformerLens 3.9.0 name. Everything that needs to know about a point (the components that carry
it, the engine that serves it, error messages, docs and tests) reads this table; nothing else lists hook names.

Rows stand in the order in which TransformerLens fires them. ``{l}`` is a layer. Symbols of the equations: ``x`` is the
residual stream, ``n`` its normalised form, and a weight stands for its TransformerLens view in the active basis.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

RESID = "batch pos d_model"
PER_HEAD = "batch pos head d_model"
HEADS = "batch pos head d_head"
SQUARE = "batch head query_pos key_pos"
NEURONS = "batch pos d_mlp"
SCALE = "sqrt(mean((x - mean x)^2) + eps)"
NORMALIZED = "(x - mean x) / scale"

#: The features of GPT-2: what a row ``needs`` is one of these or of another architecture's.
GPT2_FEATURES = frozenset({"learned positions", "norms before", "sequential"})


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
    Point("blocks.{l}.hook_resid_pre", RESID, "x entering the block"),
    Point("blocks.{l}.hook_attn_in", PER_HEAD, "x, one copy per head", "use_attn_in"),
    Point("blocks.{l}.hook_q_input", PER_HEAD, "x, one copy per query head", "use_split_qkv_input"),
    Point("blocks.{l}.hook_k_input", PER_HEAD, "x, one copy per key head", "use_split_qkv_input"),
    Point("blocks.{l}.hook_v_input", PER_HEAD, "x, one copy per value head", "use_split_qkv_input"),
    Point("blocks.{l}.ln1.hook_scale", "batch pos 1", f"{SCALE}; fires for q, k and v", needs="norms before"),
    Point("blocks.{l}.ln1.hook_normalized", RESID, f"{NORMALIZED}; fires for q, k and v", needs="norms before"),
    Point("blocks.{l}.attn.hook_q", HEADS, "n @ W_Q + b_Q"),
    Point("blocks.{l}.attn.hook_k", HEADS, "n @ W_K + b_K"),
    Point("blocks.{l}.attn.hook_v", HEADS, "n @ W_V + b_V"),
    Point("blocks.{l}.attn.q_norm.hook_scale", "... 1", f"{SCALE}, of q", needs="qk norm"),
    Point("blocks.{l}.attn.q_norm.hook_normalized", "... d_head", f"{NORMALIZED}, of q", needs="qk norm"),
    Point("blocks.{l}.attn.k_norm.hook_scale", "... 1", f"{SCALE}, of k", needs="qk norm"),
    Point("blocks.{l}.attn.k_norm.hook_normalized", "... d_head", f"{NORMALIZED}, of k", needs="qk norm"),
    Point("blocks.{l}.attn.hook_rot_q", HEADS, "q, rotated by its position", needs="rotary"),
    Point("blocks.{l}.attn.hook_rot_k", HEADS, "k, rotated by its position, with those of the cache", needs="rotary"),
    Point("blocks.{l}.attn.hook_attn_scores", SQUARE, "q . k / attn_scale, masked entries -inf"),
    Point("blocks.{l}.attn.hook_pattern", SQUARE, "softmax(attn_scores) over key_pos"),
    Point("blocks.{l}.attn.hook_z", HEADS, "pattern @ v"),
    Point("blocks.{l}.attn.hook_result", PER_HEAD, "z @ W_O, by head", "use_attn_result"),
    Point("blocks.{l}.ln1_post.hook_scale", "batch pos 1", f"{SCALE}, of attention's output", needs="norms around"),
    Point("blocks.{l}.ln1_post.hook_normalized", RESID, f"{NORMALIZED}, of attention's output", needs="norms around"),
    Point("blocks.{l}.ln1.hook_scale", "batch pos 1", f"{SCALE}, of attention's output", needs="norms after"),
    Point("blocks.{l}.ln1.hook_normalized", RESID, f"{NORMALIZED}, of attention's output", needs="norms after"),
    Point("blocks.{l}.hook_attn_out", RESID, "sum over heads of z @ W_O, + b_O"),
    Point("blocks.{l}.hook_resid_mid", RESID, "resid_pre + attn_out", needs="sequential"),
    Point("blocks.{l}.hook_mlp_in", RESID, "a copy of resid_mid that only the MLP sees", "use_hook_mlp_in"),
    Point("blocks.{l}.ln2.hook_scale", "batch pos 1", SCALE, needs="norms before"),
    Point("blocks.{l}.ln2.hook_normalized", RESID, NORMALIZED, needs="norms before"),
    Point("blocks.{l}.mlp.hook_pre", NEURONS, "n @ W_in + b_in; n @ W_gate where there is a gate"),
    Point("blocks.{l}.mlp.hook_pre_linear", NEURONS, "n @ W_in + b_in", needs="gate"),
    Point("blocks.{l}.mlp.hook_post", NEURONS, "act_fn(pre); times pre_linear where there is a gate"),
    Point("blocks.{l}.ln2_post.hook_scale", "batch pos 1", f"{SCALE}, of the MLP's output", needs="norms around"),
    Point("blocks.{l}.ln2_post.hook_normalized", RESID, f"{NORMALIZED}, of the MLP's output", needs="norms around"),
    Point("blocks.{l}.ln2.hook_scale", "batch pos 1", f"{SCALE}, of the MLP's output", needs="norms after"),
    Point("blocks.{l}.ln2.hook_normalized", RESID, f"{NORMALIZED}, of the MLP's output", needs="norms after"),
    Point("blocks.{l}.hook_mlp_out", RESID, "post @ W_out + b_out"),
    Point("blocks.{l}.hook_resid_post", RESID, "resid_mid + mlp_out"),
    Point("ln_final.hook_scale", "batch pos 1", SCALE),
    Point("ln_final.hook_normalized", RESID, NORMALIZED),
    Point("unembed.hook_in", RESID, "what the unembedding reads: ln_final's output"),
    Point("unembed.hook_out", "batch pos d_vocab", "logits = in @ W_U + b_U"),
)

#: Points that libraries put into a model's components themselves (SAELens does); served where they exist.
ADDED: tuple[Point, ...] = (Point("blocks.{l}.mlp.hook_in", RESID, "what the MLP reads: n"),)

#: template -> row.
BY_NAME = {point.name: point for point in POINTS}


def template(name: str) -> str:
    """The table's name of a point: ``blocks.3.hook_resid_pre`` -> ``blocks.{l}.hook_resid_pre``."""
    parts = name.split(".")
    if len(parts) > 1 and parts[0] == "blocks" and parts[1].isdigit():
        parts[1] = "{l}"
    return ".".join(parts)


def point_of(name: str) -> Point | None:
    """The row that describes ``name``, or None when the table has no such point."""
    return BY_NAME.get(template(name))


def named_points(n_layers: int, features: Collection[str] = GPT2_FEATURES) -> list[tuple[str, Point]]:
    """(name, row) of every point of a model with ``n_layers`` layers and these features, in firing order."""
    there = [p for p in POINTS if p.needs is None or p.needs in features]
    block = [p for p in there if p.in_layer]
    before = there[: there.index(block[0])]
    layers = [(p.name.replace("{l}", str(layer)), p) for layer in range(n_layers) for p in block]
    after = [p for p in there if not p.in_layer and p not in before]
    return [*((p.name, p) for p in before), *layers, *((p.name, p) for p in after)]


def added_names(n_layers: int) -> list[str]:
    """The names that points may have which libraries add to a model with ``n_layers`` layers."""
    return [point.name.replace("{l}", str(layer)) for layer in range(n_layers) for point in ADDED]


def names(n_layers: int, features: Collection[str] = GPT2_FEATURES) -> list[str]:
    """The name of every point of such a model, in firing order."""
    return [name for name, _ in named_points(n_layers, features)]
