"""Are repositories in TransformerLens' own format read, and is what is wrong with one said?"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from lensbridge import HookedTransformer, HookedTransformerConfig, loading, model_names
from lensbridge.checkpoints import Checkpoint
from lensbridge.errors import ModelNotFoundError, UnknownArgumentError, UnsupportedModelError
from lensbridge.native import NativeForCausalLM
from lensbridge.native.hub import Repository, is_own_format, load

STATED: dict[str, Any] = {
    "d_model": 8,
    "n_layers": 2,
    "d_mlp": 12,
    "d_head": 4,
    "n_heads": 2,
    "n_ctx": 10,
    "d_vocab": 30,
    "act_fn": "relu",
    "attn_only": False,
    "normalization": "LN",
}
GELU_1L = "NeelNanda/GELU_1L512W_C4_Code"
TOKENS = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    names = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn")
    cfg = HookedTransformerConfig(**{name: STATED[name] for name in names}, seed=seed, device="cpu")
    return NativeForCausalLM.from_cfg(cfg).state_dict()


def write(directory: Path, stated: dict[str, Any] | None = None, labels: tuple[int, ...] = ()) -> Path:
    """The files of a repository; each checkpoint has the weights of another seed."""
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(STATED if stated is None else stated))
    torch.save(weights(), directory / "model_final.pth")
    for seed, label in enumerate(labels):
        torch.save(weights(seed + 1), directory / "checkpoints" / f"model_{label}.pth")
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path / "mine", labels=(0, 50, 700))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """HuggingFace's cache with one repository."""
    repository = tmp_path / "hub" / f"models--{GELU_1L.replace('/', '--')}"
    write(repository / "snapshots" / ("a" * 40), labels=(0, 50, 700))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "refs" / "other").write_text("a" * 40)
    return tmp_path / "hub"


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str] | Exception], list[Any]]:
    """Sets what the hub answers when it is asked for the files; gives a list of what it was asked."""
    asked: list[Any] = []

    def answer(found: list[str] | Exception) -> list[Any]:
        def files(self: Any, name: str, **options: Any) -> list[str]:
            asked.append((name, options))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
        return asked

    return answer


# --- what is in this format -------------------------------------------------------------------------------------------


def test_names_of_the_table_are_known_without_a_look() -> None:
    owners = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
    known = [name for name in model_names.table()["names"] if name.startswith(owners)]
    assert len(known) == 28
    assert all(is_own_format(name) for name in known)
    assert not any(is_own_format(name) for name in ("gpt2", "EleutherAI/pythia-70m", "someone/GELU_1L512W_C4_Code"))


def test_directories_are_told_by_their_config(directory: Path, tmp_path: Path) -> None:
    assert is_own_format(str(directory))
    (directory / "config.json").write_text(json.dumps(STATED | {"model_type": "gpt2"}))
    assert not is_own_format(str(directory))
    assert not is_own_format(str(tmp_path))
    (tmp_path / "config.json").write_text("no json")
    assert not is_own_format(str(tmp_path))
    assert not is_own_format(str(model_names.bundled_path()))


def test_other_models_of_the_same_owners_are_told_by_theirs(cache: Path) -> None:
    repository = cache / f"models--{GELU_1L.replace('/', '--')}"
    repository.rename(cache / "models--NeelNanda--New")
    options = {"cache_dir": str(cache), "attn_implementation": "eager"}
    assert is_own_format("NeelNanda/New", options)
    assert not is_own_format("NeelNanda/Newer", options)
    config = cache / "models--NeelNanda--New" / "snapshots" / ("a" * 40) / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2"}))
    assert not is_own_format("NeelNanda/New", options)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_of_the_hub(cache: Path, listing: Callable) -> None:
    names = ["checkpoints/a_7.pth", "checkpoints/a_07.pth", "checkpoints/a_x.pth", "a_9.pth", "checkpoints/a_5.pth.txt"]
    asked = listing([*names, "checkpoints/tokens_30.pth"])
    repository = Repository(GELU_1L, {"revision": "other", "token": "secret", "cache_dir": str(cache)})
    assert repository.files == ([*names, "checkpoints/tokens_30.pth"], True)
    assert repository.labels().values == [7, 30]
    assert repository.checkpoint_files[7] == "checkpoints/a_7.pth"
    assert asked == [(GELU_1L, {"revision": "other", "token": "secret"})]


