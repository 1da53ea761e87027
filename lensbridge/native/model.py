"""What is the HuggingFace model of a HookedTransformerConfig?

A `PreTrainedModel` whose modules are TransformerLens' (`blocks.0.attn.W_Q`, ...), so that its state dict is one that
TransformerLens reads and writes. It saves, loads, trains and generates like any model of transformers, and its hook
points fire in every forward pass.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache import TransformerLensKeyValueCache
from ..components.abstract_attention import CONSTANTS, AbstractAttention
from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from ..utilities.tensors import get_offset_position_ids
from .body import LEARNED_POSITIONS, Entries, NativeBody
from .config import NativeConfig, fields_of
from .hf_cache import HFEntries
from .initialisation import draw_for, init_weights, is_drawn


class NativePreTrainedModel(PreTrainedModel):
    """What transformers has to know about native models: their config, and how missing weights are made."""

    config_class = NativeConfig
    config: NativeConfig
    cfg: HookedTransformerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["TransformerBlock"]
    # Computed from the config; old checkpoints have them, in sizes of their own.
    _keys_to_ignore_on_load_missing = [rf"\.({'|'.join(CONSTANTS)})$"]
    _keys_to_ignore_on_load_unexpected = [rf"\.({'|'.join(CONSTANTS)})$"]

    #: Whether all weights were drawn when the model was made; false where `from_pretrained` will fill them.
    _is_drawn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Make what a checkpoint lacks: constants, and parameters as in a new model."""
        if self._is_drawn:
            return
        if isinstance(module, AbstractAttention):
            module.reset_constants()
        draw = draw_for(self.cfg)
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if is_drawn(name):
                draw(name, parameter)
            else:
                hf_init.constant_(parameter, 1.0 if name == "w" else 0.0)


