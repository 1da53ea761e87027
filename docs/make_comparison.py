"""What does the page ``docs/comparison.md`` say? How far each architecture is from TransformerLens 3.9.0, and from HF.

``python docs/make_comparison.py`` (a minute; it needs transformer-lens 3.9.0) loads the tiny rough models of the
comparison tests in both libraries and writes the largest difference of each. Where that is more than rounding,
HuggingFace's own log probabilities say which of the two is off.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAGE = Path(__file__).with_name("comparison.md")
sys.path.insert(0, str(PAGE.parent.parent))

#: Relative to the largest value at a point; what is above is explained.
TOLERANCE = 1e-4
HEAD = """\
# Compared with TransformerLens 3.9.0

<!-- Made by docs/make_comparison.py. -->

Tiny models with rough random weights, one of each architecture that 3.9.0 loads, in both libraries: every activation
of a run with a cache, and every weight. The difference is the largest one relative to the largest value of the same
activation or weight. `compat_tests/` compares the same, and edits, gradients, padding, key-value caches and generation.

The last two columns say how far log probabilities are from HuggingFace's own (in nats, on the same tokens), here and
in 3.9.0 with the same options. Where the two libraries differ, they show which one computes another function:

- Gemma 1: 3.9.0 has the exact GELU, HuggingFace its tanh approximation
- GPT-OSS, default processing: a part of each row of the pattern goes to a sink, so that biases of the values cannot be
  folded into that of the output; 3.9.0 folds them nevertheless. It is compared without that option.

3.9.0 shows the one key and value of `GPTBigCodeForCausalLM` once for each head; they are compared as it shows them. The
first Qwen is no part of transformers 5: the model is a stand-in with its layout, and its record is measured.

"""


class Row(NamedTuple):
    """One model in one form."""

    architecture: str
    processing: str
    count: int
    difference: float
    where: str
    ours: float | None = None
    theirs: float | None = None

    def line(self) -> str:
        def nats(value: float | None) -> str:
            return "" if value is None else "0" if value == 0 else f"{value:.0e}"

        cells = (f"`{self.architecture}`", self.processing, str(self.count), f"{self.difference:.0e}")
        where = f"`{self.where}`" if self.difference else ""
        return f"| {' | '.join((*cells, where, nats(self.ours), nats(self.theirs)))} |"


def largest(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[int, float, str]:
    """How many tensors there are, the largest relative difference, and at which kind of point."""
    comparison = importlib.import_module("compat_tests.comparison")
    assert mine.keys() == theirs.keys()
    found = [(comparison.relative_difference(mine[name], theirs[name]), comparison.template(name)) for name in theirs]
    return len(found), *max(found)


def off(logits: Tensor, expected: Tensor) -> float:
    """The largest difference of log probabilities."""
    return (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()


def weights(model: Any, unread: tuple[str, ...]) -> dict[str, Tensor]:
    """A model's weights, without what nothing reads."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith(unread)}


@torch.no_grad()
def decoders(tokenizer: Path) -> Iterator[Row]:
    """The language models."""
    families = importlib.import_module("compat_tests.test_families")
    rough = importlib.import_module("compat_tests.rough_families")
    tokens = families.tokens()
    for family, case in rough.FAMILIES.items():
        for processing, flags in families.PROCESSINGS.items():
            two = families.two_of(family, processing, tokenizer)
            expected = two.hf(tokens).logits
            (logits, mine), (_, theirs) = (model.run_with_cache(tokens) for model in two[:2])
            as_shipped = rough.reference(two.hf, case, families.load_tokenizer(tokenizer), **flags)(tokens)
            mine, theirs = (families.as_theirs(family, cache) for cache in (mine, theirs))
            mine, theirs = (
                {**cache, **weights(model, families.NOT_WEIGHTS)}
                for cache, model in zip((mine, theirs), two[:2], strict=True)
            )
            yield Row(
                f"{case.model_class}{family[family.index(' ') :] if ' ' in family else ''}",
                processing,
                *largest(mine, theirs),
                off(logits, expected),
                off(as_shipped, expected),
            )


