"""How do the parts of a transformer become one?

`NativeBody` builds embedding, blocks, final norm and unembedding under TransformerLens' names and runs them, whole or
from one layer to another. Its hook points are modules on the way of the values, so that hooks run by themselves in any
call; who listens, and under which names, is for the class that the body is mixed into.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..components import Embed, PosEmbed, RMSNorm, RMSNormPre, TransformerBlock, Unembed
from ..components.transformer_block import norm_for
from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ..utilities.activation_functions import apply_softcap
from ..utilities.typed_module_list import TypedModuleList

Stream = Float[Tensor, "batch pos d_model"]
Mask = Int[Tensor, "batch offset_pos"]


class Entries(Protocol):
    """Keys and values of earlier tokens: one entry per layer, as in a TransformerLensKeyValueCache."""

    def __getitem__(self, layer: int, /) -> Any: ...


class Embedded(NamedTuple):
    """The residual stream before the first block, and what shortformer models add to what queries and keys read."""

    residual: Stream
    shortformer_pos_embed: Stream | None


#: Positional embeddings that are vectors added to the stream or to what attention reads.
LEARNED_POSITIONS = ("standard", "shortformer")
POSITIONS = (*LEARNED_POSITIONS, "rotary", "alibi")


class NativeBody:
    """The modules of a transformer described by a HookedTransformerConfig, and the way through them."""

    cfg: HookedTransformerConfig
    embed: Embed
    hook_embed: HookPoint
    pos_embed: PosEmbed
    hook_pos_embed: HookPoint
    hook_tokens: HookPoint
    blocks: TypedModuleList[TransformerBlock]
    ln_final: nn.Module
    unembed: Unembed

    def build(self, cfg: HookedTransformerConfig) -> None:
        """Make the modules, in the order in which TransformerLens lists them; the weights are not drawn.

        Raises:
            AssertionError: the size of the vocabulary is not known.
            ValueError: an option of the config is unknown, or its sizes do not fit together.
            IndexError: ``attn_types`` are fewer than layers.
        """
        if cfg.d_vocab == -1:
            raise AssertionError("d_vocab is not set: give it, or a tokenizer to take it from")
        if cfg.positional_embedding_type not in POSITIONS:
            raise ValueError(
                f"positional_embedding_type={cfg.positional_embedding_type!r}: one of {', '.join(map(repr, POSITIONS))}"
            )
        _check_sizes(cfg)
        self.cfg = cfg
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()
        if cfg.positional_embedding_type != "rotary":
            # ALiBi has no use for it; TransformerLens makes one all the same, and state dicts have it.
            self.pos_embed = PosEmbed(cfg)
            self.hook_pos_embed = HookPoint()
        if cfg.use_hook_tokens:
            self.hook_tokens = HookPoint()
        self.blocks = TypedModuleList([TransformerBlock(cfg, layer) for layer in range(cfg.n_layers)])
        if cfg.normalization_type is not None:
            self.ln_final = final_norm(cfg)
        self.unembed = Unembed(cfg)

    def hooked_tokens(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Token ids as hooks on them leave them, where the model has such a hook point."""
        return self.hook_tokens(tokens) if self.cfg.use_hook_tokens else tokens

    def embedded(
        self,
        tokens: Int[Tensor, "batch pos"] | None,
        past_length: int = 0,
        attention_mask: Mask | None = None,
        embeds: Stream | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Embedded:
        """The residual stream before the first block, from tokens or from embeddings in their place.

        Args:
            tokens: token ids.
            past_length: number of tokens in a key-value cache.
            attention_mask: 1 for tokens to attend to, 0 for padding, those in the cache included.
            embeds: what the embedding would have given.
            position_ids: positions for learned positional embeddings; None counts attended tokens.
        """
        if embeds is None:
            assert tokens is not None
            embeds = self.embed(tokens)
        embeds = self.hook_embed(embeds)
        if self.cfg.positional_embedding_type not in LEARNED_POSITIONS:
            return Embedded(embeds, None)
        if position_ids is None:
            # Of embeddings that are given, only the shape is looked at.
            positions = self.pos_embed(embeds[..., 0] if tokens is None else tokens, past_length, attention_mask)
        else:
            positions = self.pos_embed.at(position_ids)
        positions = self.hook_pos_embed(positions)
        if self.cfg.positional_embedding_type == "shortformer":
            return Embedded(embeds, positions)
        return Embedded(embeds + positions, None)

    def through_blocks(
        self,
        residual: Stream,
        start: int = 0,
        stop: int | None = None,
        shortformer_pos_embed: Stream | None = None,
        past_kv_cache: Entries | None = None,
        attention_mask: Mask | None = None,
    ) -> Stream:
        """The residual stream after the blocks from ``start`` up to ``stop``, not including it (as in a slice)."""
        for layer in range(*slice(start, stop).indices(len(self.blocks))):
            entry = None if past_kv_cache is None else past_kv_cache[layer]
            # By keyword, as TransformerLens has it: a module of the user's may stand here.
            residual = self.blocks[layer](
                residual,
                past_kv_cache_entry=entry,
                shortformer_pos_embed=shortformer_pos_embed,
                attention_mask=attention_mask,
            )
        return residual

    def normed(self, residual: Stream) -> Stream:
        """The residual stream after the final norm, if there is one."""
        return residual if self.cfg.normalization_type is None else self.ln_final(residual)

    def logits(self, normed: Stream) -> Float[Tensor, "batch pos d_vocab_out"]:
        """The logits for the stream after the final norm, with the config's softcap."""
        return apply_softcap(self.unembed(normed), self.cfg.output_logits_soft_cap)


def _check_sizes(cfg: HookedTransformerConfig) -> None:
    """Refuse numbers that no forward pass could work with, or only with values that mean nothing."""
    groups = cfg.n_key_value_heads
    if groups is not None and (groups < 1 or cfg.n_heads % groups):
        raise ValueError(f"n_key_value_heads={groups} does not divide n_heads={cfg.n_heads}")
    if cfg.positional_embedding_type == "rotary":
        rotated = cfg.d_head if cfg.rotary_dim is None else cfg.rotary_dim
        if rotated % 2 or not 0 <= rotated <= cfg.d_head:
            raise ValueError(f"rotary_dim={rotated}: dimensions are rotated in pairs, of {cfg.d_head} in a head")
    if cfg.use_local_attn and cfg.attn_types is not None and len(cfg.attn_types) < cfg.n_layers:
        raise IndexError(f"attn_types names {len(cfg.attn_types)} layers of n_layers={cfg.n_layers}")


def final_norm(cfg: HookedTransformerConfig) -> nn.Module:
    """The norm before the unembedding; with ``final_rms`` an RMS norm where the others are layer norms.

    Raises:
        ValueError: the ``normalization_type`` is unknown.
    """
    if cfg.final_rms and cfg.normalization_type in ("LN", "LNPre"):
        return RMSNorm(cfg) if cfg.normalization_type == "LN" else RMSNormPre(cfg)
    return norm_for(cfg)
