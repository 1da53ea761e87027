"""How is each contender built from the same random GPT-2, offline?

TransformerLens resolves names on the hub only, so its config and checkpoint look-ups are answered from the local
directory; everything after that is its own code. TransformerBridge takes a local model or directory directly. It
replaces modules inside the HuggingFace object it wraps, so it gets an object of its own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

hf_logging.disable_progress_bar()


@dataclass(frozen=True)
class Size:
    """A GPT-2 shape and the prompt it is measured on."""

    name: str
    n_layers: int
    n_heads: int
    d_model: int
    n_ctx: int
    vocab: int
    prompt_length: int = 15


SIZES = {
    "small": Size("small", n_layers=12, n_heads=12, d_model=768, n_ctx=1024, vocab=50257),
    "tiny": Size("tiny", n_layers=2, n_heads=4, d_model=64, n_ctx=128, vocab=1000),
}


def save_checkpoint(size: Size, directory: Path) -> Path:
    """Write a random GPT-2 of this size, with a one-token tokenizer, as ``from_pretrained`` expects to find it."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=size.n_layers,
        n_head=size.n_heads,
        n_embd=size.d_model,
        n_positions=size.n_ctx,
        vocab_size=size.vocab,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.n_ctx = size.n_ctx  # in gpt2's own config.json too, and read by TransformerLens
    GPT2LMHeadModel(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    return directory


@contextmanager
def quiet() -> Iterator[None]:
    """Without TransformerLens' deprecation warnings and its line per loaded model."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield


def load_hf(directory: Path) -> Any:
    return GPT2LMHeadModel.from_pretrained(directory).eval()


def load_lensbridge(directory: Path, processed: bool = True) -> Any:
    from lensbridge import HookedTransformer

    load = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    return load(str(directory))


def load_lensbridge_raw(directory: Path) -> Any:
    return load_lensbridge(directory, processed=False)


def load_transformer_lens(directory: Path) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    config = GPT2Config.from_pretrained(directory)
    config.architectures = ["GPT2LMHeadModel"]

    def load_model(name: str, dtype: Any = None, **others: Any) -> GPT2LMHeadModel:
        return GPT2LMHeadModel.from_pretrained(directory, dtype=dtype)

    with (
        mock.patch.object(loading.AutoConfig, "from_pretrained", lambda *_, **__: config),
        mock.patch.object(loading.AutoModelForCausalLM, "from_pretrained", load_model),
    ):
        return HookedTransformer.from_pretrained("gpt2", tokenizer=AutoTokenizer.from_pretrained(directory))


def load_bridge(directory: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # Eager attention, as it asks for itself when it loads by name: its pattern hooks need it.
    hf = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager").eval()
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(directory), device="cpu"
    )


LOADERS: dict[str, Callable[[Path], Any]] = {
    "HuggingFace": load_hf,
    "lensbridge": load_lensbridge,
    "lensbridge, no processing": load_lensbridge_raw,
    "TransformerLens 3.9.0": load_transformer_lens,
    "TransformerBridge 3.9.0": load_bridge,
}


def load_all(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Every contender that can be built here, and for the others the reason why not."""
    loaded: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, load in LOADERS.items():
        try:
            with quiet():
                loaded[name] = load(directory)
        except Exception as error:  # a missing or broken contender is a line in the report, not the end of it
            missing[name] = f"{type(error).__name__}: {error}"
    return loaded, missing
