"""How do texts become tokens, and tokens texts, for a model?

The rules are TransformerLens': whether a BOS token comes first is the model's default unless the call says otherwise,
and is reconciled with tokenizers that add one by themselves; batches are padded on the tokenizer's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .utilities.defaults_utils import USE_DEFAULT_VALUE, LocallyOverridenDefaults
from .utilities.tokenize_utils import (
    get_input_with_manually_prepended_bos,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
)

Text = str | list[str]
PaddingSide = Literal["left", "right"] | None

#: Families whose tokenizers cannot be asked to add a BOS token.
NO_BOS_SWITCH = ("OlmoForCausalLM", "OlmoeForCausalLM", "Olmo2ForCausalLM")


class TokenMethods:
    """Text to tokens and back, as methods of a model that has ``cfg`` and ``tokenizer``."""

    cfg: Any
    tokenizer: Any
    W_U: Any

    def required_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            AssertionError: if it has none.
        """
        if self.tokenizer is None:
            raise AssertionError(
                "this model has no tokenizer, so it cannot take or give text: pass tokens, or call "
                "model.set_tokenizer(tokenizer)"
            )
        return self.tokenizer

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide = None) -> None:
        """Use a HuggingFace tokenizer; missing special tokens are filled in (eos ``<|endoftext|>``, pad and bos as
        eos).

        Args:
            tokenizer: a PreTrainedTokenizer(Fast).
            default_padding_side: "left" or "right"; None keeps the tokenizer's own.

        Raises:
            AssertionError: if it is no HuggingFace tokenizer, or for another padding side.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise AssertionError(
                f"{type(tokenizer).__name__} is no HuggingFace tokenizer: pass a PreTrainedTokenizer(Fast) object"
            )
        if default_padding_side not in ("left", "right", None):
            raise AssertionError(f"default_padding_side must be 'left', 'right' or None, not {default_padding_side!r}")
        cfg = self.cfg
        if cfg.original_architecture not in NO_BOS_SWITCH:
            tokenizer = get_tokenizer_with_bos(tokenizer)
        tokenizer.padding_side = default_padding_side or tokenizer.padding_side or "right"
        cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
        if tokenizer.eos_token is None:
            tokenizer.eos_token = "<|endoftext|>"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token
        if cfg.d_vocab == -1:
            cfg.d_vocab = max(tokenizer.vocab.values()) + 1
        if cfg.d_vocab_out == -1:
            cfg.d_vocab_out = cfg.d_vocab
        self.tokenizer = tokenizer

    def to_tokens(
        self,
        input: Text,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """The tokens of a text, or of several padded to one length.

        Args:
            prepend_bos: whether a BOS token comes first; None for the model's default. Pass False for a fragment.
            padding_side: which side to pad on; None for the tokenizer's default.
            move_to_device: whether the result goes to the model's device.
            truncate: whether to cut at ``cfg.n_ctx``.

        Raises:
            AssertionError: if the model has no tokenizer.
        """
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            tokenizer, cfg = self.required_tokenizer(), self.cfg
            if cfg.tokenizer_prepends_bos is None:
                raise AssertionError("the tokenizer was assigned directly: call model.set_tokenizer(tokenizer) instead")
            if cfg.default_prepend_bos and not cfg.tokenizer_prepends_bos:
                input = get_input_with_manually_prepended_bos(tokenizer.bos_token, input)
            _refuse_no_text(input)
            encoded = tokenizer(
                input,
                return_tensors="pt",
                padding=True,
                truncation=truncate,
                max_length=cfg.n_ctx if truncate else None,
            )
            # The tokenizer returns floats for a text without tokens.
            tokens = encoded["input_ids"].long()
            if not cfg.default_prepend_bos and cfg.tokenizer_prepends_bos:
                tokens = get_tokens_with_bos_removed(tokenizer, tokens)
            return tokens.to(cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> Text:
        """The text of tokens: a string for rank 0 or 1, a list of strings for rank 2.

        Raises:
            ValueError: for a higher rank.
        """
        tokenizer = self.required_tokenizer()
        if not isinstance(tokens, Tensor):
            tokens = torch.tensor(tokens)
        if tokens.dim() > 2:
            raise ValueError(f"to_string takes tokens of rank 0, 1 or 2, not of shape {tuple(tokens.shape)}")
        decode = tokenizer.batch_decode if tokens.dim() == 2 else tokenizer.decode
        return decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
    ) -> Any:
        """Each token as a string: a list for a text or one row of tokens, a list of lists for a list of these.

        Raises:
            AssertionError: for tokens of more than one text.
            ValueError: for anything but a text, a list, a tensor or an array.
        """
        if isinstance(input, list):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
        tokenizer = self.required_tokenizer()
        if isinstance(input, str):
            tokens: Any = self.to_tokens(input, prepend_bos, padding_side)[0]
        elif isinstance(input, (Tensor, np.ndarray)):
            tokens = torch.atleast_1d(torch.as_tensor(input).squeeze())
            if tokens.dim() != 1:
                raise AssertionError(
                    f"to_str_tokens takes the tokens of one text, [pos] or [1, pos], not shape {tuple(input.shape)}; "
                    "pass a list of them for several"
                )
        else:
            raise ValueError(f"to_str_tokens takes a text, a list, or a tensor of tokens, not {type(input).__name__}")
        return tokenizer.batch_decode([[int(t)] for t in tokens.tolist()], clean_up_tokenization_spaces=False)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            AssertionError: if it is not.
        """
        tokens = self.to_tokens(string, prepend_bos=False).squeeze()
        if tokens.dim():
            pieces = self.to_str_tokens(string, prepend_bos=False)
            raise AssertionError(f"{string!r} is not a single token: it is {pieces}")
        return int(tokens)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id.

        Raises:
            AssertionError: if it is no int.
        """
        if not isinstance(int_token, int):
            raise AssertionError(f"to_single_str_token takes an int, not {type(int_token).__name__}")
        return str(self.to_str_tokens(torch.tensor([int_token]))[0])

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
    ) -> int:
        """The position of a token in a text or in tokens, ``[pos]`` or ``[1, pos]``.

        Args:
            mode: "first" or "last" occurrence.

        Raises:
            AssertionError: if the token does not occur, or there are several rows of tokens.
            ValueError: for another mode.
        """
        tokens = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else input
        if tokens.dim() == 2:
            if tokens.shape[0] != 1:
                raise AssertionError(f"tokens of rank 2 must be one text, [1, pos], not {tuple(tokens.shape)}")
            tokens = tokens[0]
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        positions = (tokens == wanted).nonzero().flatten()
        if not len(positions):
            raise AssertionError(f"the token {single_token!r} does not occur in the input")
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', not {mode!r}")
        return int(positions[0 if mode == "first" else -1])

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*batch d_model"]:
        """The unembedding vector of each token: the direction in the residual stream that its logit reads.

        Args:
            tokens: a string or int (one token), or a tensor of tokens of any shape.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(tokens, Tensor) and tokens.numel() > 1:
            return self.W_U[:, tokens.to(self.W_U.device)].movedim(0, -1)
        if isinstance(tokens, str):
            token = self.to_single_token(tokens)
        elif isinstance(tokens, int) or (isinstance(tokens, Tensor) and tokens.numel() == 1):
            token = int(tokens)
        else:
            raise ValueError(f"a token is a string, an int or a tensor, not {type(tokens).__name__}")
        return self.W_U[:, token]


