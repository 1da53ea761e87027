"""`BertNextSentencePrediction`: does one sentence follow another, by a `HookedEncoder`?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from ..errors import UnsupportedModelError
from .base import as_cache_object
from .bert import MASKED_LANGUAGE_HEAD
from .hooked_encoder import HookedEncoder

#: What index 0 and 1 of the logits say.
PREDICTIONS = ("The sentences are sequential", "The sentences are NOT sequential")


class BertNextSentencePrediction:
    """A `HookedEncoder` with its other head (TransformerLens' BertNextSentencePrediction).

    Hooks are attached to ``model``, the encoder: ``with nsp.model.hooks(...): nsp(sentences)``. The points of the
    pooler and of the head fire here, those of masked language modelling do not.
    """

    def __init__(self, model: HookedEncoder) -> None:
        self.model = model

    def __call__(
        self,
        input: list[str] | Int[Tensor, "batch pos"],
        return_type: Literal["logits", "predictions"] | None = "logits",
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """See `forward`."""
        return self.forward(input, return_type, token_type_ids, one_zero_attention_mask)

    def to_tokens(
        self, input: list[str], move_to_device: bool = True, truncate: bool = True
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """(tokens, token types, attention mask) of two sentences, as one row.

        Raises:
            ValueError: for another number of sentences.
            AssertionError: the model has no tokenizer.
        """
        if isinstance(input, str) or len(input) != 2:
            got = "one text" if isinstance(input, str) else len(input)
            raise ValueError(
                f"next sentence prediction is about exactly two sentences, got {got}: pass a list of two texts"
            )
        return self.model.encode(input[0], input[1], move_to_device, truncate)

    def forward(
        self,
        input: list[str] | Int[Tensor, "batch pos"],
        return_type: Literal["logits", "predictions"] | None = "logits",
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """Whether the second sentence follows the first.

        Args:
            input: two texts, or tokens.
            return_type: "logits" ``[batch, 2]``, index 0 for "it does"; "predictions": that in words; None: run and
                return nothing.
            token_type_ids: 0 for tokens of the first sentence, 1 for the second's; texts bring their own.
            one_zero_attention_mask: 1 for tokens to attend to, 0 for padding; texts bring their own.

        Raises:
            ValueError: tokens without ``token_type_ids``; another ``return_type``; predictions for several rows.
            UnsupportedModelError: (a ValueError) the HF model has no head for next sentence prediction.
        """
        model = self.model
        if return_type not in ("logits", "predictions", None):
            raise ValueError(f"return_type must be 'logits', 'predictions' or None, not {return_type!r}")
        if not hasattr(model.hf_model.cls, "seq_relationship"):
            raise UnsupportedModelError(
                f"{type(model.hf_model).__name__} has no head for next sentence prediction: load a BertForPreTraining "
                "or a BertForNextSentencePrediction"
            )
        tokens: Any = input
        if isinstance(input, (str, list)):
            tokens, types, mask = self.to_tokens(input)
            token_type_ids = types if token_type_ids is None else token_type_ids
            one_zero_attention_mask = mask if one_zero_attention_mask is None else one_zero_attention_mask
        elif token_type_ids is None:
            raise ValueError(
                "tokens were given without token_type_ids, which say where the second sentence begins: pass them, or "
                "pass the two sentences as text"
            )
        inputs = model.inputs(tokens, token_type_ids, one_zero_attention_mask)
        output = model.run_hf("", inputs, lambda name: not name.startswith(MASKED_LANGUAGE_HEAD))
        if return_type is None:
            return None
        logits = output.seq_relationship_logits if hasattr(output, "seq_relationship_logits") else output.logits
        return logits if return_type == "logits" else PREDICTIONS[int(logits.argmax(dim=-1).item())]

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """(output, `ActivationCache`), or a plain dict of activations with ``return_cache_object=False``.

        Arguments as for `forward` and `HookedRootModule.run_with_cache`.
        """
        with self._in_its_place():
            output, cache = self.model.run_with_cache(
                *model_args, return_cache_object=False, remove_batch_dim=remove_batch_dim, **kwargs
            )
        return output, as_cache_object(cache, self, remove_batch_dim) if return_cache_object else cache

    @contextmanager
    def _in_its_place(self) -> Iterator[None]:
        """The time for which calling the encoder means calling this."""
        attributes = self.model.__dict__
        attributes["forward"] = self.forward
        try:
            yield
        finally:
            del attributes["forward"]