@pytest.mark.parametrize("error", [ConnectionError("no way"), RuntimeError("a library's own type")])
def test_files_of_the_cache_where_the_hub_cannot_be_asked(cache: Path, listing: Callable, error: Exception) -> None:
    listing(error)
    files = Repository(GELU_1L, {"cache_dir": str(cache)}).files
    assert files == (
        ["checkpoints/model_0.pth", "checkpoints/model_50.pth", "checkpoints/model_700.pth", "config.json"]
        + ["model_final.pth"],
        False,
    )
    with pytest.raises(OSError, match="cannot find the requested files in the local cache"):
        _ = Repository(GELU_1L, {"cache_dir": str(cache / "elsewhere")}).files


def test_nothing_is_asked_of_the_hub_for_local_files_only(cache: Path, listing: Callable) -> None:
    asked = listing(["config.json"])
    assert not Repository(GELU_1L, {"cache_dir": str(cache), "local_files_only": True}).files.complete
    assert not asked


def test_the_cache_is_where_huggingface_has_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = HookedTransformer.from_pretrained_no_processing("gelu-1l", device="cpu")
    expected = NativeForCausalLM.from_cfg(model.cfg)
    expected.load_state_dict(weights())
    assert torch.equal(model(TOKENS), expected(TOKENS).logits)
    with pytest.raises(ModelNotFoundError, match="cannot load 'gelu-2l'"):
        HookedTransformer.from_pretrained("gelu-2l")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    repository = Repository(str(directory))
    assert repository.checkpoint(None, None) is None
    assert repository.checkpoint(1, None) == repository.checkpoint(None, 50) == Checkpoint(1, 50, "step")
    for label, seed in ((None, 0), (0, 1), (50, 2), (700, 3)):
        assert torch.equal(repository.weights(label)["embed.W_E"], weights(seed)["embed.W_E"])
    # In a directory are all there are.
    assert not caplog.records
    with pytest.raises(ModelNotFoundError, match="mine' has no checkpoint 60. There are: checkpoints/model_0.pth"):
        repository.weights(60)