@torch.no_grad()
def gpt2(tokenizer: Path) -> Iterator[Row]:
    """GPT-2, whose tests came first."""
    rough = importlib.import_module("compat_tests.rough_models")
    hf, tokens, loaded = rough.rough_gpt2(rough.SHAPES["two"]), rough.random_tokens(), rough.load_tokenizer(tokenizer)
    expected = hf(tokens).logits
    for processing, flags in rough.PROCESSINGS.items():
        two = rough.ours(hf, loaded, **flags), rough.tl_reference(hf, loaded, **flags)
        (logits, mine), (shipped, theirs) = (model.run_with_cache(tokens) for model in two)
        mine, theirs = (
            {**cache, **weights(model, ("mask", "IGNORE"))} for cache, model in zip((mine, theirs), two, strict=True)
        )
        yield Row("GPT2LMHeadModel", processing, *largest(mine, theirs), off(logits, expected), off(shipped, expected))


@torch.no_grad()
def santacoder(tokenizer: Path) -> Iterator[Row]:
    """The model with one key and value for all heads."""
    apart = importlib.import_module("compat_tests.test_santacoder")
    hf = apart.rough_model(apart.FAMILY)
    tokens = apart.random_tokens(2, 9)
    expected = hf(tokens).logits
    for processing, flags in (("raw", apart.NO_PROCESSING), ("default", apart.DEFAULT_PROCESSING)):
        two = apart.pair(hf, tokenizer, flags)
        (logits, mine), (shipped, theirs) = (model.run_with_cache(tokens) for model in two)
        heads = two[0].cfg.n_heads
        mine = {name: apart.one_for_all(name, value, heads) for name, value in mine.items()}
        mine |= {name: getattr(two[0], name).expand_as(getattr(two[1], name)) for name in apart.WEIGHTS}
        theirs = {**theirs, **{name: getattr(two[1], name) for name in apart.WEIGHTS}}
        compared = largest(mine, theirs)
        yield Row("GPTBigCodeForCausalLM", processing, *compared, off(logits, expected), off(shipped, expected))


@torch.no_grad()
def encoders() -> Iterator[Row]:
    """Encoders, encoders with decoders, and those of sound."""
    rough = importlib.import_module("compat_tests.rough_encoders")
    text, pairs, sound = (
        importlib.import_module(f"compat_tests.test_hooked_{name}")
        for name in ("encoder", "encoder_decoder", "audio_encoder")
    )
    cases: list[tuple[str, Callable[[], tuple[Any, Any]], tuple, dict[str, Any]]] = [
        ("BertForPreTraining", lambda: (text.ours(), text.THEIRS), (text.tokens(),), text.inputs("right")),
        ("T5ForConditionalGeneration", lambda: (pairs.ours(), pairs.THEIRS), (pairs.tokens(),), pairs.inputs()),
        ("HubertModel", lambda: (sound.ours("hubert"), rough.reference("hubert")), (sound.frames(),), {}),
        ("Wav2Vec2Model", lambda: (sound.ours("wav2vec2"), rough.reference("wav2vec2")), (sound.frames(),), {}),
    ]
    for name, models, given, options in cases:
        mine, theirs = (dict(model.run_with_cache(*given, **options)[1].items()) for model in models())
        yield Row(name, "raw", *largest(mine, theirs))


def rows() -> Iterator[Row]:
    """All rows of the table."""
    logging.disable(logging.WARNING)
    rough = importlib.import_module("compat_tests.rough_models")
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = rough.save_tokenizer(Path(directory))
        yield from gpt2(tokenizer)
        yield from decoders(tokenizer)
        yield from santacoder(tokenizer)
    yield from encoders()


def render() -> str:
    """The page."""
    lines = [row.line() for row in rows()]
    header = "| architecture | processing | compared | largest difference | at | from HuggingFace: here | 3.9.0 |"
    return HEAD + "\n".join([header, "|---|---|---|---|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
