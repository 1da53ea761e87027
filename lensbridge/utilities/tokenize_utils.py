"""Which tokens are text, and which are a BOS or padding put around it?

The functions about BOS and padding read only a tokenizer's ``padding_side`` and special token ids. Padding is what
repeats the pad token at the padded end of a row; the same token in the middle of a text is text. Where BOS and pad are
one token (GPT-2), the last one of a left padding is the BOS.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int

from .hf_utils import keep_single_column
from .tensors import get_cumsum_along_dim

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


def _rows_of_tokens(
    examples: dict[str, list[str]], tokenizer: Any, column: str, length: int, add_bos_token: bool
) -> dict[str, np.ndarray]:
    """The texts of one batch joined by EOS and cut into rows of ``length`` tokens (the BOS included)."""
    texts = examples[column]
    if not texts:
        return {"tokens": np.array([], dtype=np.int64)}
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    joined: list[int] = list(encoded[0])
    for tokens in encoded[1:]:
        joined.append(tokenizer.eos_token_id)
        joined.extend(tokens)
    width = length - 1 if add_bos_token else length
    if len(joined) < width:
        padding = tokenizer.eos_token_id if tokenizer.pad_token is None else tokenizer.pad_token_id
        joined.extend([padding] * (width - len(joined)))
    n_rows = len(joined) // width
    rows: np.ndarray = np.array(joined[: n_rows * width], dtype=np.int64).reshape(n_rows, width)
    if add_bos_token:
        rows = np.insert(rows, 0, tokenizer.bos_token_id, axis=1)
    return {"tokens": rows}


def tokenize_and_concatenate(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = 10,
    set_format: bool = True,
) -> Dataset | IterableDataset:
    """Turn a HuggingFace data set of texts into one of token rows, all of ``max_length`` tokens and without padding.

    Texts are tokenized, joined with EOS between them and cut into rows, in the column ``"tokens"``; what does not fill
    the last row of a batch is dropped. Only a batch too short for a single row is padded (with EOS where the tokenizer
    has no pad token). With ``add_bos_token`` each row begins with BOS. ``num_proc`` processes work in parallel (None:
    in this process); a ``streaming`` data set is tokenized while it is read. With ``set_format`` the rows are tensors.

    Raises:
        AssertionError: the tokenizer has no EOS token.
        ValueError: a BOS was asked for that the tokenizer does not have.
    """
    if tokenizer.eos_token is None:
        raise AssertionError("tokenize_and_concatenate joins texts with the EOS token, and this tokenizer has none.")
    if add_bos_token and tokenizer.bos_token_id is None:
        raise ValueError("This tokenizer has no BOS token; pass add_bos_token=False.")
    to_rows = functools.partial(
        _rows_of_tokens, tokenizer=tokenizer, column=column_name, length=max_length, add_bos_token=add_bos_token
    )
    in_parallel = {} if streaming else {"num_proc": num_proc}
    texts = keep_single_column(dataset, column_name)
    rows = texts.map(to_rows, batched=True, remove_columns=[column_name], **in_parallel)
    return rows.with_format("torch") if set_format else rows


def _with_bos_switched_on(tokenizer: Any) -> Any:
    """A copy of the tokenizer that puts BOS in front of every text."""
    changed = copy.deepcopy(tokenizer)
    changed.add_bos_token = True
    return changed


def get_tokenizer_with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts BOS in front of every text: the given one if it does, else a changed copy of it.

    The copy is loaded again from where the tokenizer came from, because some tokenizers (LLaMA's) split a text
    differently when they add BOS themselves. A tokenizer that exists only in memory, or whose source is gone, is copied
    as it is. One without a BOS token, or whose BOS token cannot be added by its backend, is returned unchanged.
    """
    if tokenizer.bos_token is None:
        return tokenizer
    settings = copy.deepcopy(tokenizer.init_kwargs)
    source = settings.pop("name_or_path", None)
    adds_bos = settings.pop("add_bos_token", None)
    if getattr(tokenizer, "add_bos_token", False) if adds_bos is None else adds_bos:
        return tokenizer
    try:
        if not source:
            return _with_bos_switched_on(tokenizer)
        from transformers import AutoTokenizer

        try:
            reloaded = AutoTokenizer.from_pretrained(source, add_bos_token=True, **settings)
        except OSError:
            return _with_bos_switched_on(tokenizer)
    except ValueError:
        # The backend's template language has no way to write a special token with a colon in it.
        return tokenizer
    # Loading resets the side to the one in the files.
    reloaded.padding_side = tokenizer.padding_side
    return reloaded


def get_input_with_manually_prepended_bos(bos_token: str | None, input: str | list[str]) -> str | list[str]:
    """The text, or each text of a list, with the BOS token's text in front; unchanged where there is no BOS token."""
    if bos_token is None:
        return input
    return bos_token + input if isinstance(input, str) else [bos_token + text for text in input]


def _leading_padding(tokens: Int[torch.Tensor, "... pos"], pad_token_id: int | None) -> torch.Tensor:
    """Which tokens are pad tokens with nothing but pad tokens before them."""
    if pad_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return get_cumsum_along_dim(tokens != pad_token_id, -1) == 0


def _last_of(leading: torch.Tensor) -> torch.Tensor:
    """Only the last True of each row of leading Trues."""
    following = torch.cat([leading[..., 1:], torch.zeros_like(leading[..., :1])], dim=-1)
    return leading & ~following


def get_tokens_with_bos_removed(
    tokenizer: PreTrainedTokenizerBase, tokens: Int[torch.Tensor, "... pos"], padding_side: str | None = None
) -> Int[torch.Tensor, "... pos-1"]:
    """Tokens without the BOS of each row, which stands first, or after the padding on the left.

    ``padding_side`` None means the tokenizer's. Tokens of a tokenizer without a BOS token are returned unchanged.

    Raises:
        RuntimeError: BOS and pad are one token, the padding is on the left, and a row does not begin with that token.
    """
    if tokenizer.bos_token_id is None:
        return tokens
    if (padding_side or tokenizer.padding_side) == "right":
        return tokens[..., 1:]
    if tokenizer.bos_token_id == tokenizer.pad_token_id:
        is_bos = _last_of(_leading_padding(tokens, tokenizer.pad_token_id))
        if not is_bos.any(dim=-1).all():
            raise RuntimeError(f"No BOS to remove: a row does not begin with the BOS token {tokenizer.bos_token_id}.")
    else:
        first = (tokens == tokenizer.bos_token_id).int().argmax(dim=-1, keepdim=True)
        is_bos = torch.zeros_like(tokens, dtype=torch.bool).scatter(-1, first, True)
    return tokens[~is_bos].reshape(*tokens.shape[:-1], tokens.shape[-1] - 1)


def get_attention_mask(
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: Int[torch.Tensor, "... pos"],
    prepend_bos: bool,
    padding_side: str | None = None,
) -> Int[torch.Tensor, "... pos"]:
    """1 for text and 0 for padding, which is found on one side only: ``padding_side``, or the tokenizer's if None.

    Where BOS and pad are one token and ``prepend_bos`` says that there is a BOS, the last token of a left padding is
    that BOS and gets 1. Without a tokenizer or a pad token nothing is padding.
    """
    if tokenizer is None:
        return torch.ones_like(tokens)
    if (padding_side or tokenizer.padding_side) == "right":
        padding = _leading_padding(tokens.flip(-1), tokenizer.pad_token_id).flip(-1)
    else:
        padding = _leading_padding(tokens, tokenizer.pad_token_id)
        if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
            padding = padding & ~_last_of(padding)
    return (~padding).to(tokens.dtype)