def _refuse_no_text(input: Any) -> None:
    """Refuse what a tokenizer would fail on without saying why.

    Raises:
        IndexError: no text.
        ValueError: numbers.
    """
    if isinstance(input, (list, tuple)) and not input:
        raise IndexError("there is no text: the list is empty")
    if isinstance(input, int) or (isinstance(input, (list, tuple)) and all(isinstance(each, int) for each in input)):
        raise ValueError(f"{input!r} is no text. If these are tokens, pass a tensor: torch.tensor([[...]])")


def as_batch(tokens: Any) -> Int[Tensor, "batch pos"]:
    """Tokens given to the model, with a batch axis.

    Raises:
        TypeError: if they are no tensor of integers, or of another rank than 1 or 2.
    """
    if not isinstance(tokens, Tensor):
        is_list = isinstance(tokens, Sequence)
        hint = " (a list is taken as a list of texts: use torch.tensor(...) for tokens)" if is_list else ""
        raise TypeError(f"the model takes text or a tensor of tokens, not {type(tokens).__name__}{hint}")
    if tokens.is_floating_point():
        raise TypeError(
            "the model got a tensor of floats as tokens; to start from a residual stream, pass start_at_layer="
        )
    if tokens.dim() == 1:
        tokens = tokens[None]
    if tokens.dim() != 2:
        raise TypeError(f"tokens must have shape [batch, pos] or [pos], not {tuple(tokens.shape)}")
    return tokens
