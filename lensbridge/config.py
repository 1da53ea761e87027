"""What a model looks like: sizes, norms, attention and loading options, as one record.

Two dataclasses share the work, as in TransformerLens 3.9.0: :class:`TransformerLensConfig` (`base_config.py`) holds
what every component asks for, :class:`HookedTransformerConfig` adds the rest. Field names, their order and their
defaults are part of the API. The same record serves a model written by hand and a model read off a HuggingFace config;
in the second case it describes a forward that HuggingFace computes, so ``act_fn`` may then name any activation that
transformers knows.

A field that says "not set" (-1, -1.0 or None) is filled in after construction; the comment at the field tells by what.
"""

from __future__ import annotations

import inspect
import math
import pprint
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lensbridge.base_config import TransformerLensConfig as TransformerLensConfig
from lensbridge.bridge_config import TransformerBridgeConfig as TransformerBridgeConfig
from lensbridge.errors import UnknownArgumentError, near_misses
from lensbridge.utilities.activation_functions import SOFTCAP_DISABLED, SUPPORTED_ACTIVATIONS
from lensbridge.utilities.devices import warn_if_mps


@dataclass
class HookedTransformerConfig(TransformerLensConfig):
    """Everything there is to say about a HookedTransformer (TransformerLens' class of the same name).

    ``d_model``, ``d_head``, ``n_layers`` and ``n_ctx`` are needed; everything else has a default. A ``seed`` is set at
    once, for Python, numpy and torch alike.

    Raises:
        ValueError: ``n_heads`` is not given and ``d_head`` does not divide ``d_model``.
        AssertionError: ``act_fn`` is unknown; local attention without ``window_size`` and ``attn_types``; one of
            ``num_experts`` and ``experts_per_token`` without the other; more devices asked for than there are;
            ``default_prepend_bos`` that is neither True nor False.
    """

    #: The name under which the model was asked for.
    model_name: str = "custom"
    #: Whether scores are divided by ``attn_scale``.
    use_attn_scale: bool = True
    #: What scores are divided by; -1.0: ``sqrt(d_head)``, and it stays -1.0 without ``use_attn_scale``.
    attn_scale: float = -1.0
    #: Whether ``hook_mlp_in`` exists.
    use_hook_mlp_in: bool = False
    #: Whether ``hook_attn_in`` exists.
    use_attn_in: bool = False
    #: Whether queries and keys are RMS-normed before the scores (Gemma 3, Qwen 3).
    use_qk_norm: bool = False
    #: Queries, keys and values are clamped to plus or minus this (OLMo); None: not at all.
    clip_qkv: float | None = None
    #: Whether queries past ``train_seq_length`` are scaled by a logarithm of their position (Qwen 1).
    use_logn_attn: bool = False
    #: Length that the model was trained at, where something depends on it.
    train_seq_length: int | None = None
    #: Whether the rotary base grows with inputs longer than ``train_seq_length`` (Qwen 1).
    use_dynamic_ntk_rope: bool = False
    #: Whether some layers see only the last ``window_size`` tokens; ``attn_types`` says which.
    use_local_attn: bool = False
    #: Whether keys and values are repeated to ``n_heads`` before their hooks.
    ungroup_grouped_query_attention: bool = False
    #: The HuggingFace class that the model was read from; None for a custom config.
    original_architecture: str | None = None
    #: Whether the weights are a training checkpoint, and which one.
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    #: "step" or "token": what ``checkpoint_value`` counts.
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    #: The tokenizer to load for a custom config.
    tokenizer_name: str | None = None
    #: Number of tokens that a local attention layer sees.
    window_size: int | None = None
    #: "global" or "local" for each layer.
    attn_types: list[str] | None = None
    #: How a custom model is initialised: "gpt2", or "xavier" / "kaiming" with "_uniform" or "_normal".
    init_mode: str = "gpt2"
    #: Number of devices that the layers are spread over.
    n_devices: int = 1
    #: "causal" or "bidirectional".
    attention_dir: str = "causal"
    #: Seed for every source of randomness; None: left alone.
    seed: int | None = None
    #: Standard deviation of the initial weights, or the gain for the other init modes;
    #: negative: ``0.8 / sqrt(d_model)`` for "gpt2", 1.0 otherwise.
    initializer_range: float = -1.0
    #: Whether a custom model's weights are initialised at all.
    init_weights: bool = True
    #: Whether scores of layer l are also divided by ``l + 1`` (Mistral's GPT-2 models of Stanford).
    scale_attn_by_inverse_layer_idx: bool = False
    #: Size of the output vocabulary; -1: ``d_vocab``.
    d_vocab_out: int = -1
    #: Whether attention and MLP both read the start of the block (GPT-J).
    parallel_attn_mlp: bool = False
    #: Number of rotated dimensions per head; None: ``d_head`` for rotary models.
    rotary_dim: int | None = None
    #: Number of weights in attention and MLP matrices, without embeddings, biases and norms. Always computed.
    n_params: int | None = None
    #: Whether ``hook_tokens`` exists.
    use_hook_tokens: bool = False
    #: Whether the tokenizer adds a BOS token by itself; set together with the tokenizer.
    tokenizer_prepends_bos: bool | None = None
    #: Whether embeddings are normed (Bloom).
    post_embedding_ln: bool = False
    #: Base of the rotary angles, and of those in local layers where they differ (Gemma 3).
    rotary_base: float | int = 10000
    rotary_base_local: float | int | None = None
    #: Positions are divided by this before they become angles, in global layers.
    rotary_scaling_factor: float = 1.0
    #: Whether code from the model's repository may run.
    trust_remote_code: bool = False
    #: Whether rotation pairs neighbouring dimensions (GPT-J) instead of the two halves (NeoX).
    rotary_adjacent_pairs: bool = False
    #: Whether the weights are quantized to 4 bits with bitsandbytes.
    load_in_4bit: bool = False
    #: The ``quant_method`` that the checkpoint declares.
    quantization_method: str | None = None
    #: Reach and number of buckets of a relative position bias (T5).
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    #: First token of a decoder in an encoder-decoder model.
    decoder_start_token_id: int | None = None
    #: Whether embedding and unembedding are one matrix.
    tie_word_embeddings: bool = False
    #: Whether attention and MLP outputs are normed before they are added (Gemma 2).
    use_normalization_before_and_after: bool = False
    #: Scores and logits are squashed to plus or minus this by a tanh (Gemma 2); not positive: not at all.
    attn_scores_soft_cap: float = SOFTCAP_DISABLED
    output_logits_soft_cap: float = SOFTCAP_DISABLED
    #: Rotary frequencies interpolated by parts (Llama 3.1; section 3.2 of https://arxiv.org/abs/2309.00071).
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    #: Rotary frequencies after YaRN (OLMo 3, GPT-OSS; https://arxiv.org/abs/2309.00071).
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    #: Whether the bounds of YaRN's ramp are rounded to whole dimensions (not in GPT-OSS).
    yarn_truncate: bool = True
    #: Whether local layers keep plain rotary angles (OLMo 3).
    yarn_global_attn_only: bool = False
    #: Whether each head has a learned logit that takes part in the softmax and is then dropped (GPT-OSS).
    use_attention_sinks: bool = False
    #: Whether the weights of the chosen experts are rescaled to sum to one.
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None:
            self.set_seed_everywhere(self.seed)
        self._check_choices()
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if self.init_mode == "gpt2" else 1.0
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        self.n_params = self._count_params()

    def _check_choices(self) -> None:
        """Refuse what no model can be built from; AssertionError is what TransformerLens raises for each of these."""
        if self.use_local_attn:
            for name in ("window_size", "attn_types"):
                if getattr(self, name) is None:
                    raise AssertionError(f"{name} must be given when use_local_attn is True.")
        if not self.attn_only:
            self._check_activation()
        for given, needed in (("num_experts", "experts_per_token"), ("experts_per_token", "num_experts")):
            if getattr(self, given) is not None and getattr(self, needed) is None:
                raise AssertionError(f"{needed} must be given when {given} is ({getattr(self, given)}).")
        if self.device is not None:
            warn_if_mps(self.device)
        if self.n_devices > 1 and torch.cuda.device_count() < self.n_devices:
            raise AssertionError(f"n_devices={self.n_devices}, but there are {torch.cuda.device_count()} CUDA devices.")
        if self.default_prepend_bos not in (True, False):
            raise AssertionError(f"default_prepend_bos must be True or False, not {self.default_prepend_bos!r}.")

    def _check_activation(self) -> None:
        if self.act_fn in SUPPORTED_ACTIVATIONS:
            return
        if self.original_architecture is not None:
            # Here rather than above: importing it costs more than the rest of this module.
            from transformers.activations import ACT2FN

            if self.act_fn in ACT2FN:
                return
        raise AssertionError(
            f"act_fn={self.act_fn!r} is not an activation function. Choose one of {sorted(SUPPORTED_ACTIVATIONS)}, "
            "or set attn_only=True for a model without MLPs."
        )

    def _count_params(self) -> int:
        """Weights in the attention and MLP matrices, as the scaling laws paper counts (arXiv 2001.08361)."""
        per_layer = 4 * self.d_model * self.d_head * self.n_heads
        if not self.attn_only:
            assert self.d_mlp is not None
            mlp = self.d_model * self.d_mlp * (3 if self.gated_mlp else 2)
            if self.num_experts:
                # Every expert also has a row in the router.
                mlp = (mlp + self.d_model) * self.num_experts
            per_layer += mlp
        return self.n_layers * per_layer

    @classmethod
    def unwrap(cls, config: dict[str, Any] | TransformerLensConfig) -> HookedTransformerConfig:
        """The config itself if it is of this class, else one made from the dict's or the other config's fields."""
        if isinstance(config, cls):
            return config
        return cls.from_dict(config if isinstance(config, dict) else config.to_dict())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> HookedTransformerConfig:
        """A config from a dict of fields.

        Raises:
            UnknownArgumentError: (a TypeError) the dict has a key that is no field.
        """
        accepted = inspect.signature(cls).parameters
        unknown = [name for name in config_dict if name not in accepted]
        if unknown:
            hints = "".join(near_misses(name, accepted) for name in unknown)
            raise UnknownArgumentError(
                f"HookedTransformerConfig has no field {', '.join(map(repr, unknown))}.{hints} "
                "Remove it, or set it on the config as an attribute."
            )
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """The config's own ``__dict__``: a change to it is a change to the config."""
        return self.__dict__

    def __repr__(self) -> str:
        return "HookedTransformerConfig:\n" + pprint.pformat(self.to_dict())

    def set_seed_everywhere(self, seed: int) -> None:
        """Seed torch, Python's ``random`` and numpy."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def is_layer_norm_activation(self) -> bool:
        """Whether the MLP norms its activations after the nonlinearity ("solu_ln" and the like)."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")
