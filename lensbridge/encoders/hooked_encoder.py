"""`HookedEncoder`: TransformerLens' BERT, on an unmodified HuggingFace model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer

from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from ..loading import find_tokenizer
from ..readonly import read_only
from .base import EncoderModel, one_weight
from .bert import MASKED_LANGUAGE_HEAD, NEXT_SENTENCE_HEAD
from .loading import Wish, load

T = TypeVar("T", bound="HookedEncoder")


class HookedEncoder(EncoderModel):
    """A HuggingFace BERT with TransformerLens' hook points, weights and methods (TransformerLens' HookedEncoder).

    Made by `from_pretrained`, or from a config, with new weights. Runs on BertForPreTraining, BertForMaskedLM and
    BertForNextSentencePrediction, and offers what the heads of that class allow. There is no weight processing.
    """

    hf_classes: ClassVar[tuple[str, ...]] = ("BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction")

    W_U = one_weight("unembed.W_U", "The unembedding matrix, [d_model, d_vocab].")
    b_U = one_weight("unembed.b_U", "The unembedding's bias, [d_vocab].")
    W_E = one_weight("embed.embed.W_E", "The token embedding, [d_vocab, d_model].")
    W_pos = one_weight("embed.pos_embed.W_pos", "The positional embedding, [n_ctx, d_model].")

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict,
        tokenizer: Any = None,
        move_to_device: bool = True,
        **kwargs: Any,
    ) -> None:
        """A model with new weights, of the sizes in ``cfg``.

        Args:
            cfg: the config, or a dict of its fields.
            tokenizer: a tokenizer; the one that ``cfg.tokenizer_name`` names if not given.
            move_to_device: whether to move it to ``cfg.device``.
            kwargs: ``hf_model``: a HF model to run instead of a new one.

        Raises:
            UnknownArgumentError: (a TypeError) for another keyword.
        """
        if tokenizer is None and not isinstance(cfg, str) and "hf_model" not in kwargs:
            name = HookedTransformerConfig.unwrap(cfg).tokenizer_name
            tokenizer = None if name is None else AutoTokenizer.from_pretrained(name)
        if tokenizer is not None and not isinstance(cfg, str):
            cfg = HookedTransformerConfig.unwrap(cfg)
            if cfg.d_vocab == -1:
                cfg.d_vocab = max(tokenizer.get_vocab().values()) + 1
                cfg.d_vocab_out = cfg.d_vocab if cfg.d_vocab_out == -1 else cfg.d_vocab_out
        super().__init__(cfg, move_to_device, kwargs)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: str | None = None,
        tokenizer: Any = None,
        move_to_device: bool = True,
        dtype: torch.dtype = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """Load a model.

        Args:
            model_name: a TransformerLens name or alias, any hub id of a BERT, or a local directory.
            checkpoint_index, checkpoint_value: refused: no BERT has numbered checkpoints.
            hf_model: a loaded HuggingFace model, used as it is, with its dtype, device and attention implementation.
            device: where to put the model; cuda if there is one.
            tokenizer: an object, a name, or None for the model's own.
            move_to_device: False leaves the loaded model on the CPU.
            dtype: a torch dtype or its name.
            from_pretrained_kwargs: for HuggingFace's ``from_pretrained`` (``revision``, ``cache_dir``, ...).

        Raises:
            ModelNotFoundError: (an OSError) the name leads to no checkpoint.
            UnsupportedModelError: (a ValueError) it is no BERT.
            UnknownArgumentError: (a TypeError) an argument that nothing would read.
        """
        checkpoint = checkpoint_index if checkpoint_value is None else checkpoint_value
        wish = Wish(model_name, hf_model, device, move_to_device, dtype, checkpoint, from_pretrained_kwargs)
        loaded, cfg = load(wish, cls.hf_classes, cls.__name__)
        found = find_tokenizer(tokenizer, cfg, from_pretrained_kwargs)
        model = cls(cfg, found, move_to_device=False, hf_model=loaded)
        print(f"Loaded pretrained model {model_name} into {cls.__name__}")
        return model

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """``W_E`` and ``W_pos`` under each other: the model's overall embedding of one-hot token and position."""
        return read_only(torch.cat([self.W_E, self.W_pos], dim=0), "W_E_pos is a copy of W_E and W_pos")

    # --- running ------------------------------------------------------------------------------------------------------

    def to_tokens(
        self, input: str | list[str], move_to_device: bool = True, truncate: bool = True
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """(tokens, token types, attention mask) of texts, padded to the longest.

        Args:
            input: a text or a list of texts.
            move_to_device: whether to move them to the model's device.
            truncate: whether to cut them to the model's context.

        Raises:
            AssertionError: the model has no tokenizer.
        """
        return self.encode(input, None, move_to_device, truncate)

    def encode(self, first: Any, second: Any, move_to_device: bool, truncate: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, token types, attention mask) of texts, or of pairs of texts."""
        if self.tokenizer is None:
            raise AssertionError(
                "this model has no tokenizer, so it cannot take text: pass tokens, or load it with tokenizer="
            )
        encoded = self.tokenizer(
            first,
            second,
            return_tensors="pt",
            padding=True,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
            return_token_type_ids=True,
        )
        found = (encoded["input_ids"], encoded["token_type_ids"], encoded["attention_mask"])
        return tuple(x.to(self.cfg.device) for x in found) if move_to_device else found

    def inputs(self, tokens: Tensor, token_type_ids: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        """Arguments for HF's forward, on the model's device."""
        given = {"input_ids": tokens, "token_type_ids": token_type_ids, "attention_mask": mask}
        return {name: x.to(self.cfg.device) for name, x in given.items() if x is not None}

    def encoder_output(
        self,
        tokens: Int[Tensor, "batch pos"],
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the last block.

        Args:
            tokens: tokens.
            token_type_ids: 0 for tokens of the first sentence, 1 for the second's; all 0 if not given.
            one_zero_attention_mask: 1 for tokens to attend to, 0 for padding.
        """
        inputs = self.inputs(tokens, token_type_ids, one_zero_attention_mask)
        heads = MASKED_LANGUAGE_HEAD + NEXT_SENTENCE_HEAD
        return self.run_hf("bert", inputs, lambda name: not name.startswith(heads)).last_hidden_state

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        return_type: Literal["logits", "predictions"] | None = "logits",
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """Masked language modelling.

        Args:
            input: a text, a list of texts, or tokens.
            return_type: "logits" ``[batch, pos, d_vocab]``; "predictions": the likeliest token at each mask, as a text,
                or as a list of texts if there are several; None: run and return nothing.
            token_type_ids, one_zero_attention_mask: as for `encoder_output`; texts bring their own.

        Raises:
            AssertionError: text, or predictions, without a tokenizer.
            ValueError: for another ``return_type``.
            UnsupportedModelError: (a ValueError) the HF model has no head for masked language modelling.
        """
        if return_type not in ("logits", "predictions", None):
            raise ValueError(f"return_type must be 'logits', 'predictions' or None, not {return_type!r}")
        if not hasattr(self.hf_model.cls, "predictions"):
            raise UnsupportedModelError(
                f"{type(self.hf_model).__name__} has no head for masked language modelling: use "
                "BertNextSentencePrediction(model), or load a BertForPreTraining or a BertForMaskedLM"
            )
        tokens: Any = input
        if isinstance(input, (str, list)):
            tokens, types, mask = self.to_tokens(input)
            token_type_ids = types if token_type_ids is None else token_type_ids
            one_zero_attention_mask = mask if one_zero_attention_mask is None else one_zero_attention_mask
        inputs = self.inputs(tokens, token_type_ids, one_zero_attention_mask)
        output = self.run_hf("", inputs, lambda name: not name.startswith(NEXT_SENTENCE_HEAD))
        if return_type is None:
            return None
        logits = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
        return logits if return_type == "logits" else self._predictions(logits, inputs["input_ids"])

    def _predictions(self, logits: Tensor, tokens: Tensor) -> str | list[str]:
        if self.tokenizer is None:
            raise AssertionError("return_type='predictions' needs a tokenizer: load the model with tokenizer=")
        likeliest = logits[tokens == self.tokenizer.mask_token_id].argmax(dim=-1)
        text = self.tokenizer.decode(likeliest)
        if " " not in text:
            return text
        return [f"Prediction {index}: {word}" for index, word in enumerate(text.split(" "))]
