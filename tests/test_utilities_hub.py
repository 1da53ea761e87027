"""Do the helpers for the HuggingFace Hub wait, tolerate and refuse as they say? Nothing here touches the network."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import dataclasses as hub_dataclasses
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models
from transformers import PretrainedConfig

from lensbridge.errors import UnknownArgumentError
from lensbridge.utilities import _hf_compat, _hf_retry, hf_utils


class Refused(Exception):
    """An HTTP error as libraries raise it."""

    def __init__(self, status: int, **headers: str) -> None:
        self.response = SimpleNamespace(
            status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


class Flaky:
    """Fails as told, one error per call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append((args, kwargs))
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(_hf_retry.time, "sleep", taken.append)
    return taken


def test_waits_as_long_as_it_is_told(pauses: list[float]) -> None:
    function = Flaky(Refused(429, Retry_After="7"), Refused(429, Retry_After="0.5"))
    assert hf_utils.call_hf_with_retry(function, 1, a=2) == "answer"
    assert function.calls == [((1,), {"a": 2})] * 3
    assert pauses == [7.0, 0.5]


def test_waits_longer_each_time_when_not_told(pauses: list[float]) -> None:
    function = Flaky(*(Refused(429, Retry_After="soon") for _ in range(5)), Refused(429))
    assert hf_utils.call_hf_with_retry(function, max_attempts=7, base_delay=10.0) == "answer"
    for pause, expected in zip(pauses, (10, 20, 40, 80, 120, 120), strict=True):
        assert 0.8 * expected <= pause <= 1.2 * expected


def test_gives_up(pauses: list[float]) -> None:
    function = Flaky(*(Refused(429) for _ in range(9)))
    with pytest.raises(Refused):
        hf_utils.call_hf_with_retry(function)
    assert (len(function.calls), len(pauses)) == (3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        hf_utils.call_hf_with_retry(function, max_attempts=0)


@pytest.mark.parametrize("error", [Refused(404), ValueError("no"), OSError()])
def test_other_errors_are_not_waited_for(error: Exception, pauses: list[float]) -> None:
    with pytest.raises(type(error)):
        hf_utils.call_hf_with_retry(Flaky(error))
    assert pauses == []


def test_auto_classes_can_be_made_to_wait(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Flaky(Refused(429, Retry_After="1"))
    for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor"):
        load = classmethod(lambda cls, *args, **kwargs: (cls, answers(*args, **kwargs)))
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)
    hf_utils.enable_hf_retry()
    wrapped = vars(transformers.AutoConfig)["from_pretrained"]
    hf_utils.enable_hf_retry()
    assert vars(transformers.AutoConfig)["from_pretrained"] is wrapped
    assert transformers.AutoModel.from_pretrained("some/model", revision="x") == (transformers.AutoModel, "answer")
    assert pauses == [1.0]
    assert answers.calls == [(("some/model",), {"revision": "x"})] * 2


def test_the_token_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, token in (("secret", "secret"), ("", None)):
        monkeypatch.setenv("HF_TOKEN", value)
        assert hf_utils.get_hf_token() == token
    monkeypatch.delenv("HF_TOKEN")
    assert hf_utils.get_hf_token() is None


# ---------------------------------------------------------------- files and data sets


def test_downloads_pass_their_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")
    torch.save({"w": Path("x")}, tmp_path / "object.pth")
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, filename: str, *, subfolder: str, cache_dir: str, revision: str = "main") -> str:
        asked.append({"cache_dir": cache_dir, "revision": revision})
        return str(tmp_path / filename)

    monkeypatch.setattr(hf_utils, "hf_hub_download", download)
    assert hf_utils.download_file_from_hf("a/b", "w.pth", cache_dir="c", revision="v2", weights_only=True)["w"].all()
    assert asked == [{"cache_dir": "c", "revision": "v2"}]
    assert hf_utils.download_file_from_hf("a/b", "object.pth") == {"w": Path("x")}
    with pytest.raises(Exception, match="[Ww]eights"):
        hf_utils.download_file_from_hf("a/b", "object.pth", weights_only=True)
    with pytest.raises(UnknownArgumentError, match="revison.*revision"):
        hf_utils.download_file_from_hf("a/b", "w.pth", revison="v2")


def test_arguments_are_selected_by_name() -> None:
    def function(a: int, /, b: int, *c: int, d: int, **e: int) -> None: ...

    assert hf_utils.select_compatible_kwargs(dict.fromkeys("abcdef", 1), function) == {"b": 1, "d": 1}


def test_the_cache_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cache = tmp_path / "hub"
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "weights").write_text("x")
    (cache / "link").symlink_to(tmp_path)
    monkeypatch.setattr(hf_utils, "CACHE_DIR", str(cache))
    hf_utils.clear_huggingface_cache()
    assert not cache.exists() and tmp_path.exists()
    hf_utils.clear_huggingface_cache()
    assert "Warning" not in capsys.readouterr().out


def test_what_resists_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    protected, stubborn = tmp_path / "hub" / "protected", tmp_path / "hub" / "stubborn"
    protected.parent.mkdir()
    protected.write_text("x")
    stubborn.write_text("x")
    protected.chmod(0o400)
    unlink = hf_utils.os.unlink

    def windows_unlink(path: Any, **options: Any) -> None:
        if Path(path).name == "stubborn" or (tmp_path / "hub" / path).stat().st_mode & 0o200 == 0:
            raise PermissionError(f"cannot delete {path}")
        unlink(path, **options)

    monkeypatch.setattr(hf_utils.os, "unlink", windows_unlink)
    monkeypatch.setattr(hf_utils, "CACHE_DIR", str(tmp_path / "hub"))
    hf_utils.clear_huggingface_cache()
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["stubborn"]
    assert "Warning: could not be deleted: cannot delete" in capsys.readouterr().out


