"""How does LIT see a hooked model?

As something with a spec of what it takes, a spec of what it gives, and predictions that are dicts of numpy arrays:
tokens with their most probable successors, residual streams, attention patterns and gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import HookedTransformer
from . import _nlp
from .constants import DEFAULTS, ERRORS, HOOK_POINTS, INPUT_FIELDS, OUTPUT_FIELDS
from .utils import (
    clean_token_strings,
    embedding_gradients,
    extract_attention_from_cache,
    extract_embeddings_from_cache,
    get_model_info,
    get_tokens_from_model,
    get_top_k_predictions,
    tensor_to_numpy,
)


@dataclass
class HookedTransformerLITConfig:
    """What LIT is shown of a model. Gradients need embeddings: asking for them asks for both."""

    max_seq_length: int = DEFAULTS.MAX_SEQ_LENGTH
    batch_size: int = DEFAULTS.BATCH_SIZE
    top_k: int = DEFAULTS.TOP_K
    compute_gradients: bool = DEFAULTS.COMPUTE_GRADIENTS
    output_attention: bool = DEFAULTS.OUTPUT_ATTENTION
    output_embeddings: bool = DEFAULTS.OUTPUT_EMBEDDINGS
    #: The stream after every layer; otherwise after the first, the middle and the last.
    output_all_layers: bool = DEFAULTS.OUTPUT_ALL_LAYERS
    #: The stream after these layers.
    embedding_layers: list[int] | None = None
    prepend_bos: bool = DEFAULTS.PREPEND_BOS
    #: None: the model's.
    device: str | None = None


class HookedTransformerLIT(_nlp.Model):
    """A model for LIT (TransformerLens' class of the same name).

    Raises:
        ImportError: if LIT is not installed.
        TypeError: if ``model`` is no HookedTransformer.
    """

    def __init__(self, model: Any, config: HookedTransformerLITConfig | None = None) -> None:
        _nlp.require()
        if not isinstance(model, HookedTransformer):
            raise TypeError(ERRORS.INVALID_MODEL.format(model_type=type(model).__name__))
        config = config or HookedTransformerLITConfig()
        self.model: Any = model
        self.config = replace(
            config,
            output_embeddings=config.output_embeddings or config.compute_gradients,
            device=config.device or str(model.cfg.device),
        )
        self._model_info = get_model_info(model)

    @property
    def supports_concurrent_predictions(self) -> bool:
        """False: one prediction at a time."""
        return False

    def description(self) -> str:
        """The model's name and sizes."""
        return "TransformerLens: {model_name} ({n_layers}L, {n_heads}H, d={d_model})".format(**self._model_info)

    def max_minibatch_size(self) -> int:
        """How many examples a batch may have."""
        return self.config.batch_size

    # --- specs --------------------------------------------------------------------------------------------------------

    @classmethod
    def init_spec(cls) -> dict[str, Any]:
        """What LIT's page asks for to load another model."""
        types = _nlp.types()
        flags = {
            "compute_gradients": DEFAULTS.COMPUTE_GRADIENTS,
            "output_attention": DEFAULTS.OUTPUT_ATTENTION,
            "output_embeddings": DEFAULTS.OUTPUT_EMBEDDINGS,
        }
        length = types.Integer(default=DEFAULTS.MAX_SEQ_LENGTH, min_val=1, max_val=2048, required=False)
        return {
            "model_name": types.String(default="gpt2-small", required=True),
            "max_seq_length": length,
            **{name: types.Boolean(default=default, required=False) for name, default in flags.items()},
        }

    def input_spec(self) -> dict[str, Any]:
        """LIT's type of each field of an example."""
        types, text = _nlp.types(), INPUT_FIELDS.TEXT
        spec = {text: types.TextSegment(), INPUT_FIELDS.TOKENS: types.Tokens(parent=text, required=False)}
        if self.config.output_embeddings:
            embeddings = types.TokenEmbeddings(align=INPUT_FIELDS.TOKENS, required=False)
            spec[INPUT_FIELDS.TOKEN_EMBEDDINGS] = embeddings
        if self.config.compute_gradients:
            spec[INPUT_FIELDS.TARGET_MASK] = types.Tokens(parent=text, required=False)
        return spec

    def output_spec(self) -> dict[str, Any]:
        """LIT's type of each field of a prediction."""
        types, tokens = _nlp.types(), OUTPUT_FIELDS.TOKENS
        spec = {tokens: types.Tokens(parent=INPUT_FIELDS.TEXT)}
        spec[OUTPUT_FIELDS.TOP_K_TOKENS] = types.TokenTopKPreds(align=tokens)
        if self.config.output_embeddings:
            spec[OUTPUT_FIELDS.INPUT_EMBEDDINGS] = types.TokenEmbeddings(align=tokens)
            layers = (OUTPUT_FIELDS.LAYER_EMB_TEMPLATE.format(layer=layer) for layer in self._get_embedding_layers())
            for name in (OUTPUT_FIELDS.CLS_EMBEDDING, OUTPUT_FIELDS.MEAN_EMBEDDING, *layers):
                spec[name] = types.Embeddings()
        if self.config.output_attention:
            for layer in range(self._model_info["n_layers"]):
                name = OUTPUT_FIELDS.LAYER_ATTENTION_TEMPLATE.format(layer=layer)
                spec[name] = types.AttentionHeads(align_in=tokens, align_out=tokens)
        if self.config.compute_gradients:
            for name in (OUTPUT_FIELDS.GRAD_L2, OUTPUT_FIELDS.GRAD_DOT_INPUT):
                spec[name] = types.TokenGradients(align=tokens, grad_for=OUTPUT_FIELDS.INPUT_EMBEDDINGS)
        return spec

    def _get_embedding_layers(self) -> list[int]:
        n_layers = self._model_info["n_layers"]
        if self.config.embedding_layers is not None:
            return self.config.embedding_layers
        if self.config.output_all_layers or n_layers <= 3:
            return list(range(n_layers))
        return [0, n_layers // 2, n_layers - 1]

    # --- predictions --------------------------------------------------------------------------------------------------

    def predict(self, inputs: Iterable[dict[str, Any]], **kwargs: Any) -> Iterator[dict[str, Any]]:
        """A prediction for each example, with the fields of `output_spec`."""
        for example in inputs:
            yield self._predict_single(example)

    def _predict_single(self, example: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: if the model has no tokenizer.
        """
        if self.model.tokenizer is None:
            raise ValueError(ERRORS.NO_TOKENIZER)
        tokens, ids = get_tokens_from_model(
            self.model, example[INPUT_FIELDS.TEXT], self.config.prepend_bos, max_length=self.config.max_seq_length
        )
        ids = ids.to(self.config.device)
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(ids[None], names_filter=self._points())
        output: dict[str, Any] = {OUTPUT_FIELDS.TOKENS: clean_token_strings(tokens)}
        output[OUTPUT_FIELDS.TOP_K_TOKENS] = self._get_top_k_per_position(logits, len(tokens))
        if self.config.output_embeddings:
            output |= self._extract_embeddings(cache)
        if self.config.output_attention:
            output |= self._extract_attention(cache)
        if self.config.compute_gradients:
            # LIT computes norms and products with the embeddings by itself.
            gradient = tensor_to_numpy(embedding_gradients(self.model, ids, -1)[0])
            output |= {OUTPUT_FIELDS.GRAD_L2: gradient, OUTPUT_FIELDS.GRAD_DOT_INPUT: gradient}
        return output

    def _points(self) -> list[str]:
        """What has to be cached."""
        out, n_layers = [], self._model_info["n_layers"]
        if self.config.output_embeddings:
            layers = {*self._get_embedding_layers(), n_layers - 1}
            out += [HOOK_POINTS.HOOK_EMBED, *(HOOK_POINTS.RESID_POST_TEMPLATE.format(layer=layer) for layer in layers)]
        if self.config.output_attention:
            out += [HOOK_POINTS.ATTN_PATTERN_TEMPLATE.format(layer=layer) for layer in range(n_layers)]
        return out

    def _get_top_k_per_position(self, logits: Tensor, seq_len: int) -> list[list[tuple[str, float]]]:
        tokenizer, k = self.model.tokenizer, self.config.top_k
        return [get_top_k_predictions(logits, tokenizer, k, position) for position in range(seq_len)]

    def _extract_embeddings(self, cache: Any) -> dict[str, Any]:
        last = self._model_info["n_layers"] - 1
        output = {
            OUTPUT_FIELDS.INPUT_EMBEDDINGS: tensor_to_numpy(cache[HOOK_POINTS.HOOK_EMBED][0]),
            OUTPUT_FIELDS.CLS_EMBEDDING: extract_embeddings_from_cache(cache, last, "first"),
            OUTPUT_FIELDS.MEAN_EMBEDDING: extract_embeddings_from_cache(cache, last, "mean"),
        }
        for layer in self._get_embedding_layers():
            mean = extract_embeddings_from_cache(cache, layer, "mean")
            output[OUTPUT_FIELDS.LAYER_EMB_TEMPLATE.format(layer=layer)] = mean
        return output

    def _extract_attention(self, cache: Any) -> dict[str, Any]:
        return {
            OUTPUT_FIELDS.LAYER_ATTENTION_TEMPLATE.format(layer=layer): extract_attention_from_cache(cache, layer)
            for layer in range(self._model_info["n_layers"])
        }

    def get_embedding_table(self) -> tuple[list[str], np.ndarray]:
        """(the vocabulary as texts, ``W_E`` as [d_vocab, d_model]), as far as the tokenizer has tokens."""
        table, tokenizer = tensor_to_numpy(self.model.embed.W_E), self.model.tokenizer
        assert table is not None
        if tokenizer is None:
            return [f"<{index}>" for index in range(len(table))], table
        size = min(len(table), len(tokenizer))
        return [tokenizer.decode([index]) for index in range(size)], table[:size]

    @classmethod
    def from_pretrained(
        cls, model_name: str, config: HookedTransformerLITConfig | None = None, **model_kwargs: Any
    ) -> HookedTransformerLIT:
        """The model of this name, for LIT. Further arguments are those of `HookedTransformer.from_pretrained`."""
        return cls(HookedTransformer.from_pretrained(model_name, **model_kwargs), config=config)


class HookedTransformerLITBatched(_nlp.BatchedModel):
    """`HookedTransformerLIT` as a model that LIT gives batches to (TransformerLens' class of the same name)."""

    def __init__(self, model: Any, config: HookedTransformerLITConfig | None = None) -> None:
        self._wrapper = HookedTransformerLIT(model, config)
        self.model = model
        self.config = self._wrapper.config

    def description(self) -> str:
        """The model's name and sizes."""
        return self._wrapper.description()

    @classmethod
    def init_spec(cls) -> dict[str, Any]:
        """What LIT's page asks for to load another model."""
        return HookedTransformerLIT.init_spec()

    def input_spec(self) -> dict[str, Any]:
        """LIT's type of each field of an example."""
        return self._wrapper.input_spec()

    def output_spec(self) -> dict[str, Any]:
        """LIT's type of each field of a prediction."""
        return self._wrapper.output_spec()

    def max_minibatch_size(self) -> int:
        """How many examples a batch may have."""
        return self._wrapper.max_minibatch_size()

    def predict_minibatch(self, inputs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """A prediction for each example of a batch, one after the other."""
        return list(self._wrapper.predict(inputs))

    @classmethod
    def from_pretrained(
        cls, model_name: str, config: HookedTransformerLITConfig | None = None, **model_kwargs: Any
    ) -> HookedTransformerLITBatched:
        """The model of this name, for LIT. Further arguments are those of `HookedTransformer.from_pretrained`."""
        return cls(HookedTransformer.from_pretrained(model_name, **model_kwargs), config=config)
