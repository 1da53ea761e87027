"""Are the training checkpoints of Pythia and Stanford's GPT-2 those that 3.9.0 loads from HuggingFace's cache?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer as ReferenceTransformer

from compat_tests.comparison import caches_close, close, outcome, same_outcome
from compat_tests.hub_repositories import cached_file, name_revision, repository_in
from compat_tests.rough_families import FAMILIES, rough_model
from compat_tests.rough_models import Shape, load_tokenizer, rough_gpt2, save_tokenizer
from lensbridge import HookedTransformer
from lensbridge.errors import ModelNotFoundError

PYTHIA, PYTHIA_V0 = "EleutherAI/pythia-70m", "EleutherAI/pythia-70m-v0"
STANFORD = "stanford-crfm/alias-gpt2-small-x21"
#: What of a repository is in the cache: its revisions.
REVISIONS = {
    PYTHIA: ("main", "step0", "step512", "step143000"),
    PYTHIA_V0: ("main", "step1000", "step143000"),
    STANFORD: ("main", "checkpoint-0", "checkpoint-150", "checkpoint-400000"),
}


def made(name: str, seed: int) -> Any:
    if name == STANFORD:
        return rough_gpt2(Shape(seed=seed, options=(("scale_attn_by_inverse_layer_idx", True),)))
    return rough_model(FAMILIES["gpt_neox"], seed)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HuggingFace's cache with a few checkpoints of each, with weights of their own."""
    cache = tmp_path_factory.mktemp("hub")
    for name, revisions in REVISIONS.items():
        for seed, revision in enumerate(revisions):
            saved, commit = tmp_path_factory.mktemp("saved"), f"{seed:040x}"
            made(name, seed).save_pretrained(saved)
            for file in saved.iterdir():
                cached_file(repository_in(cache, name), commit, file.name, file.read_bytes())
            name_revision(repository_in(cache, name), commit, revision)
    return cache


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(3))


def both(name: str, cache: Path, tokenizer: Path, **asked: Any) -> tuple[Any, Any]:
    options = {"cache_dir": str(cache), "device": "cpu", **asked}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ReferenceTransformer.from_pretrained(name, tokenizer=load_tokenizer(tokenizer), **options)
    return HookedTransformer.from_pretrained(name, tokenizer=load_tokenizer(tokenizer), **options), theirs


ASKED: list[tuple[str, dict[str, int], int]] = [
    ("pythia-70m", {"checkpoint_index": 0}, 0),
    ("pythia-70m", {"checkpoint_index": 10}, 512),
    ("pythia-70m", {"checkpoint_value": 512}, 512),
    ("pythia-70m", {"checkpoint_label": 143_000}, 143_000),
    ("pythia-70m-v0", {"checkpoint_index": 0}, 1000),
    ("pythia-70m-v0", {"checkpoint_value": 143_000}, 143_000),
    ("stanford-gpt2-small-a", {"checkpoint_index": 11}, 150),
    ("stanford-gpt2-small-a", {"checkpoint_value": 0}, 0),
    ("stanford-gpt2-small-a", {"checkpoint_label": 400_000}, 400_000),
]


@pytest.mark.parametrize(("name", "asked", "step"), ASKED, ids=str)
def test_checkpoints(
    name: str, asked: dict[str, int], step: int, cache: Path, tokenizer: Path, tokens: torch.Tensor
) -> None:
    mine, theirs = both(name, cache, tokenizer, **asked)
    fields = ("from_checkpoint", "checkpoint_index", "checkpoint_value", "checkpoint_label_type", "model_name")
    assert [getattr(mine.cfg, name) for name in fields] == [getattr(theirs.cfg, name) for name in fields]
    assert mine.cfg.checkpoint_value == step
    with torch.no_grad():
        (logits, found), (expected, reference) = (model.run_with_cache(tokens) for model in (mine, theirs))
    close("logits", logits, expected)
    caches_close(found, reference)
    trained = HookedTransformer.from_pretrained(name, cache_dir=str(cache), device="cpu")
    assert trained.cfg.from_checkpoint is False
    assert not torch.allclose(trained(tokens), logits, atol=0.1)


def test_a_revision_says_the_same(cache: Path, tokens: torch.Tensor) -> None:
    for name, revision, step in ((PYTHIA, "step512", 512), (STANFORD, "checkpoint-150", 150)):
        options = {"cache_dir": str(cache), "device": "cpu"}
        by_step = HookedTransformer.from_pretrained(name, checkpoint_value=step, **options)
        by_revision = HookedTransformer.from_pretrained(name, revision=revision, **options)
        assert torch.equal(by_step(tokens), by_revision(tokens))
        with pytest.raises(ValueError, match="a checkpoint is a revision"):
            HookedTransformer.from_pretrained(name, revision=revision, checkpoint_value=step, **options)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("pythia-70m", {"checkpoint_value": 3}, r"closest are 2 \(checkpoint_index=2\) and 4 \(checkpoint_index=3\)"),
        ("pythia-70m", {"checkpoint_index": 154}, "has 154 checkpoints, so none at index 154"),
        ("pythia-70m-v0", {"checkpoint_value": 512}, r"the closest is 1000 \(checkpoint_index=0\)"),
        ("stanford-gpt2-small-a", {"checkpoint_label": 7}, "closest are 0 .* and 10 "),
        ("gpt2", {"checkpoint_value": 7}, "has no numbered checkpoints"),
    ],
)
def test_wrong_ones(name: str, asked: dict[str, int], message: str, cache: Path, tokenizer: Path) -> None:
    with pytest.raises(Exception, match=message) as raised:
        HookedTransformer.from_pretrained(name, cache_dir=str(cache), **asked)
    if name == "gpt2":
        # It is not in the cache, which 3.9.0 looks at first.
        assert isinstance(raised.value, ValueError)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, theirs = (
            outcome(lambda kind=kind: kind.from_pretrained(name, cache_dir=str(cache), **asked))
            for kind in (HookedTransformer, ReferenceTransformer)
        )
    same_outcome("checkpoint", mine, theirs)


def test_a_checkpoint_that_is_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'pythia-70m' \(the hub id '\S+', revision 'step2000'\)"):
        HookedTransformer.from_pretrained("pythia-70m", cache_dir=str(cache), checkpoint_value=2000)
