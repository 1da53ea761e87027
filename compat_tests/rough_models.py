"""Which models is the comparison made on?

Tiny ones whose weights are *rough*: every norm gain, norm bias and projection bias is random and far from its neutral
value, the writing weights have a mean, and queries and keys are scaled up until attention is far from uniform. A map
that forgets a bias or a centring step is invisible on an untrained model and large on these.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens import HookedTransformer as ReferenceTransformer
from transformer_lens import loading_from_pretrained as reference_loading
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: What the tests look at: ``lensbridge``, or ``transformer_lens`` itself to check that the tests state true facts.
SUBJECT = os.environ.get("COMPAT_SUBJECT", "lensbridge")

PROCESSING_FLAGS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
NO_PROCESSING = dict.fromkeys(PROCESSING_FLAGS, False)
DEFAULT_PROCESSING = {**dict.fromkeys(PROCESSING_FLAGS, True), "refactor_factored_attn_matrices": False}
ALL_PROCESSING = dict.fromkeys(PROCESSING_FLAGS, True)

PROCESSINGS = {"raw": NO_PROCESSING, "default": DEFAULT_PROCESSING, "refactored": ALL_PROCESSING}

CORPUS = [
    "The cat sat on the mat and then the dog saw Mary give John a drink.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "Hello world, this is a small text. It has 12 numbers: 1 2 3 and a\nnew line.",
]
TOY_DIR = Path(__file__).parent.parent / "lensbridge" / "assets" / "toy"


@dataclass(frozen=True)
class Shape:
    """One tiny GPT-2: its sizes and the options that change its computation."""

    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 20
    n_ctx: int = 24
    vocab: int = 320
    seed: int = 0
    tie: bool = False
    activation: str = "gelu_new"
    options: tuple[tuple[str, Any], ...] = field(default=())


SHAPES = {
    "two": Shape(),
    "one": Shape(n_layers=1, n_heads=1, d_model=7, seed=1, tie=True),
    "three": Shape(n_layers=3, n_heads=3, d_model=27, seed=2, options=(("scale_attn_by_inverse_layer_idx", True),)),
    "relu": Shape(n_layers=1, n_heads=2, d_model=6, seed=3, activation="relu"),
    "exact gelu": Shape(n_heads=2, d_model=26, seed=4, tie=True, activation="gelu"),
    "unscaled": Shape(n_layers=1, n_heads=2, d_model=10, seed=5, options=(("scale_attn_weights", False),)),
    "eps": Shape(n_layers=2, n_heads=2, d_model=22, seed=6, options=(("layer_norm_epsilon", 1e-2),)),
}


def rough_gpt2(shape: Shape, attn_implementation: str = "eager") -> GPT2LMHeadModel:
    """A GPT-2 of this shape with rough weights, the same for the same shape."""
    config = GPT2Config(
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.d_model,
        n_positions=shape.n_ctx,
        vocab_size=shape.vocab,
        activation_function=shape.activation,
        tie_word_embeddings=shape.tie,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attn_implementation,
        # Both are in gpt2's config.json on the hub, and TransformerLens reads them.
        n_ctx=shape.n_ctx,
        architectures=["GPT2LMHeadModel"],
        **dict(shape.options),
    )
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1000 + shape.seed)

    def fill(parameter: torch.Tensor, scale: float, mean: float = 0.0) -> None:
        with torch.no_grad():
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))

    width = shape.d_model**-0.5
    fill(model.transformer.wte.weight, 0.8, 0.3)
    fill(model.transformer.wpe.weight, 0.4, -0.2)
    for block in model.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            fill(norm.weight, 0.4, 1.0)
            fill(norm.bias, 0.3)
        fill(block.attn.c_attn.weight, width)
        with torch.no_grad():
            queries_and_keys = block.attn.c_attn.weight[:, : 2 * shape.d_model]
            queries_and_keys.mul_(1.8 if dict(shape.options).get("scale_attn_weights", True) else 1.0)
        fill(block.attn.c_attn.bias, 0.4)
        fill(block.attn.c_proj.weight, width, 0.1 * width)
        fill(block.attn.c_proj.bias, 0.3, 0.1)
        fill(block.mlp.c_fc.weight, width)
        fill(block.mlp.c_fc.bias, 0.3)
        fill(block.mlp.c_proj.weight, 0.5 * width, 0.1 * width)
        fill(block.mlp.c_proj.bias, 0.3, 0.1)
    fill(model.transformer.ln_f.weight, 0.4, 1.0)
    fill(model.transformer.ln_f.bias, 0.3)
    if not shape.tie:
        fill(model.lm_head.weight, width, 0.05)
    return model


def random_tokens(batch: int = 2, length: int = 9, vocab: int = 320, seed: int = 0) -> torch.Tensor:
    """Token ids without the special tokens 0, 1 and 2, [batch, pos]."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


#: Special tokens by the kind of tokenizer. ``<|endoftext|>`` is id 0; ``<pad>`` and ``<bos>`` are 1 and 2.
TOKENIZER_KINDS: dict[str, dict[str, str]] = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "no bos": {"eos_token": "<|endoftext|>"},
    "own pad": {"bos_token": "<bos>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"},
}


@lru_cache(maxsize=1)
def byte_pair_tokenizer() -> Tokenizer:
    """A byte-level BPE as GPT-2's, trained on three sentences (about 300 tokens)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def save_tokenizer(directory: Path, kind: str = "gpt2") -> Path:
    """Write a tokenizer of this kind: TransformerLens reloads a tokenizer from where it came from."""
    special = TOKENIZER_KINDS[kind]
    PreTrainedTokenizerFast(tokenizer_object=byte_pair_tokenizer(), **special).save_pretrained(directory)
    return directory


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A fresh object each time, because ``set_tokenizer`` may set special tokens in place."""
    return AutoTokenizer.from_pretrained(directory)


@contextmanager
def config_from(hf_model: GPT2LMHeadModel) -> Iterator[None]:
    """While open, TransformerLens reads this model's config instead of asking the hub for gpt2's."""
    with (
        mock.patch.object(reference_loading.AutoConfig, "from_pretrained", lambda *_, **__: hf_model.config),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def tl_reference(hf_model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, **flags: Any) -> ReferenceTransformer:
    """The real ``transformer_lens`` 3.9.0 model on these weights, through its own ``from_pretrained``."""
    with config_from(hf_model):
        return ReferenceTransformer.from_pretrained("gpt2", hf_model=hf_model, tokenizer=tokenizer, **flags)


def ours(hf_model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, **flags: Any) -> Any:
    """The model under test on these weights."""
    if SUBJECT == "transformer_lens":
        return tl_reference(hf_model, tokenizer, **flags)
    from lensbridge import HookedTransformer

    return HookedTransformer.from_pretrained("gpt2", hf_model=hf_model, tokenizer=tokenizer, **flags)
