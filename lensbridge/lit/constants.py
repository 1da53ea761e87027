"""What are fields, points and defaults called in the LIT integration?

Under TransformerLens' names, each group as a frozen record with one instance.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputFieldNames:
    """What an example may hold."""

    TEXT: str = "text"
    TOKENS: str = "tokens"
    TOKEN_EMBEDDINGS: str = "token_embeddings"
    TARGET: str = "target"
    TARGET_MASK: str = "target_mask"


@dataclass(frozen=True)
class OutputFieldNames:
    """What a prediction may hold."""

    TOKENS: str = "tokens"
    TOKEN_IDS: str = "token_ids"
    LOGITS: str = "logits"
    TOP_K_TOKENS: str = "top_k_tokens"
    GENERATED_TEXT: str = "generated_text"
    PROBAS: str = "probas"
    LOSS: str = "loss"
    LAYER_EMB_TEMPLATE: str = "layer_{layer}/embeddings"
    CLS_EMBEDDING: str = "cls_embedding"
    MEAN_EMBEDDING: str = "mean_embedding"
    ATTENTION_TEMPLATE: str = "layer_{layer}/head_{head}/attention"
    LAYER_ATTENTION_TEMPLATE: str = "layer_{layer}/attention"
    TOKEN_GRADIENTS: str = "token_gradients"
    GRAD_L2: str = "grad_l2"
    GRAD_DOT_INPUT: str = "grad_dot_input"
    INPUT_EMBEDDINGS: str = "input_embeddings"


INPUT_FIELDS = InputFieldNames()
OUTPUT_FIELDS = OutputFieldNames()


@dataclass(frozen=True)
class DefaultConfig:
    """The defaults of `HookedTransformerLITConfig`."""

    MAX_SEQ_LENGTH: int = 512
    BATCH_SIZE: int = 8
    TOP_K: int = 10
    COMPUTE_GRADIENTS: bool = True
    OUTPUT_ATTENTION: bool = True
    OUTPUT_EMBEDDINGS: bool = True
    OUTPUT_ALL_LAYERS: bool = False
    EMBEDDING_LAYERS: tuple | None = None
    PREPEND_BOS: bool = True
    DEVICE: str | None = None
    USE_FP16: bool = False


DEFAULTS = DefaultConfig()


@dataclass(frozen=True)
class HookPointNames:
    """Points of a hooked model; ``{layer}`` is to be filled in."""

    HOOK_EMBED: str = "hook_embed"
    HOOK_POS_EMBED: str = "hook_pos_embed"
    HOOK_TOKENS: str = "hook_tokens"
    RESID_PRE_TEMPLATE: str = "blocks.{layer}.hook_resid_pre"
    RESID_POST_TEMPLATE: str = "blocks.{layer}.hook_resid_post"
    RESID_MID_TEMPLATE: str = "blocks.{layer}.hook_resid_mid"
    ATTN_OUT_TEMPLATE: str = "blocks.{layer}.hook_attn_out"
    ATTN_PATTERN_TEMPLATE: str = "blocks.{layer}.attn.hook_pattern"
    ATTN_SCORES_TEMPLATE: str = "blocks.{layer}.attn.hook_attn_scores"
    Q_TEMPLATE: str = "blocks.{layer}.attn.hook_q"
    K_TEMPLATE: str = "blocks.{layer}.attn.hook_k"
    V_TEMPLATE: str = "blocks.{layer}.attn.hook_v"
    MLP_OUT_TEMPLATE: str = "blocks.{layer}.hook_mlp_out"
    MLP_PRE_TEMPLATE: str = "blocks.{layer}.mlp.hook_pre"
    MLP_POST_TEMPLATE: str = "blocks.{layer}.mlp.hook_post"
    LN_FINAL: str = "ln_final.hook_normalized"


HOOK_POINTS = HookPointNames()

#: What a field is about -> LIT's type for it.
LIT_TYPE_MAPPING = {
    "text": "TextSegment",
    "tokens": "Tokens",
    "embeddings": "Embeddings",
    "token_embeddings": "TokenEmbeddings",
    "attention": "AttentionHeads",
    "gradients": "TokenGradients",
    "multiclass": "MulticlassPreds",
    "regression": "RegressionScore",
    "generated_text": "GeneratedText",
    "top_k_tokens": "TokenTopKPreds",
}


@dataclass(frozen=True)
class ErrorMessages:
    """What errors say."""

    NO_TOKENIZER: str = "this model has no tokenizer: load it with one, or call model.set_tokenizer"
    INVALID_MODEL: str = "a HookedTransformer can be shown in LIT, not a {model_type}"
    LIT_NOT_INSTALLED: str = "this needs the Learning Interpretability Tool: pip install lit-nlp"
    INCOMPATIBLE_INPUT: str = "an example needs the fields {expected}, this one has {actual}"
    BATCH_SIZE_MISMATCH: str = "a batch of {expected} was expected, not of {actual}"


ERRORS = ErrorMessages()


@dataclass(frozen=True)
class ServerConfig:
    """The defaults of `serve`."""

    DEFAULT_PORT: int = 5432
    DEFAULT_HOST: str = "localhost"
    DEFAULT_TITLE: str = "lensbridge + LIT"
    DEV_MODE: bool = False
    WARM_START: bool = True
    MAX_EXAMPLES: int = 1000


SERVER_CONFIG = ServerConfig()