class NativeForCausalLM(NativeBody, NativePreTrainedModel, GenerationMixin):
    """A transformer described by a HookedTransformerConfig, as a model of transformers.

    Args:
        config: the HuggingFace config.
        cfg: the HookedTransformerConfig that the modules share and that setters such as ``set_use_attn_result`` change;
            None for a new one made from ``config``.

    Weights are drawn as ``cfg.init_mode`` says, unless ``cfg.init_weights`` is off, when they are whatever was in the
    memory they got.
    """

    def __init__(self, config: NativeConfig, cfg: HookedTransformerConfig | None = None) -> None:
        PreTrainedModel.__init__(self, config)
        self.build(config.to_cfg() if cfg is None else cfg)
        if not self.embed.W_E.is_meta:
            if self.cfg.init_weights:
                init_weights(self, self.cfg)
            self._is_drawn = True
        self.post_init()
        layers = range(self.cfg.n_layers)
        self._keys_to_ignore_on_save = {f"blocks.{layer}.attn.{name}" for layer in layers for name in CONSTANTS}

    @classmethod
    def from_cfg(cls, cfg: HookedTransformerConfig) -> NativeForCausalLM:
        """A new model on the CPU whose modules share ``cfg``."""
        return cls(NativeConfig.from_cfg(cfg), cfg)

    # --- what transformers asks for -----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The module that embeds tokens."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """The module that gives logits."""
        return self.unembed

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            UnsupportedModelError: (a ValueError) always.
        """
        raise UnsupportedModelError(
            "a native model has the vocabulary of its config: make one with another d_vocab, and copy W_E, W_U and b_U "
            "for the tokens that both have"
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the config is saved as it is now, and weights that were tied by hand one by one."""
        self.config.hooked_transformer = fields_of(self.cfg)
        state_dict = apart(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # The modules look at cfg.dtype to know where they compute in float32.
        applied = super()._apply(*args, **kwargs)
        self.cfg.dtype = self.embed.W_E.dtype
        return applied

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        past_key_values: Cache | TransformerLensKeyValueCache | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and what else was asked for.

        Args:
            input_ids: token ids; or give ``inputs_embeds`` in their place.
            attention_mask: 1 for tokens to attend to, 0 for padding, those in the cache included; positions count 1s.
            position_ids: other positions, for learned positional embeddings.
            past_key_values: keys and values of earlier tokens, which grow: of either library's kind (a DynamicCache).
            inputs_embeds: embeddings in place of tokens.
            labels: token ids for the loss; -100 does not count. Label i is compared with the prediction before it.
            use_cache: make a cache if none is given.
            output_hidden_states: also return the residual stream before each block, and after the final norm.
            logits_to_keep: give the logits of this many last positions only; 0 for all.
            return_dict: False for a tuple.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``; a mask that is not ``[batch, pos]``;
                positions that the model has no place for; an unknown kind of cache.
        """
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, pos], not {list(attention_mask.shape)}")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        entries, past = entries_of(past_key_values)
        if position_ids is not None:
            position_ids = self._own_positions(position_ids, past, source.shape[1], attention_mask)
        if input_ids is not None:
            input_ids = self.hooked_tokens(input_ids)
        residual, pos_embed = self.embedded(input_ids, past, attention_mask, inputs_embeds, position_ids)
        streams = []
        if output_hidden_states:
            for layer in range(self.cfg.n_layers):
                streams.append(residual)
                residual = self.through_blocks(residual, layer, layer + 1, pos_embed, entries, attention_mask)
        else:
            residual = self.through_blocks(residual, 0, None, pos_embed, entries, attention_mask)
        normed = self.normed(residual)
        logits = self.logits(normed[:, -logits_to_keep:] if logits_to_keep else normed)
        # The annotations of the class know neither plain tensors nor TransformerLens' cache.
        given: dict[str, Any] = {"logits": logits, "past_key_values": past_key_values}
        if labels is not None:
            given["loss"] = self.loss_function(logits=logits, labels=labels, vocab_size=self.cfg.d_vocab_out)
        if output_hidden_states:
            given["hidden_states"] = (*streams, normed)
        output = CausalLMOutputWithPast(**given)
        return output.to_tuple() if return_dict is False else output

    def _own_positions(self, given: Tensor, past: int, length: int, mask: Tensor | None) -> Tensor | None:
        """The positions to look up in a learned embedding; None where those given are the model's own.

        Raises:
            ValueError: they are not, and there is no learned embedding to look them up in.
        """
        if mask is None:
            own = torch.arange(past, past + length, device=given.device).expand_as(given)
        else:
            own = get_offset_position_ids(past, mask)
        attended = torch.ones_like(own, dtype=torch.bool) if mask is None else mask[:, past:].bool()
        if own.shape == given.shape and torch.equal(own[attended], given[attended]):
            return None
        if self.cfg.positional_embedding_type not in LEARNED_POSITIONS:
            raise ValueError(
                f"position_ids other than the count of attended tokens: a model with "
                f"{self.cfg.positional_embedding_type} positions has no place for them"
            )
        return given


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with a copy of each weight that lies in the memory of one before it: files have no ties."""
    seen: set[int] = set()
    out = {}
    for name, value in state.items():
        memory = value.untyped_storage().data_ptr()
        out[name] = value.clone(memory_format=torch.contiguous_format) if memory in seen else value
        seen.add(memory)
    return out


def entries_of(cache: Cache | TransformerLensKeyValueCache | None) -> tuple[Entries | None, int]:
    """A cache of either kind as blocks want it, and the number of tokens in it."""
    if cache is None:
        return None, 0
    if isinstance(cache, TransformerLensKeyValueCache):
        return cache, cache[0].past_keys.shape[1]
    return HFEntries(cache), cache.get_seq_length()


AutoConfig.register(NativeConfig.model_type, NativeConfig, exist_ok=True)
AutoModelForCausalLM.register(NativeConfig, NativeForCausalLM, exist_ok=True)
