"""Which model do the cases use, and how is it loaded by whatever is called ``transformer_lens``?

The bundled one, under the name ``gpt2``, whose config both libraries then take from it instead of asking the hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import AutoTokenizer, GPT2LMHeadModel

from lensbridge.assets import TOY_DIRECTORY

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"


def hf_model() -> GPT2LMHeadModel:
    """The bundled model, with attention whose pattern can be seen."""
    model = GPT2LMHeadModel.from_pretrained(TOY_DIRECTORY, attn_implementation="eager").eval()
    # Where transformers 4 had it, which TransformerLens reads.
    model.config.n_ctx = model.config.n_positions
    return model


@contextmanager
def offline(hf: GPT2LMHeadModel) -> Iterator[None]:
    """The config of ``gpt2`` is this model's."""
    with mock.patch.object(transformers.AutoConfig, "from_pretrained", lambda *_, **__: hf.config):
        yield


def load(cls: Any, method: str = "from_pretrained", **options: Any) -> Any:
    """The bundled model as an instance of a class derived from HookedTransformer, by one of its constructors."""
    hf = hf_model()
    tokenizer = AutoTokenizer.from_pretrained(TOY_DIRECTORY)
    with offline(hf):
        return getattr(cls, method)("gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu", **options)


def generator(seed: int = 0) -> torch.Generator:
    """A source of random numbers that is the same in both runs."""
    return torch.Generator().manual_seed(seed)
