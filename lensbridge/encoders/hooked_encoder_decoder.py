"""`HookedEncoderDecoder`: TransformerLens' T5, on an unmodified HuggingFace model."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, TypeVar

import torch
import tqdm
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..config import HookedTransformerConfig
from ..loading import find_tokenizer
from ..utilities.logits_utils import sample_logits
from .base import EncoderModel, one_weight
from .loading import Wish, load

T = TypeVar("T", bound="HookedEncoderDecoder")


class HookedEncoderDecoder(EncoderModel):
    """A HuggingFace T5 with TransformerLens' hook points, weights and methods (TransformerLens' HookedEncoderDecoder).

    Made by `from_pretrained`, or from a config, with new weights. There is no weight processing. Stacked weights hold
    the encoder's layers first, then the decoder's (its self-attention).
    """

    hf_classes: ClassVar[tuple[str, ...]] = ("T5ForConditionalGeneration",)
    several_devices: ClassVar[type[Exception]] = ValueError

    W_U = one_weight("unembed.W_U", "The unembedding matrix, [d_model, d_vocab].")
    b_U = one_weight("unembed.b_U", "The unembedding's bias, [d_vocab]: T5 has none, so zeros.")
    W_E = one_weight("embed.W_E", "The token embedding of encoder and decoder, [d_vocab, d_model].")

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
                cfg.d_vocab = len(tokenizer)
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
        dtype: torch.dtype | None = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """Load a model.

        Args:
            model_name: a TransformerLens name or alias, any hub id of a T5, or a local directory.
            checkpoint_index, checkpoint_value: refused: no T5 has numbered checkpoints.
            hf_model: a loaded HuggingFace model, used as it is, with its dtype, device and attention implementation.
            device: where to put the model; cuda if there is one.
            tokenizer: an object, a name, or None for the model's own.
            move_to_device: False leaves the loaded model on the CPU.
            dtype: a torch dtype or its name.
            from_pretrained_kwargs: for HuggingFace's ``from_pretrained`` (``revision``, ``cache_dir``, ...).

        Raises:
            ModelNotFoundError: (an OSError) the name leads to no checkpoint.
            UnsupportedModelError: (a ValueError) it is no T5.
            UnknownArgumentError: (a TypeError) an argument that nothing would read.
        """
        checkpoint = checkpoint_index if checkpoint_value is None else checkpoint_value
        wish = Wish(
            model_name, hf_model, device, move_to_device, dtype or torch.float32, checkpoint, from_pretrained_kwargs
        )
        loaded, cfg = load(wish, cls.hf_classes, cls.__name__)
        found = find_tokenizer(tokenizer, cfg, from_pretrained_kwargs)
        model = cls(cfg, found, move_to_device=False, hf_model=loaded)
        print(f"Loaded pretrained model {model_name} into {cls.__name__}")
        return model

    @property
    def W_pos(self) -> None:
        """T5 has no embedding of absolute positions.

        Raises:
            NotImplementedError: always, as in TransformerLens.
        """
        raise NotImplementedError(
            "T5 has no embedding of absolute positions: model.encoder[0].attn.rel_pos_bias.weight, and the decoder's, "
            "hold what is added to the scores for each relative position"
        )

    def all_head_labels(self) -> list[str]:
        """``["EL0H0", ..., "DL0H0", ...]``: the encoder's heads, then the decoder's."""
        stacks = [name[0].upper() for name in self.layers() for _ in range(self.cfg.n_heads)]
        return [stack + label for stack, label in zip(stacks, super().all_head_labels(), strict=True)]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the HF model (arguments as for ``torch.nn.Module.to``), and note it in ``cfg``."""
        return nn.Module.to(self, *args, **kwargs)

    # --- running ------------------------------------------------------------------------------------------------------

    def to_tokens(
        self, input: str | list[str], move_to_device: bool = True, truncate: bool = True
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """(tokens, attention mask) of texts, padded to the longest.

        Args:
            input: a text or a list of texts.
            move_to_device: whether to move them to the model's device.
            truncate: whether to cut them to the model's context.

        Raises:
            AssertionError: the model has no tokenizer.
        """
        encoded = self._required_tokenizer()(
            input,
            return_tensors="pt",
            padding=True,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
        )
        tokens, mask = encoded["input_ids"], encoded["attention_mask"]
        return (tokens.to(self.cfg.device), mask.to(self.cfg.device)) if move_to_device else (tokens, mask)

    def _required_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise AssertionError(
                "this model has no tokenizer, so it cannot take or give text, and does not know the token that the "
                "decoder starts with: load it with tokenizer="
            )
        return self.tokenizer

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        decoder_input: Int[Tensor, "batch decoder_pos"] | None = None,
        return_type: str | None = "logits",
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch decoder_pos d_vocab"] | None:
        """Encode the input, and predict the token behind each of the decoder's.

        Args:
            input: a text, a list of texts, or tokens, for the encoder.
            decoder_input: tokens for the decoder; for text, by default one padding token, which is what T5 starts with.
            return_type: "logits" ``[batch, decoder_pos, d_vocab]``, or None to run and return nothing.
            one_zero_attention_mask: 1 for the encoder's tokens to attend to, 0 for padding; texts bring their own.

        Raises:
            AssertionError: text without a tokenizer.
            ValueError: tokens without ``decoder_input``; another ``return_type``.
        """
        if return_type not in ("logits", None):
            raise ValueError(f"return_type must be 'logits' or None, not {return_type!r}")
        tokens: Any = input
        if isinstance(input, (str, list)):
            tokens, mask = self.to_tokens(input)
            one_zero_attention_mask = mask if one_zero_attention_mask is None else one_zero_attention_mask
            if decoder_input is None:
                decoder_input = self._first_token(tokens.shape[0])
        elif one_zero_attention_mask is None:
            logging.warning("No attention mask provided. Assuming all tokens should be attended to.")
        if decoder_input is None:
            raise ValueError("tokens were given without decoder_input: pass the tokens that the decoder reads")
        inputs = {"input_ids": tokens, "attention_mask": one_zero_attention_mask, "decoder_input_ids": decoder_input}
        moved = {name: x.to(self.cfg.device) for name, x in inputs.items() if x is not None}
        output = self.run_hf("", {**moved, "use_cache": False})
        return output.logits if return_type == "logits" else None

    def _first_token(self, rows: int) -> Int[Tensor, "batch 1"]:
        return torch.full((rows, 1), self._required_tokenizer().pad_token_id, device=self.cfg.device)

    @torch.inference_mode()
    def generate(
        self,
        input: str | Int[Tensor, "batch pos"] = "",
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        return_type: str | None = "input",
        verbose: bool = True,
    ) -> Int[Tensor, "batch new_tokens"] | str:
        """Continue the decoder's text, with the hooks that are attached firing on the whole of it at every step.

        Args:
            input: a text, or tokens, for the encoder.
            one_zero_attention_mask: as for `forward`.
            max_new_tokens: how many tokens at most.
            stop_at_eos: whether a row ends with an end-of-sequence token; it is padded with it until all have ended.
            eos_token_id: that token, or several; the tokenizer's own if not given.
            do_sample: draw each token, or else take the likeliest.
            top_k, top_p, temperature, freq_penalty: as for `utilities.sample_logits`.
            return_type: "str", "tensor" (with the first, padding, token), or "input" for the kind of the input.
            verbose: whether to show a progress bar.

        Raises:
            AssertionError: the model has no tokenizer, or no end-of-sequence token is known.
            TypeError: input that is neither a text nor a tensor.
        """
        tokenizer = self._required_tokenizer()
        if not isinstance(input, (str, Tensor)):
            raise TypeError(f"generate takes a text or tokens, not {type(input).__name__}: tokenize a list of texts")
        tokens: Any = input
        if isinstance(input, str):
            tokens, mask = self.to_tokens(input)
            one_zero_attention_mask = mask if one_zero_attention_mask is None else one_zero_attention_mask
        elif one_zero_attention_mask is None:
            logging.warning("No attention mask provided. Assuming all tokens should be attended to.")
            one_zero_attention_mask = torch.ones_like(tokens)
        stops, padding = _stops(tokenizer, eos_token_id) if stop_at_eos else ([], 0)
        decoded = self._first_token(tokens.shape[0])
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=decoded.device)
        self.eval()
        for _ in tqdm.tqdm(range(max_new_tokens), disable=not verbose):
            logits = self.forward(tokens, decoded, one_zero_attention_mask=one_zero_attention_mask)
            assert logits is not None
            new = logits[:, -1].argmax(-1)
            if do_sample:
                new = sample_logits(
                    logits[:, -1],
                    top_k=top_k,
                    top_p=top_p,
                    temperature=temperature,
                    freq_penalty=freq_penalty,
                    tokens=decoded,
                ).to(decoded.device)
            if stop_at_eos:
                new[ended] = padding
                ended |= torch.isin(new, torch.tensor(stops, device=new.device))
            decoded = torch.cat([decoded, new.unsqueeze(-1)], dim=-1)
            if stop_at_eos and ended.all():
                break
        as_text = return_type == "str" or (return_type == "input" and isinstance(input, str))
        return tokenizer.decode(decoded[0], skip_special_tokens=True) if as_text else decoded


def _stops(tokenizer: Any, eos_token_id: int | list[int] | None) -> tuple[list[int], int]:
    """(the tokens that end a row, the one that it is padded with)."""
    own = tokenizer.eos_token_id
    if eos_token_id is None:
        if own is None:
            raise AssertionError("stop_at_eos needs an eos_token_id: the tokenizer has none. Pass eos_token_id=")
        eos_token_id = own
    if isinstance(eos_token_id, int):
        return [eos_token_id], eos_token_id
    return list(eos_token_id), eos_token_id[0] if own is None else own
