"""Is the bundled model what ``scores.json`` says, and is it made by the script that says so?

Plain transformers and torch: the scores are computed here a second time, in other words and on other samples, so that a
mistake in the script's measurement shows as a disagreement.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lensbridge.assets import TOY_DIRECTORY
from lensbridge.assets.prompts import (
    HELD_OUT_TEMPLATES,
    NAMES,
    OBJECTS,
    PLACES,
    TEMPLATES,
    ioi_prompts,
    is_held_out,
    repeated_tokens,
)

BOS = "<|endoftext|>"
SENTENCE = "When Mary and John went to the store, John gave a drink to"
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_toy.py"
#: How far a mean over fresh samples may be from the written one; about four standard errors of the samples used here.
ATTENTION_MARGIN = 0.04
LOSS_MARGIN = 0.15
ACCURACY_MARGIN = 0.04
LOGIT_MARGIN = 0.8

tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TOY_DIRECTORY)
WORDS = [token for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))) if token.isascii()]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(TOY_DIRECTORY, attn_implementation="eager")


@pytest.fixture(scope="module")
def scores() -> dict[str, Any]:
    return json.loads((TOY_DIRECTORY / "scores.json").read_text(encoding="utf-8"))["scores"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The training script as a module; torch's settings, which it changes, come back afterwards."""
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("train_toy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_directory_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in TOY_DIRECTORY.iterdir()}
    assert {"config.json", "model.safetensors", "scores.json", "tokenizer.json", "tokenizer_config.json"} <= set(sizes)
    assert sum(sizes.values()) < 5_000_000


def test_it_loads_without_a_network_and_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # transformers' own logger hands nothing on to the root, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained(TOY_DIRECTORY)
        tokens = AutoTokenizer.from_pretrained(TOY_DIRECTORY)(BOS + SENTENCE, return_tensors="pt")
        assert tokens.input_ids[0, 0] == loaded.config.bos_token_id
        loaded(tokens.input_ids)
    assert type(loaded) is GPT2LMHeadModel
    assert [record.message for record in caplog.records] == []


def test_it_is_a_small_gpt2_without_dropout(model: GPT2LMHeadModel) -> None:
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (4, 4, 128, 128)
    assert config.activation_function == "gelu_new"
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert {config.attn_pdrop, config.embd_pdrop, config.resid_pdrop} == {0.0}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gains_and_biases_have_moved(model: GPT2LMHeadModel) -> None:
    """What folds a norm or centres a weight must matter on this model."""
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    for name, vector in vectors.items():
        neutral = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        assert (vector - neutral).abs().mean() > 1e-3, name


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_special_tokens_are_gpt2s() -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.encode("") == []
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == BOS
    assert tokenizer.encode(BOS) == [tokenizer.bos_token_id] == [len(tokenizer) - 1]


@pytest.mark.parametrize("space", ["", " "])
def test_a_name_is_one_token(space: str) -> None:
    lengths = {name: len(tokenizer.encode(space + name)) for name in NAMES}
    assert set(lengths.values()) == {1}, lengths


def test_every_word_of_a_prompt_is_one_token() -> None:
    for prompt in ioi_prompts(200, seed=0, templates=TEMPLATES + HELD_OUT_TEMPLATES):
        words = re.findall(r" ?\w+|[.,]", prompt.prompt)
        assert [tokenizer.decode([token]) for token in tokenizer.encode(prompt.prompt)] == words
    assert {len(tokenizer.encode(f" {word}")) for word in (*PLACES, *OBJECTS)} == {1}


@given(st.lists(st.sampled_from(WORDS), max_size=20).map(lambda words: "".join(words).replace("Ġ", " ")))
@settings(max_examples=50, deadline=None)
def test_words_come_back(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert bool(tokens) == bool(text)


# --- the scores ------------------------------------------------------------------------------------------------------


def random_rows(half: int, seed: int, batch: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return repeated_tokens(len(tokenizer) - 1, batch, half, tokenizer.bos_token_id, generator)


def token_losses(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token but the first, at the column of that token minus one."""
    with torch.no_grad():
        return cross_entropy(model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


def test_attention_scores_are_the_written_ones(model: GPT2LMHeadModel, scores: dict[str, Any]) -> None:
    half = 40
    with torch.no_grad():
        patterns = model(random_rows(half, seed=77), output_attentions=True).attentions
    induction, previous = {}, {}
    for layer, pattern in enumerate(patterns):
        for head in range(pattern.shape[1]):
            mean = pattern[:, head].mean(0)
            second = range(half + 1, 2 * half + 1)
            induction[f"{layer}.{head}"] = sum(mean[q, q - half + 1].item() for q in second) / half
            previous[f"{layer}.{head}"] = sum(mean[q, q - 1].item() for q in range(1, 2 * half + 1)) / (2 * half)
    for found, written in (
        (induction, scores["induction_head"]),
        (previous, scores["previous_token_head"]),
    ):
        assert found[written["head"]] == pytest.approx(written["score"], abs=ATTENTION_MARGIN)
        assert max(found.values()) <= found[written["head"]] + ATTENTION_MARGIN
        assert found[written["head"]] >= 0.5


def test_losses_are_the_written_ones(model: GPT2LMHeadModel, scores: dict[str, Any]) -> None:
    losses = token_losses(model, random_rows(40, seed=78))
    written = scores["repeated_tokens_loss"]
    assert losses[:, :40].mean().item() == pytest.approx(written["first_copy"], abs=LOSS_MARGIN)
    assert losses[:, 41:].mean().item() == pytest.approx(written["second_copy"], abs=LOSS_MARGIN)
    assert written["second_copy"] < written["first_copy"] - 5


# Training ended on blocks of 32 tokens and more; much shorter and much longer ones are copied less well.
@pytest.mark.parametrize("half", [24, 50])
def test_induction_holds_at_other_lengths(model: GPT2LMHeadModel, half: int) -> None:
    losses = token_losses(model, random_rows(half, seed=79))
    assert losses[:, half + 1 :].mean() < losses[:, :half].mean() - 5


@pytest.mark.parametrize("part", ["held_out_pairs", "held_out_templates"])
def test_ioi_scores_are_the_written_ones(model: GPT2LMHeadModel, scores: dict[str, Any], part: str) -> None:
    templates = TEMPLATES if part == "held_out_pairs" else HELD_OUT_TEMPLATES
    differences, first = [], []
    for prompt in ioi_prompts(400, seed=79, templates=templates, pairs="held_out"):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(BOS + prompt.prompt)])).logits[0, -1]
        right, wrong = (tokenizer.convert_tokens_to_ids(answer.replace(" ", "Ġ")) for answer in prompt.answers)
        differences.append((logits[right] - logits[wrong]).item())
        first.append(logits.argmax().item() == right)
    written = scores["ioi"][part]
    accuracy = sum(difference > 0 for difference in differences) / len(differences)
    mean = sum(differences) / len(differences)
    assert accuracy == pytest.approx(written["accuracy"], abs=ACCURACY_MARGIN)
    assert sum(first) / len(first) == pytest.approx(written["top_1"], abs=ACCURACY_MARGIN)
    assert mean == pytest.approx(written["logit_difference"], abs=LOGIT_MARGIN)
    assert accuracy > 0.9
    assert mean > 2


def test_unrelated_names_leave_the_answer_open(model: GPT2LMHeadModel) -> None:
    """With the third name new, neither of the first two is the answer; with the names swapped, the other one is."""
    unrelated, swapped = [], []
    for prompt in ioi_prompts(200, seed=80, templates=TEMPLATES):
        for text, (right, wrong), found in (
            (prompt.unrelated, prompt.unrelated_names[:2], unrelated),
            (prompt.swapped, (prompt.io, prompt.s), swapped),
        ):
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer.encode(BOS + text)])).logits[0, -1]
            found.append((logits[tokenizer.encode(f" {right}")] - logits[tokenizer.encode(f" {wrong}")]).item())
    assert abs(sum(unrelated) / len(unrelated)) < 1
    assert sum(swapped) / len(swapped) < -2


def test_one_layer_is_not_enough(scores: dict[str, Any]) -> None:
    """Both behaviours are made by several layers: the same model without its later ones shows neither."""
    cut = AutoModelForCausalLM.from_pretrained(TOY_DIRECTORY)
    cut.transformer.h = cut.transformer.h[:1]
    losses = token_losses(cut, random_rows(40, seed=81))
    assert losses[:, 41:].mean() > scores["repeated_tokens_loss"]["second_copy"] + 3


# --- the prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 0, 7])
def test_repeated_tokens_has_the_block_twice(bos: int | None) -> None:
    rows = repeated_tokens([3, 5, 9], 6, 4, bos, torch.Generator().manual_seed(0))
    start = 0 if bos is None else 1
    assert rows.shape == (6, start + 8)
    assert torch.equal(rows[:, start : start + 4], rows[:, start + 4 :])
    assert set(rows[:, start:].flatten().tolist()) == {3, 5, 9}
    assert rows[:, :start].flatten().tolist() == [bos] * 6 * start
    assert torch.equal(rows, repeated_tokens(torch.tensor([3, 5, 9]), 6, 4, bos, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("vocab", "half"), [(10, 0), ([], 3), (0, 3)])
def test_repeated_tokens_needs_something_to_repeat(vocab: Any, half: int) -> None:
    with pytest.raises(ValueError, match="at least one id"):
        repeated_tokens(vocab, 2, half)


def test_ioi_prompts_say_the_subject_twice_and_the_answer_once() -> None:
    prompts = ioi_prompts(100, seed=3)
    for prompt in prompts:
        names = [word for word in re.findall(r"\w+", prompt.prompt) if word in NAMES]
        abba = [prompt.io, prompt.s, prompt.s]
        assert names == (abba if prompt.order == "ABBA" else [prompt.s, prompt.io, prompt.s])
        swapped = [word for word in re.findall(r"\w+", prompt.swapped) if word in NAMES]
        assert swapped == [*names[:2], prompt.io]
        unrelated = tuple(word for word in re.findall(r"\w+", prompt.unrelated) if word in NAMES)
        assert unrelated == prompt.unrelated_names
        assert len({*unrelated, prompt.io, prompt.s}) == 5
        assert prompt.answers == (f" {prompt.io}", f" {prompt.s}")
        lengths = {len(tokenizer.encode(text)) for text in (prompt.prompt, prompt.swapped, prompt.unrelated)}
        assert len(lengths) == 1
    assert [prompt.order for prompt in prompts] == ["ABBA", "BABA"] * 50
    assert len({prompt.template for prompt in prompts}) == len(TEMPLATES)


def test_ioi_prompts_are_the_same_for_the_same_seed() -> None:
    assert ioi_prompts(20, seed=5) == ioi_prompts(20, seed=5)
    assert ioi_prompts(20, seed=5) != ioi_prompts(20, seed=6)


def test_held_out_pairs_are_a_part_of_their_own() -> None:
    for pairs, expected in (("train", {False}), ("held_out", {True}), ("all", {False, True})):
        prompts = ioi_prompts(100, seed=1, pairs=pairs)
        assert {is_held_out(prompt.io, prompt.s) for prompt in prompts} == expected
    assert is_held_out("Mary", "John") == is_held_out("John", "Mary")


def test_held_out_templates_are_new_and_of_known_words() -> None:
    assert not set(TEMPLATES) & set(HELD_OUT_TEMPLATES)
    known = {word for template in TEMPLATES for word in re.findall(r"\w+", template)}
    assert {word for template in HELD_OUT_TEMPLATES for word in re.findall(r"\w+", template)} <= known


def test_no_name_opens_a_prompt() -> None:
    """GPT-2 has other tokens for a name without its space, and not always one."""
    assert not [template for template in TEMPLATES + HELD_OUT_TEMPLATES if template.startswith("{")]


def test_ioi_prompts_need_names_and_templates() -> None:
    with pytest.raises(ValueError, match="five different names"):
        ioi_prompts(1, names=["Mary", "John", "Tom", "Tom", "Amy"])
    with pytest.raises(ValueError, match="one template"):
        ioi_prompts(1, templates=[])
    five = next(
        [name, *others]
        for name in NAMES
        for others in [[other for other in NAMES if other != name and not is_held_out(name, other)][:4]]
        if not any(is_held_out(one, other) for one in others for other in others if one != other)
    )
    with pytest.raises(ValueError, match="'held_out' part"):
        ioi_prompts(1, names=five, pairs="held_out")


# --- the script ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_scripts(script: ModuleType, tmp_path: Path) -> None:
    script.build_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TOY_DIRECTORY / name).read_text())


def test_the_script_writes_the_same_model_for_the_same_seed(script: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = str(tmp_path / name)
        script.main(["--out", out, "--steps", "2", "--seed", seed, "--threads", "1", "--samples", "16"])
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    bundled = json.loads((TOY_DIRECTORY / "scores.json").read_text())
    written = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert written.keys() == bundled.keys()
    assert written["scores"].keys() == bundled["scores"].keys()
    assert written["meaning"] == bundled["meaning"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in TOY_DIRECTORY.iterdir()}


def test_the_bundled_model_comes_from_the_defaults(script: ModuleType) -> None:
    bundled = json.loads((TOY_DIRECTORY / "scores.json").read_text())["settings"]
    defaults = vars(script.parse_arguments([]))
    assert bundled == {key: defaults[key] for key in bundled}
    assert set(bundled) == set(defaults) - {"out"}
