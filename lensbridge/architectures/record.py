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
    that nnsight adds, which shift between versions.
    """

    call: str = "attention_interface"
    operation: str = "softmax"


@dataclass(frozen=True)
class Block:
    """The roles inside one layer, as paths below the layer."""

    ln1: str
    attn: str
    qkv: str
    o: str
    ln2: str
    mlp: str
    mlp_in: str
    mlp_out: str
    #: How ``qkv`` holds the three projections along its output axis.
    qkv_layout: Literal["q k v"] = "q k v"
    softmax: Softmax = Softmax()


@dataclass(frozen=True)
class Architecture:
    """One family: paths from the root of the HF model, and how its config fills a HookedTransformerConfig."""

    model_type: str
    hf_class: str
    embed: str
    pos_embed: str
    layers: str
    ln_final: str
    unembed: str
    block: Block
    norm: Literal["LN"] = "LN"
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
        """The path of a role of `Block` in one layer."""
        return f"{self.layers}.{index}.{getattr(self.block, role)}"
