"""What does TransformerLens 3 say of a HuggingFace model that it runs as it is?

The config of TransformerLens' other model class, the bridge. There is no such class here, because `HookedTransformer`
itself runs the HuggingFace model; the config is here for code that passes one around, and for `ProcessWeights`, which
reads from it what `HookedTransformerConfig` has no field for (``rmsnorm_uses_offset``).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lensbridge.base_config import TransformerLensConfig
from lensbridge.utilities.activation_functions import SOFTCAP_DISABLED


class TransformerBridgeConfig(TransformerLensConfig):
    """A config that also has the fields of a bridge (TransformerLens' class of the same name).

    Unlike that one it takes values as they come: of the fields that say "not set", only ``initializer_range`` and those
    of `TransformerLensConfig` are filled in, and the activation function is not checked. Further keywords are fields of
    `TransformerLensConfig`. Two configs are equal if these fields are.

    Raises:
        ValueError: ``architecture`` is no string; ``n_heads`` is not given and ``d_head`` does not divide ``d_model``.
        TypeError: a keyword that is no field.
    """

    #: The HuggingFace class.
    architecture: str | None
    #: Whether the tokenizer adds these by itself, and the side it pads on.
    tokenizer_prepends_bos: bool
    tokenizer_appends_eos: bool
    default_padding_side: str | None
    #: Whether a fused query-key-value weight is shown in three parts.
    split_attention_weights: bool
    #: Sizes by layer, where layers differ; ``d_head`` and ``n_key_value_heads`` then hold the most common one.
    per_layer_head_dim: list[int] | None
    per_layer_num_key_value_heads: list[int] | None
    #: Whether token embeddings are multiplied by ``sqrt(d_model)`` (BART and its relatives).
    scale_embedding: bool | None
    #: Whether RMS norms store their gain less one (Gemma).
    rmsnorm_uses_offset: bool
    attn_implementation: str | None
    #: What kind of model it is, apart from one of text; ``is_stateful`` without a key-value cache (Mamba).
    is_audio_model: bool
    is_visual_model: bool
    is_stateful: bool
    is_multimodal: bool
    vision_hidden_size: int | None
    vision_num_layers: int | None
    vision_num_heads: int | None
    mm_tokens_per_image: int | None
    #: As in `HookedTransformerConfig`, where each is explained.
    model_name: str
    original_architecture: str | None
    rotary_base: int
    initializer_range: float
    init_mode: str
    use_attn_scale: bool
    attn_scale: float
    use_hook_mlp_in: bool
    use_attn_in: bool
    use_qk_norm: bool
    use_local_attn: bool
    ungroup_grouped_query_attention: bool
    from_checkpoint: bool
    checkpoint_index: int | None
    checkpoint_label_type: str | None
    checkpoint_value: int | None
    tokenizer_name: str | None
    window_size: int | None
    attn_types: list[str] | None
    n_devices: int
    attention_dir: str
    seed: int | None
    init_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    d_vocab_out: int
    parallel_attn_mlp: bool
    rotary_dim: int | None
    n_params: int | None
    use_hook_tokens: bool
    post_embedding_ln: bool
    trust_remote_code: bool
    rotary_adjacent_pairs: bool
    load_in_4bit: bool
    relative_attention_max_distance: int | None
    relative_attention_num_buckets: int | None
    decoder_start_token_id: int | None
    tie_word_embeddings: bool
    use_normalization_before_and_after: bool
    attn_scores_soft_cap: float
    output_logits_soft_cap: float
    use_NTK_by_parts_rope: bool
    NTK_by_parts_low_freq_factor: float
    NTK_by_parts_high_freq_factor: float
    NTK_by_parts_factor: float

    # fmt: off
    def __init__(
        self, d_model: int, d_head: int, n_layers: int, n_ctx: int, n_heads: int = -1, d_vocab: int = -1,
        architecture: str | None = None, tokenizer_prepends_bos: bool = True, tokenizer_appends_eos: bool = False,
        default_padding_side: str | None = None, model_name: str = "custom", act_fn: str = "relu", eps: float = 1e-5,
        use_attn_scale: bool = True, attn_scale: float = -1.0, use_hook_mlp_in: bool = False, use_attn_in: bool = False,
        use_qk_norm: bool = False, use_local_attn: bool = False, ungroup_grouped_query_attention: bool = False,
        original_architecture: str | None = None, from_checkpoint: bool = False, checkpoint_index: int | None = None,
        checkpoint_label_type: str | None = None, checkpoint_value: int | None = None,
        tokenizer_name: str | None = None, window_size: int | None = None, attn_types: list[str] | None = None,
        init_mode: str = "gpt2", normalization_type: str | None = "LN", n_devices: int = 1,
        attention_dir: str = "causal", attn_only: bool = False, seed: int | None = None,
        initializer_range: float = -1.0, init_weights: bool = True, scale_attn_by_inverse_layer_idx: bool = False,
        final_rms: bool = False, d_vocab_out: int = -1, parallel_attn_mlp: bool = False, rotary_dim: int | None = None,
        n_params: int | None = None, use_hook_tokens: bool = False, gated_mlp: bool = False,
        dtype: torch.dtype | None = torch.float32, post_embedding_ln: bool = False, rotary_base: int | float = 10000,
        trust_remote_code: bool = False, rotary_adjacent_pairs: bool = False, load_in_4bit: bool = False,
        num_experts: int | None = None, experts_per_token: int | None = None, n_key_value_heads: int | None = None,
        per_layer_head_dim: list[int] | None = None, per_layer_num_key_value_heads: list[int] | None = None,
        relative_attention_max_distance: int | None = None, relative_attention_num_buckets: int | None = None,
        decoder_start_token_id: int | None = None, scale_embedding: bool | None = None,
        tie_word_embeddings: bool = False, use_normalization_before_and_after: bool = False,
        attn_scores_soft_cap: float = SOFTCAP_DISABLED, output_logits_soft_cap: float = SOFTCAP_DISABLED,
        use_NTK_by_parts_rope: bool = False, NTK_by_parts_low_freq_factor: float = 1.0,
        NTK_by_parts_high_freq_factor: float = 4.0, NTK_by_parts_factor: float = 8.0, rmsnorm_uses_offset: bool = False,
        attn_implementation: str | None = None, is_audio_model: bool = False, is_visual_model: bool = False,
        is_stateful: bool = False, is_multimodal: bool = False, vision_hidden_size: int | None = None,
        vision_num_layers: int | None = None, vision_num_heads: int | None = None,
        mm_tokens_per_image: int | None = None, **kwargs: Any,
    ) -> None:
        # fmt: on
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        # Set first: the base fills in what is not set, and must not find these missing.
        vars(self).update(given)
        sizes = {name: given.pop(name) for name in ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab")}
        super().__init__(**sizes, **kwargs)
        vars(self).update(given, split_attention_weights=False)
        self.dtype = torch.float32 if dtype is None else dtype
        self.rotary_base = int(rotary_base)
        if initializer_range < 0:
            self.initializer_range = 0.8 / math.sqrt(d_model) if init_mode == "gpt2" else 1.0

    def __post_init__(self) -> None:
        if self.architecture is not None and not isinstance(self.architecture, str):
            raise ValueError(f"architecture must be the name of a class, not a {type(self.architecture).__name__}")
        super().__post_init__()

    @property
    def head_dim(self) -> int:
        """``d_head``, by HuggingFace's name."""
        return self.d_head
