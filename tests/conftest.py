"""What do the unit tests run on?

A tiny GPT-2 of transformers' own class with *rough* weights: every gain, bias and mean is random and far from its
neutral value, so that a forgotten bias or centring step shows, and attention is far from uniform. Nothing here needs
the network.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lensbridge import HookedTransformer

#: Every processing option off: what is shown is HuggingFace's own.
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
VOCAB = 290
CORPUS = ["The cat sat on the mat and then the dog saw Mary give John a drink."]


def build_hf(
    n_layers: int = 2, n_heads: int = 4, d_model: int = 20, attention: str = "eager", seed: int = 0, **options: Any
) -> GPT2LMHeadModel:
    """A rough GPT-2, the same for the same arguments; in training mode off, as ``from_pretrained`` leaves a model."""
    settings = {"n_positions": 24, "vocab_size": VOCAB, "tie_word_embeddings": False} | options
    config = GPT2Config(
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=d_model,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
        architectures=["GPT2LMHeadModel"],
        **settings,
    )
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.4 if parameter.dim() == 1 else 0.8 if ".w" in name else 1.5 * d_model**-0.5
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.1
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models run faster on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE like GPT-2's; ``<|endoftext|>`` is token 0, and bos, eos and unk."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    """A fresh object each time, because ``set_tokenizer`` may set special tokens in place."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def new_hf() -> Callable[..., GPT2LMHeadModel]:
    """`build_hf`, for tests that need a HF model of their own."""
    return build_hf


@pytest.fixture
def new_lens(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """A function that hooks a HF model (a fresh one if none is given); ``raw=True`` turns all processing off."""

    def build(hf_model: Any = None, raw: bool = False, cls: Any = HookedTransformer, **arguments: Any) -> Any:
        arguments = (RAW if raw else {}) | {"tokenizer": tokenizer} | arguments
        return cls.from_pretrained("gpt2", hf_model=build_hf() if hf_model is None else hf_model, **arguments)

    return build


@pytest.fixture
def hf() -> GPT2LMHeadModel:
    """A rough GPT-2 with two layers, four heads of width 5 and 24 positions."""
    return build_hf()


@pytest.fixture
def lens(hf: GPT2LMHeadModel, new_lens: Callable[..., Any]) -> Any:
    """``hf`` with TransformerLens' default processing."""
    return new_lens(hf)


@pytest.fixture
def raw(hf: GPT2LMHeadModel, new_lens: Callable[..., Any]) -> Any:
    """``hf`` without processing."""
    return new_lens(hf, raw=True)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of seven tokens, none of them special."""
    return torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def assert_untouched() -> Callable[[nn.Module, Any], None]:
    """A check that no handle of nnsight's, no hook and no memory of a run is left on a HF model and its lens."""

    def check(hf: nn.Module, lens: Any) -> None:
        left = [name for name, module in hf.named_modules() if {"forward", "__nnsight__"} & module.__dict__.keys()]
        assert left == []
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
        assert lens.list_hooks() == {} and lens.context_level == 0
        assert lens.interior.engine._running == [] and not lens.is_caching

    return check


@pytest.fixture(params=[False, True], ids=["raw", "processed"])
def either(request: pytest.FixtureRequest, raw: Any, lens: Any) -> Any:
    """``raw``, then ``lens``."""
    return lens if request.param else raw