def test_an_index_counts_what_is_cached(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    repository = Repository(GELU_1L, {"cache_dir": str(cache)})
    with caplog.at_level(logging.WARNING):
        assert repository.checkpoint(None, 700) == Checkpoint(2, 700, "step")
        assert not caplog.records
        assert repository.checkpoint(-1, None) == Checkpoint(2, 700, "step")
    assert "checkpoint_index=-1 counts the 3 checkpoints in the cache: it is step 700" in caplog.text
    with pytest.raises(
        AssertionError, match="as far as it is in the cache.* has no checkpoint at step 60; the closest"
    ):
        repository.checkpoint(None, 60)


def test_a_repository_without_checkpoints_or_without_the_trained_model(tmp_path: Path) -> None:
    repository = Repository(str(write(tmp_path / "mine")))
    with pytest.raises(ValueError, match="mine is not checkpointed: there are no files"):
        repository.checkpoint(0, None)
    (tmp_path / "mine" / "model_final.pth").unlink()
    with pytest.raises(ModelNotFoundError, match=r"mine' has no file \*final.pth.* There are: config.json$"):
        Repository(str(tmp_path / "mine")).weights()


# --- what files say ---------------------------------------------------------------------------------------------------


def test_a_config_that_lacks_fields(tmp_path: Path) -> None:
    for missing in ("n_heads", "normalization"):
        stated = {name: value for name, value in STATED.items() if name != missing}
        repository = Repository(str(write(tmp_path / missing, stated)))
        with pytest.raises(UnsupportedModelError, match=f"lacks {missing}"):
            repository.fields()


def test_weights_have_the_dtype_that_is_asked_for(directory: Path) -> None:
    state = Repository(str(directory)).weights(dtype=torch.bfloat16)
    assert {value.dtype for value in state.values()} == {torch.bfloat16, torch.bool}
    model = load(Repository(str(directory)), None, torch.float64)
    assert model.cfg.dtype == model.dtype == torch.float64
    assert not model.training


def test_nothing_that_could_run_code_is_unpickled(directory: Path) -> None:
    torch.save({"embed.W_E": logging.getLogger}, directory / "model_final.pth")
    with pytest.raises(ModelNotFoundError, match="holds other things than tensors.*load_and_process_state_dict"):
        HookedTransformer.from_pretrained(str(directory))


@pytest.mark.parametrize("name", ["blocks.0.mlp.W_in", "unembed.W_U"])
def test_a_weight_matrix_that_is_missing(directory: Path, name: str) -> None:
    torch.save({key: value for key, value in weights().items() if key != name}, directory / "model_final.pth")
    with pytest.raises(ValueError, match=f"lack {name}"):
        HookedTransformer.from_pretrained(str(directory))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_what_is_passed_on(cache: Path, directory: Path) -> None:
    options: dict[str, Any] = {"cache_dir": str(cache), "device": "cpu", "trust_remote_code": True}
    model = HookedTransformer.from_pretrained_no_processing("gelu-1l", revision="other", **options)
    assert torch.equal(model.W_E, weights()["embed.W_E"])
    with pytest.raises(ModelNotFoundError, match=r"\(the hub id '\S+', revision 'third'\)"):
        HookedTransformer.from_pretrained("gelu-1l", revision="third", **options)
    with pytest.raises(UnknownArgumentError, match="attn_implementation: .*own format, .* cache_dir, force_download"):
        HookedTransformer.from_pretrained(str(directory), attn_implementation="eager")
    with pytest.raises(UnknownArgumentError, match="Closest: revision"):
        HookedTransformer.from_pretrained(str(directory), revison="x")
    with pytest.raises(UnsupportedModelError, match="n_devices=2"):
        HookedTransformer.from_pretrained(str(directory), n_devices=2)


def test_the_config_of_a_loaded_model(directory: Path) -> None:
    model = HookedTransformer.from_pretrained(str(directory), checkpoint_label=50, n_ctx=6, dtype="bf16", device="cpu")
    cfg = model.cfg
    found = (
        cfg.model_name,
        cfg.n_ctx,
        cfg.dtype,
        cfg.normalization_type,
        cfg.tokenizer_name,
        cfg.original_architecture,
    )
    assert found == ("mine", 6, torch.bfloat16, "LNPre", None, "neel")
    assert (cfg.from_checkpoint, cfg.checkpoint_index, cfg.checkpoint_value) == (True, 1, 50)
    assert model.tokenizer is None
    assert model.W_pos.shape == (6, 8)


def test_no_tokenizer_is_looked_for_where_none_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", None)
    assert HookedTransformer.from_pretrained(str(directory), device="cpu").tokenizer is None
    assert not caplog.records


def test_where_it_goes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "get_device", lambda: torch.device("meta"))
    assert HookedTransformer.from_pretrained_no_processing(str(directory)).cfg.device == "meta"
    assert HookedTransformer.from_pretrained(str(directory), move_to_device=False).cfg.device == "cpu"


def test_logits_of_shortformers_are_not_centred(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "config.json").write_text(json.dumps(STATED | {"shortformer_pos": True}))
    with caplog.at_level(logging.WARNING):
        model = HookedTransformer.from_pretrained(str(directory), device="cpu")
    assert not model.processing.center_unembed
    assert model.processing.fold_value_biases
    assert "center_unembed is left out" in caplog.text
    model.process_weights_()
    assert model.processing.center_unembed
