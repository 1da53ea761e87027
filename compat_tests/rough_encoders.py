"""Which encoders is the comparison made on?

Tiny ones with rough weights, as in `rough_models.py`: norms far from neutral, biases everywhere, attention far from
uniform. TransformerLens gets them through its own ``from_pretrained``, with what it would ask the hub for given to it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import HookedAudioEncoder as ReferenceAudio
from transformer_lens import HookedAudioEncoder as audio_module
from transformer_lens import HookedEncoder as ReferenceEncoder
from transformer_lens import HookedEncoderDecoder as ReferenceEncoderDecoder
from transformer_lens import loading_from_pretrained as reference_loading
from transformers import (
    BertConfig,
    BertForPreTraining,
    HubertConfig,
    HubertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from compat_tests.edits import EDITS, Hook

WORDS = "the cat sat on a mat and then dog saw mary give john drink when went to store".split()
VOCABULARY = 40


def rough(hf_model: Any, seed: int) -> Any:
    """Fill every parameter with random numbers of a size that suits what it is for."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf_model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name.lower()
        if norm and name.endswith("weight"):
            values = 1 + 0.4 * values
        elif parameter.dim() == 1:
            values = 0.3 * values
        elif "embed" in name or "shared" in name or "relative_attention_bias" in name:
            values = 0.8 * values + 0.2
        else:
            values = values * parameter[0].numel() ** -0.5
            attends = any(f".{part}." in name for part in ("query", "key", "q_proj", "k_proj", "q", "k"))
            values = values * (1.8 if attends else 1.0)
        with torch.no_grad():
            parameter.copy_(values)
    return hf_model.eval()


def tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    """Whole words; BERT's special tokens around sentences, or T5's at their end."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if special else ("$A </s>", "$A </s> $B </s>")
    specials = [(name, vocabulary[name]) for name in names]
    words.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="</s>",
        model_input_names=["input_ids", *(["token_type_ids"] if special else []), "attention_mask"],
    )


@cache
def bert(seed: int = 0) -> BertForPreTraining:
    """A BERT with both heads."""
    config = BertConfig(
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        architectures=["BertForMaskedLM"],
        attn_implementation="eager",
    )
    return rough(BertForPreTraining(config), seed)


@cache
def t5(gated: bool = False, tied: bool = True) -> T5ForConditionalGeneration:
    """A T5 whose heads do not fill the residual stream."""
    config = T5Config(
        d_model=18,
        d_kv=5,
        num_heads=3,
        d_ff=28,
        num_layers=2,
        vocab_size=VOCABULARY,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        n_positions=16,
        architectures=["T5ForConditionalGeneration"],
        attn_implementation="eager",
    )
    return rough(T5ForConditionalGeneration(config), 1)


@cache
def sound(kind: str = "hubert") -> Any:
    """A HuBERT or a wav2vec 2.0 with a small convolution in front; a frame is 6 samples, and begins with 10."""
    config_class, model_class = {
        "hubert": (HubertConfig, HubertModel),
        "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    }[kind]
    config = config_class(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_stride=[3, 2],
        conv_kernel=[4, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        architectures=[model_class.__name__],
        attn_implementation="eager",
    )
    return rough(model_class(config), 2)


def waves(lengths: tuple[int, ...] = (64, 40)) -> list[torch.Tensor]:
    """Random waveforms of these lengths."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, generator=generator) for length in lengths]


@contextmanager
def offline(hf_model: Any) -> Iterator[None]:
    """While open, TransformerLens reads this model and its config instead of asking the hub."""
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    module = __import__(audio_module.__module__, fromlist=["HubertModel"])
    with (
        mock.patch.object(reference_loading.AutoConfig, "from_pretrained", lambda *_, **__: hf_model.config),
        mock.patch.object(module.AutoFeatureExtractor, "from_pretrained", lambda *_, **__: extractor),
        mock.patch.object(module.HubertModel, "from_pretrained", lambda *_, **__: hf_model),
        mock.patch.object(module.Wav2Vec2Model, "from_pretrained", lambda *_, **__: hf_model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@cache
def reference(kind: str) -> Any:
    """The real ``transformer_lens`` 3.9.0 model on the weights of `bert`, `t5` or `sound`."""
    hf_model = copy.deepcopy({"bert": bert, "t5": t5}[kind]() if kind in ("bert", "t5") else sound(kind))
    with offline(hf_model):
        if kind == "bert":
            words = tokenizer()
            return ReferenceEncoder.from_pretrained("bert-base-cased", hf_model=hf_model, tokenizer=words, device="cpu")
        if kind == "t5":
            words = tokenizer(special=False)
            return ReferenceEncoderDecoder.from_pretrained("t5-small", hf_model=hf_model, tokenizer=words, device="cpu")
        name = "facebook/hubert-base-ls960" if kind == "hubert" else "facebook/wav2vec2-base"
        return ReferenceAudio.from_pretrained(name, hf_model=hf_model, device="cpu")


def out_of_place(edit: Hook) -> Hook:
    """The same edit on a copy: 3.9.0 lets an edit in place change what other points have cached before."""

    def edited(value: torch.Tensor, hook: Any) -> torch.Tensor:
        copy = value.clone()
        result = edit(copy, hook)
        return copy if result is None else result

    return edited


#: The edits that are made at every point in every run; the others are for ``-m slow``.
QUICK = ("noise", "in place")


def edits_at(names: list[str]) -> list[Any]:
    """Every edit at every point, but a scale of zero: it makes NaN, which ends at 3.9.0's next pattern, not at HF's."""
    chosen = [(name, edit) for name in names for edit in EDITS if (name[-5:], edit) != ("scale", "zero")]
    return [pytest.param(*pair, marks=() if pair[1] in QUICK else pytest.mark.slow) for pair in chosen]


@contextmanager
def flags(mine: Any, theirs: Any, *names: str) -> Iterator[None]:
    """Fields of both configs that are true for the time of the context."""
    for name in names:
        setattr(mine.cfg, name, True)
        setattr(theirs.cfg, name, True)
    try:
        yield
    finally:
        for name in names:
            setattr(mine.cfg, name, False)
            setattr(theirs.cfg, name, False)