def test_datasets_are_named_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pile, c4"):
        hf_utils.get_dataset("everything")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        hf_utils.get_dataset("pile")


def test_rotary_share_of_layers_that_differ() -> None:
    layers = [SimpleNamespace(rope_parameters={"partial_rotary_factor": share}) for share in (1.0, 0.25, 0.25)]

    class Mixed:
        is_heterogeneous = True
        per_layer_config = dict(enumerate(layers))

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"layers do not share {name}")

    assert hf_utils.get_rotary_pct_from_config(Mixed()) == 0.25


# ---------------------------------------------------------------- repositories that are refused


class Loader:
    """Stands for an Auto class: raises once, then gives what it was asked with."""

    def __init__(self, *errors: Exception) -> None:
        self.load = Flaky(*errors)

    def from_pretrained(self, model_id: str, **kwargs: Any) -> Any:
        self.load(model_id, **kwargs)
        return kwargs


def test_a_config_with_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldConfig(PretrainedConfig):
        def __post_init__(self) -> None:
            self.doubled = 2 * self.width

    error = TypeError("__post_init__() got an unexpected keyword argument 'width'")
    monkeypatch.setattr(_hf_compat, "_remote_config_class", lambda *args, **kwargs: OldConfig)
    auto = Loader(error)
    assert hf_utils.autoconfig_with_remote_post_init_compat("a/b", auto, revision="r") == {"revision": "r"}
    assert len(auto.load.calls) == 2
    tolerant = OldConfig.__post_init__
    hf_utils.make_post_init_kwarg_tolerant(OldConfig)
    assert OldConfig.__post_init__ is tolerant
    made: Any = OldConfig
    assert made(width=3).doubled == 6

    monkeypatch.setattr(_hf_compat, "_remote_config_class", lambda *args, **kwargs: None)
    with pytest.raises(TypeError):
        hf_utils.autoconfig_with_remote_post_init_compat("a/b", Loader(error))


def test_a_config_that_cannot_return_attentions() -> None:
    error = StrictDataclassError("output_attentions needs another implementation")
    load = hf_utils.autoconfig_with_remote_post_init_compat
    assert load("a/b", Loader(error)) == {"attn_implementation": "eager"}
    with pytest.raises(StrictDataclassError):
        load("a/b", Loader(error), attn_implementation="sdpa")


@pytest.mark.parametrize("error", [TypeError("other"), StrictDataclassError("other"), OSError("gone")])
def test_other_refusals_of_a_config_are_passed_on(error: Exception) -> None:
    with pytest.raises(type(error)):
        hf_utils.autoconfig_with_remote_post_init_compat("a/b", Loader(error))


def test_a_repository_names_its_config_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (tmp_path / "own.py").write_text(
        "from transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig): pass\n"
    )
    assert _hf_compat._remote_config_class(str(tmp_path)).__name__ == "OwnConfig"
    (tmp_path / "config.json").write_text("{}")
    assert _hf_compat._remote_config_class(str(tmp_path)) is None


REFUSED_TOKENS = TypeError("argument 'special_tokens': Expected Union")


def test_a_tokenizer_with_refused_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "[X]": 2}, unk_token="[X]")).save(str(tmp_path / "tokenizer.json"))
    stored = {"bos_token": {"content": "<s>"}, "pad_token": "[X]", "unk_token": None, "model_max_length": 12}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stored))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model_id, name, **kwargs: str(tmp_path / name))
    load = hf_utils.autotokenizer_with_special_token_compat
    tokenizer = load("a/b", Loader(REFUSED_TOKENS), add_bos_token=True)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (1, 2, 12)
    assert (tokenizer.init_kwargs["name_or_path"], tokenizer.add_bos_token) == ("a/b", True)
    assert load("a/b", Loader(), use_fast=True) == {"use_fast": True}


def test_a_tokenizer_whose_files_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Flaky(OSError()))
    with pytest.raises(TypeError, match="special_tokens"):
        hf_utils.autotokenizer_with_special_token_compat("a/b", Loader(REFUSED_TOKENS))
    with pytest.raises(TypeError, match="other"):
        hf_utils.autotokenizer_with_special_token_compat("a/b", Loader(TypeError("other")))


def test_a_config_may_hold_an_int_for_a_float(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other packages may have changed the check already.
    original = inspect.unwrap(hub_dataclasses._validate_simple_type)
    monkeypatch.setattr(hub_dataclasses, "_validate_simple_type", original)
    with pytest.raises(TypeError):
        hub_dataclasses.type_validator("theta", 1, float)
    hf_utils.enable_hf_numeric_tower()
    changed = hub_dataclasses._validate_simple_type
    hf_utils.enable_hf_numeric_tower()
    assert hub_dataclasses._validate_simple_type is changed
    hub_dataclasses.type_validator("theta", 1, float)
    for value, kind in ((True, float), ("1", float), (1.0, int)):
        with pytest.raises(TypeError):
            hub_dataclasses.type_validator("theta", value, kind)
