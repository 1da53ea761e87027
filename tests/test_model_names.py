"""Does a name lead where TransformerLens' table, the disk or the hub says?"""

from __future__ import annotations

from pathlib import Path

import pytest

from lensbridge import model_names


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("gpt2", "gpt2"),
        ("gpt2-small", "gpt2"),
        ("GPT2-Small", "gpt2"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("eleutherai/PYTHIA-70m", "EleutherAI/pythia-70m"),
        ("gpt2-xl", "gpt2-xl"),
        ("someone/A-Model-of-Theirs", "someone/A-Model-of-Theirs"),
    ],
)
def test_aliases_in_any_case_and_other_ids_as_they_are(name: str, official: str) -> None:
    assert model_names.resolve(name) == official


def test_a_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2-small").mkdir()
    assert model_names.resolve("gpt2-small") == "gpt2"
    assert model_names.resolve(str(tmp_path / "gpt2-small")) == str(tmp_path / "gpt2-small")
    monkeypatch.chdir(tmp_path)
    assert model_names.resolve("gpt2-small") == "gpt2-small"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_names.resolve("~/gpt2-small") == str(tmp_path / "gpt2-small")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert model_names.resolve(str(tmp_path / "model.bin")) == str(tmp_path / "model.bin")


def test_the_bundled_model_has_a_name() -> None:
    assert model_names.resolve("toy") == model_names.resolve("Toy") == str(model_names.bundled_path())
    assert model_names.bundled_path().parent.name == "assets"


def test_the_table_is_consistent() -> None:
    names = model_names.table()["names"]
    known = [name.lower() for name in model_names.known_names()]
    official = {name.lower() for name in names}
    assert len(official) == len(names) and "gpt2" in names
    # No alias stands for two models, nor for another model's own id.
    for name, aliases in names.items():
        for alias in aliases:
            assert model_names.resolve(alias) == name
            assert alias.lower() not in official or alias.lower() == name.lower()
    assert set(known) >= official
    assert "GPTNeoXForCausalLM" in model_names.table()["no_bos_by_default"]


def test_checkpoints() -> None:
    steps, prefix = model_names.checkpoint_labels("stanford-crfm/alias-gpt2-small-x21") or ([], "")
    assert (steps[0], steps[-1], prefix, len(steps)) == (0, 400_000, "checkpoint-", 609)
    steps, prefix = model_names.checkpoint_labels("EleutherAI/pythia-70m") or ([], "")
    assert (steps[:4], steps[-1], prefix, len(steps)) == ([0, 1, 2, 4], 143_000, "step", 154)
    steps, _ = model_names.checkpoint_labels("EleutherAI/pythia-70m-v0") or ([], "")
    assert (steps[0], len(steps)) == (1000, 143)
    assert all(a < b for a, b in zip(steps, steps[1:], strict=False))
    assert model_names.checkpoint_labels("gpt2") is None
