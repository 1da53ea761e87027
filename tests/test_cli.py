"""Does the command line do what it is told, and say plainly what went wrong?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lensbridge
from lensbridge import cli
from lensbridge.errors import ModelNotFoundError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"lensbridge {lensbridge.__version__}"


def test_every_command_is_in_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["demo", "--no-such-option"], ["demo", "--seed", "x"]])
def test_wrong_usage_ends_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: lensbridge" in capsys.readouterr().err


def test_demo_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code = cli.main(
        ["demo", "--quick", "--no-progress", "--device", "cpu", "--html", str(page), "--json", str(numbers)]
    )
    assert code == 0
    shown = capsys.readouterr()
    assert "1. Induction" in shown.out and "3. Activation patching" in shown.out and "page.html" in shown.out
    assert "patching" not in shown.err, "no progress bar was asked for"
    data = json.loads(numbers.read_text(encoding="utf-8"))
    assert data["about"]["model"] == "toy" and data["about"]["quick"] is True
    assert len(data["ioi"]["head_attribution"]) == data["about"]["n_layers"]
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>") and "toy" in html


def test_demo_shows_progress_and_opens_the_page_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = tmp_path / "page.html"
    assert cli.main(["demo", "toy", "--quick", "--open", "--seed", "1", "--html", str(page)]) == 0
    assert opened == [page.as_uri()]
    assert "patching heads" in capsys.readouterr().err


def test_an_unknown_model_is_one_message_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "no-such-model"
    assert cli.main(["demo", str(wrong), "--html", str(tmp_path / "page.html")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("lensbridge demo: ") and "no-such-model" in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "page.html").exists()


def test_an_unwritable_place_is_found_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lensbridge.HookedTransformer, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded")
    )
    assert cli.main(["demo", "--html", str(tmp_path / "missing" / "page.html")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        cli.main(["demo", str(tmp_path / "no-such-model"), "--debug", "--html", str(tmp_path / "page.html")])


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lensbridge.demo.command.run_demo", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo", "--html", str(tmp_path / "page.html")])


def test_an_interruption_ends_with_code_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lensbridge.demo.command.run_demo", interrupted)
    assert cli.main(["demo", "--html", str(tmp_path / "page.html")]) == 130


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lensbridge", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("lensbridge ")
