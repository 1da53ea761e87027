"""Are models in TransformerLens' own format the models that 3.9.0 loads from the same files?"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import loading_from_pretrained as reference_loading

from compat_tests.comparison import Outcome, caches_close, close, outcome, same_outcome, weights_close
from compat_tests.hub_repositories import KINDS, Kind, add, listed, ours, repository_in, theirs
from compat_tests.rough_models import PROCESSING_FLAGS, save_tokenizer
from lensbridge import HookedTransformer, loading_from_pretrained
from lensbridge.errors import ModelNotFoundError

#: 3.9.0 never sets it.
NEVER_SET = "layer_norm_folding"
RAW = dict.fromkeys(PROCESSING_FLAGS, False)
#: Models whose last norm sees the mean while the others do not, for which 3.9.0's processing is not exact.
INEXACT = [name for name, kind in KINDS.items() if name.endswith("-old")]
CHECKPOINTED = [name for name, kind in KINDS.items() if kind.checkpoints]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """HuggingFace's cache with every kind of repository."""
    directory = tmp_path_factory.mktemp("hub")
    for kind in KINDS.values():
        add(directory, kind, tokenizer)
    return directory


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))


def floats(model: Any) -> dict[str, torch.Tensor]:
    """The weights in a model's state dict."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.endswith((".mask", ".IGNORE"))}


def configs_agree(mine: Any, other: Any) -> None:
    mine, other = mine.cfg.to_dict(), other.cfg.to_dict()
    assert {name: mine[name] for name in other if name != NEVER_SET} == {
        name: other[name] for name in other if name != NEVER_SET
    }


def runs_agree(mine: Any, other: Any, tokens: torch.Tensor, unless: tuple[str, ...] = ()) -> None:
    """Logits and every hook point."""
    with torch.no_grad():
        (logits, cache), (expected, reference) = (model.run_with_cache(tokens) for model in (mine, other))
    close("logits", logits, expected)
    caches_close(cache, reference, unless)


def models_agree(mine: Any, other: Any, tokens: torch.Tensor) -> None:
    configs_agree(mine, other)
    assert list(mine.state_dict()) == list(other.state_dict())
    weights_close(floats(mine), floats(other))
    runs_agree(mine, other, tokens)


# --- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_without_processing(name: str, cache: Path, tokens: torch.Tensor) -> None:
    mine = HookedTransformer.from_pretrained_no_processing(name, cache_dir=str(cache), device="cpu")
    models_agree(mine, theirs(name, cache, **RAW), tokens)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in INEXACT])
def test_with_the_default_processing(name: str, cache: Path, tokens: torch.Tensor) -> None:
    models_agree(ours(name, cache), theirs(name, cache), tokens)


@pytest.mark.parametrize("option", PROCESSING_FLAGS[:4])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in INEXACT])
def test_with_one_option(name: str, option: str, cache: Path, tokens: torch.Tensor) -> None:
    options = RAW | {option: True}
    models_agree(ours(name, cache, **options), theirs(name, cache, **options), tokens)


@pytest.mark.ours_only
@pytest.mark.parametrize("name", INEXACT)
def test_processing_keeps_what_the_first_solu_models_compute(name: str, cache: Path, tokens: torch.Tensor) -> None:
    """Their last norm sees the mean of the stream. 3.9.0 makes W_U blind to it and takes it out of b_O alone."""
    mine, other, raw = ours(name, cache), theirs(name, cache), theirs(name, cache, **RAW)
    configs_agree(mine, other)
    with torch.no_grad():
        expected = raw(tokens).log_softmax(-1)
        close("log probs", mine(tokens).log_softmax(-1), expected)
        assert not torch.allclose(other(tokens).log_softmax(-1), expected, atol=0.05)
    found, reference = floats(mine), floats(other)
    for weight in found:
        if weight.endswith("b_O"):
            found[weight] = found[weight] - found[weight].mean()
    # Both have centred it over the vocabulary too.
    found["unembed.W_U"] = found["unembed.W_U"] - found["unembed.W_U"].mean(0)
    weights_close(found, reference)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in INEXACT])
def test_refactored_attention(name: str, cache: Path, tokens: torch.Tensor) -> None:
    mine, other = (load(name, cache, refactor_factored_attn_matrices=True) for load in (ours, theirs))
    free = ("q", "k", "v", "z") if name == "othello-gpt" else ()
    # How singular vectors are signed depends on how a matrix lies in memory; patterns and outputs do not.
    unless = tuple(f"blocks.{layer}.attn.hook_{kind}" for layer in range(2) for kind in free)
    runs_agree(mine, other, tokens, unless)


@pytest.mark.parametrize("name", ["solu-1l", "gelu-2l", "othello-gpt"])
def test_options_of_loading(name: str, cache: Path, tokens: torch.Tensor) -> None:
    options = {"first_n_layers": 1, "default_prepend_bos": False, "dtype": torch.float64}
    models_agree(ours(name, cache, **options), theirs(name, cache, **options), tokens)


@pytest.mark.parametrize("name", ["gelu-2l", "attn-only-2l-demo", "othello-gpt"])
def test_a_shorter_context(name: str, cache: Path, tokens: torch.Tensor) -> None:
    """3.9.0 has no room then for the learned positions that it reads."""
    mine, other = (outcome(lambda load=load: load(name, cache, n_ctx=9)) for load in (ours, theirs))
    assert isinstance(other.error, RuntimeError)
    whole = theirs(name, cache)
    assert (mine.value.cfg.n_ctx, mine.value.W_pos.shape[0]) == (9, 9)
    runs_agree(mine.value, whole, tokens)
    with pytest.raises(ValueError, match="n_ctx must be between 1 and 14"):
        ours(name, cache, n_ctx=15)


@pytest.mark.ours_only
@pytest.mark.parametrize("name", ["solu-8l-old", "solu-10l-old"])
def test_the_first_layers_of_the_first_solu_models(name: str, cache: Path, tokens: torch.Tensor) -> None:
    """Which matrices lie the other way depends on the model that was saved; 3.9.0 goes by what is left of it."""
    assert isinstance(outcome(lambda: theirs(name, cache, first_n_layers=2, **RAW)).error, RuntimeError)
    part = ours(name, cache, first_n_layers=2, **RAW)
    close("stream", part(tokens, stop_at_layer=2), theirs(name, cache, **RAW)(tokens, stop_at_layer=2).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, cache: Path) -> None:
    for options in ({"dtype": dtype}, {"torch_dtype": dtype}):
        mine, other = (load("gelu-2l", cache, **options) for load in (ours, theirs))
        configs_agree(mine, other)
        found, expected = floats(mine), floats(other)
        for weight, value in expected.items():
            # One unit in the last place: folded values may be rounded either way.
            limit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * value.float().abs().max()
            assert found[weight].dtype == value.dtype == dtype
            assert (found[weight].float() - value.float()).abs().max() <= limit, weight


def test_texts_go_through_the_tokenizer_that_the_config_names(cache: Path, tokenizer: Path) -> None:
    for options in ({}, {"default_prepend_bos": False}, {"default_padding_side": "left"}):
        mine, other = (load("solu-1l", cache, **options) for load in (ours, theirs))
        assert mine.cfg.tokenizer_name == other.cfg.tokenizer_name == str(tokenizer)
        assert mine.tokenizer.padding_side == other.tokenizer.padding_side
        texts = ["The cat sat", "on the mat."]
        assert torch.equal(mine.to_tokens(texts), other.to_tokens(texts))
        close("loss", mine(texts, return_type="loss"), other(texts, return_type="loss"))
    assert ours("othello-gpt", cache).tokenizer is None
    assert ours("othello-gpt", cache, tokenizer=str(tokenizer)).to_tokens("The").shape == (1, 2)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, -1])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_by_index(name: str, index: int, cache: Path, tokens: torch.Tensor) -> None:
    mine, other = (load(name, cache, checkpoint_index=index, **RAW) for load in (ours, theirs))
    # 3.9.0 notes a negative index as it is.
    other.cfg.checkpoint_index %= len(KINDS[name].checkpoints)
    models_agree(mine, other, tokens)
    assert mine.cfg.from_checkpoint
    assert not torch.equal(mine.W_E, ours(name, cache, **RAW).W_E)


@pytest.mark.parametrize("argument", ["checkpoint_value", "checkpoint_label"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_by_label(name: str, argument: str, cache: Path, tokens: torch.Tensor) -> None:
    last = max(KINDS[name].checkpoints)
    mine, other = (load(name, cache, **{argument: last}) for load in (ours, theirs))
    models_agree(mine, other, tokens)
    assert mine.cfg.checkpoint_value == last
    assert mine.cfg.checkpoint_label_type == ("token" if last > 1e9 else "step")


@pytest.mark.ours_only
def test_a_label_is_not_the_end_of_another(tmp_path: Path) -> None:
    """For 5, 3.9.0 takes the first file that ends in 5.pth, which is that of 25."""
    kind = KINDS["attn-only-3l"]
    add(tmp_path, Kind(kind.name, kind.stated, checkpoints=(5, 25)), None)
    for load, found in ((ours, 5), (theirs, 25)):
        first = load("attn-only-3l", tmp_path, checkpoint_value=5, **RAW)
        assert first.cfg.checkpoint_value == 5
        right = ours("attn-only-3l", tmp_path, checkpoint_index=(25, 5).index(found), **RAW)
        assert right.cfg.checkpoint_value == found
        assert torch.equal(first.W_E, right.W_E)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("gelu-2l", {"checkpoint_value": 11}),
        ("gelu-2l", {"checkpoint_index": 4}),
        ("solu-1l", {"checkpoint_value": 3}),
        ("redwood_attn_2l", {"checkpoint_index": 0}),
        ("othello-gpt", {"checkpoint_value": 10}),
        ("gelu-2l", {"checkpoint_value": 10, "checkpoint_label": 10}),
    ],
)
def test_checkpoints_that_are_not_there(name: str, asked: dict[str, int], cache: Path) -> None:
    mine, other = (outcome(lambda load=load: load(name, cache, **asked)) for load in (ours, theirs))
    assert other.error is not None
    same_outcome("checkpoint", mine, other)


@pytest.mark.parametrize("name", KINDS)
def test_labels(name: str, cache: Path) -> None:
    mine = outcome(lambda: loading_from_pretrained.get_checkpoint_labels(name, cache_dir=str(cache)))
    with listed(cache):
        other = outcome(lambda: reference_loading.get_checkpoint_labels(name))
    if isinstance(other.error, IndexError):
        # A repository of theirs that has no checkpoints.
        other = Outcome(error=ValueError())
    same_outcome("labels", mine, other)


# --- the helpers of loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"fold_ln": True}, {"first_n_layers": 1, "n_ctx": 7}, {"dtype": torch.float16, "default_prepend_bos": False}],
    ids=str,
)
@pytest.mark.parametrize("name", KINDS)
def test_configs(name: str, options: dict[str, Any], cache: Path) -> None:
    mine, other = (
        module.get_pretrained_model_config(name, device="cpu", cache_dir=str(cache), **options).to_dict()
        for module in (loading_from_pretrained, reference_loading)
    )
    assert {field: mine[field] for field in other} == other


@pytest.mark.parametrize("name", KINDS)
def test_state_dicts(name: str, cache: Path) -> None:
    found = []
    for module in (loading_from_pretrained, reference_loading):
        with listed(cache):
            cfg = module.get_pretrained_model_config(name, cache_dir=str(cache))
            state = module.get_pretrained_state_dict(name, cfg, cache_dir=str(cache), dtype=torch.float64)
        found.append({key: w for key, w in state.items() if not key.endswith((".mask", ".IGNORE"))})
    weights_close(*found)


# --- directories and what is not there --------------------------------------------------------------------------------


def test_a_directory_with_the_same_files(cache: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    for name in ("gelu-2l", "solu-1l-old"):
        copy = tmp_path / KINDS[name].name.split("/")[1]
        shutil.copytree(next((repository_in(cache, KINDS[name].name) / "snapshots").iterdir()), copy)
        mine = HookedTransformer.from_pretrained_no_processing(str(copy), device="cpu")
        models_agree(mine, theirs(name, cache, **RAW), tokens)
    early = HookedTransformer.from_pretrained(str(tmp_path / "GELU_2L512W_C4_Code"), device="cpu", checkpoint_value=10)
    models_agree(early, theirs("gelu-2l", cache, checkpoint_value=10), tokens)


def test_what_is_not_cached_is_said(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"cannot load 'solu-1l' \(the hub id 'NeelNanda/SoLU_1L512W_C4_Code'"):
        ours("solu-1l", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"cannot load 'gelu-1l'"):
        loading_from_pretrained.get_pretrained_model_config("gelu-1l", cache_dir=str(cache))
    with pytest.raises(ModelNotFoundError, match=r"cannot load 'gelu-1l'"):
        loading_from_pretrained.get_checkpoint_labels("gelu-1l", cache_dir=str(cache))
    with pytest.raises(ModelNotFoundError, match=r"cannot load 'gelu-1l'"):
        loading_from_pretrained.convert_neel_model_config("gelu-1l", cache_dir=str(cache))


def test_an_index_among_what_is_cached_is_warned_of(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours("gelu-2l", cache, checkpoint_value=10, **RAW)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        ours("gelu-2l", cache, checkpoint_index=1, **RAW)
    assert "counts the 4 checkpoints in the cache: it is step 10" in caplog.text


def test_gains_in_the_file_count(tmp_path: Path, tokens: torch.Tensor, cache: Path) -> None:
    """Of a model that says it has none, 3.9.0 folds them by default too, but drops them without processing."""
    kind = KINDS["gelu-2l"]

    def written(state: dict[str, torch.Tensor], n_ctx: int) -> dict[str, torch.Tensor]:
        return torch.load(next(repository_in(cache, kind.name).glob("snapshots/*/model_final.pth")))

    add(tmp_path, Kind(kind.name, kind.stated | {"normalization_type": "LNPre"}, written), None)
    models_agree(ours("gelu-2l", tmp_path), theirs("gelu-2l", tmp_path), tokens)
    raw = ours("gelu-2l", tmp_path, **RAW)
    assert raw.cfg.normalization_type == "LN"
    close("logits", raw(tokens), ours("gelu-2l", cache, **RAW)(tokens))


def forget(prefix: str) -> Callable[[dict[str, torch.Tensor], int], dict[str, torch.Tensor]]:
    return lambda state, n_ctx: {name: w for name, w in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize("missing", ["blocks.1.attn.W_K", "embed.W_E", "ln_final"])
def test_files_that_lack_weights(missing: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    """A norm may be missing, which is then neutral; 3.9.0 goes on with any memory for an embedding."""
    kind = KINDS["gelu-2l"]
    add(tmp_path, Kind(kind.name, kind.stated, forget(missing)), None)
    if missing == "ln_final":
        return close("logits", ours("gelu-2l", tmp_path)(tokens), theirs("gelu-2l", tmp_path)(tokens).detach())
    with pytest.raises(ValueError, match=missing):
        ours("gelu-2l", tmp_path)
    return None
