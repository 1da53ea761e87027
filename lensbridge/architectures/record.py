"""What has to be known of a model family to serve TransformerLens' points on it?

Where the roles live in the HuggingFace module tree, how the query, key and value projections are laid out, and what the
config calls things. A record is data: nothing here or in the family files runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Softmax:
    """Where the attention weights are made: a call inside the attention's forward, and the softmax inside that call.

    Both are looked up by what they are called in the source (``attention_interface``, ``softmax``), not by the numbers
    that nnsight adds, which shift between versions. Without a ``call`` the softmax is in the forward itself.
    """

    call: str | None = "attention_interface"
    operation: str = "softmax"


@dataclass(frozen=True)
class Block:
    """The roles inside one layer, as paths below the layer; None for a role that there is none of.

    The defaults are Llama's, so that most families say little.
    """

    ln1: str | None = "input_layernorm"
    attn: str = "self_attn"
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    #: One projection in the place of ``q``, ``k`` and ``v``, and how its output axis holds them: one after the other
    #: (``parts``), or for each head its query, key and value (``heads``).
    qkv: str | None = None
    qkv_layout: Literal["parts", "heads"] = "parts"
    #: Norms of queries and keys, over each head or over all of them.
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    #: Whether heads come before positions in what these norms are given.
    qk_norm_heads_first: bool = False
    o: str = "self_attn.o_proj"
    #: A norm of what attention writes, before it is added.
    ln1_post: str | None = None
    ln2: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    #: The projection that goes through the activation function, and the one it is multiplied with.
    gate: str | None = "mlp.gate_proj"
    mlp_in: str = "mlp.up_proj"
    #: Whether ``mlp_in`` holds both, the one that goes through the activation function first.
    gate_up: bool = False
    mlp_out: str = "mlp.down_proj"
    ln2_post: str | None = None
    #: The modules whose output is added to the residual stream, where these are not ``ln1_post`` or ``attn`` and
    #: ``ln2_post`` or ``mlp``.
    attn_branch: str | None = None
    mlp_branch: str | None = None
    #: Whether batch and position are one axis from the norm before the MLP to the MLP's output.
    flat_mlp: bool = False
    #: Whether attention and MLP read the same residual stream, and are added together.
    parallel: bool = False
    #: Whether queries and keys are rotated (Su et al. 2021) before they meet, and which argument of the function that
    #: attention calls on them is the query; the key is the next.
    rotary: bool = True
    query_argument: int = 1
    softmax: Softmax = Softmax()


@dataclass(frozen=True)
class Architecture:
    """One family: paths from the root of the HF model, and how its config fills a HookedTransformerConfig."""

    model_type: str
    hf_class: str
    embed: str = "model.embed_tokens"
    #: The learned positions that are added to the token embedding, and how many of their rows come before position 0.
    pos_embed: str | None = None
    pos_offset: int = 0
    #: The attribute of the embedding that holds a factor on what it returns.
    embed_scale: str | None = None
    #: A norm between the embedding and the first layer.
    embed_norm: str | None = None
    layers: str = "model.layers"
    ln_final: str = "model.norm"
    unembed: str = "lm_head"
    block: Block = Block()
    #: Whether the model does something with what its head returns (a cap, a factor) before these are logits.
    after_unembed: bool = False
    norm: Literal["LN", "RMS"] = "RMS"
    #: The norms' epsilon, where it is written in their code instead of an attribute.
    norm_eps: float | None = None
    #: What is added to the gain of a norm as it is stored.
    gain_offset: float = 0.0
    #: TransformerLens config field -> attribute of the HF config.
    config: Mapping[str, str] = field(default_factory=dict)
    #: TransformerLens config field -> value that all models of the family share.
    constants: Mapping[str, Any] = field(default_factory=dict)
    #: HF config attribute that is true -> changes to ``block`` it brings.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: HF config attribute -> why a model that sets it is refused.
    refused: Mapping[str, str] = field(default_factory=dict)

    def for_config(self, hf_config: Any) -> Architecture:
        """The record with the variants that ``hf_config`` selects.

        Raises:
            UnsupportedModelError: if the config sets an attribute that the record refuses.
        """
        for attribute, reason in self.refused.items():
            if getattr(hf_config, attribute, False):
                raise UnsupportedModelError(f"{self.model_type} with {attribute}=True is not supported: {reason}")
        changes: dict[str, Any] = {}
        for attribute, change in self.variants.items():
            if getattr(hf_config, attribute, False):
                changes |= change
        return replace(self, block=replace(self.block, **changes)) if changes else self

    def layer(self, index: int) -> str:
        """The path of one layer."""
        return f"{self.layers}.{index}"

    def in_layer(self, index: int, role: str) -> str:
        """The path of a role of `Block` in one layer.

        Raises:
            LookupError: if the family has no such role.
        """
        path = getattr(self.block, role)
        if path is None:
            raise LookupError(f"{self.model_type} has no {role!r} in its layers")
        return f"{self.layers}.{index}.{path}" if path else f"{self.layers}.{index}"

    @property
    def features(self) -> frozenset[str]:
        """What the table of hook points (`points.py`) asks of an architecture."""
        block = self.block
        around = block.ln1_post is not None
        found = {
            "embedding norm": self.embed_norm is not None,
            "learned positions": self.pos_embed is not None,
            "norms before": block.ln1 is not None,
            "norms around": around and block.ln1 is not None,
            "norms after": around and block.ln1 is None,
            "sequential": not block.parallel,
            "rotary": block.rotary,
            "qk norm": block.q_norm is not None,
            "gate": block.gate_up or block.gate is not None,
        }
        return frozenset(name for name, there in found.items() if there)

    @property
    def post_norms(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(role, TransformerLens' name) of the norms of what attention and MLP write."""
        if self.block.ln1 is None:
            return ("ln1_post", "ln1"), ("ln2_post", "ln2")
        return ("ln1_post", "ln1_post"), ("ln2_post", "ln2_post")

    @property
    def branches(self) -> tuple[str, str]:
        """The paths, below a layer, of the modules whose outputs attention and MLP add to the residual stream."""
        block = self.block
        return (block.attn_branch or block.ln1_post or block.attn, block.mlp_branch or block.ln2_post or block.mlp)
