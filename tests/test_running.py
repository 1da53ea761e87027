"""Do files and notebooks run under the alias as they would run by themselves, and is what went wrong shown?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import lensbridge
from lensbridge import cli, shim
from lensbridge.errors import MissingPackageError
from lensbridge.running import command, notebook, python
from lensbridge.running.notebook import Cell, Failure


@pytest.fixture
def no_alias_left() -> Iterator[None]:
    """The alias is gone afterwards, and what it pushed aside is back."""
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "transformer_lens"}
    yield
    shim.uninstall()
    sys.modules.update(real)


@pytest.fixture
def program(tmp_path: Path, no_alias_left: None) -> Callable[[str], Path]:
    """A function that writes a file with this source."""

    def write(source: str, name: str = "theirs.py") -> Path:
        path = tmp_path / name
        path.write_text(source, encoding="utf-8")
        return path

    return write


# --- Python files -----------------------------------------------------------------------------------------------------


def test_a_file_finds_itself_as_python_would_run_it(
    program: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    program("name = 'beside'", "neighbour.py")
    path = program(
        "import json, pickle, sys, neighbour, transformer_lens\n"
        "class Kept: pass\n"
        "kept = type(pickle.loads(pickle.dumps(Kept()))) is Kept\n"
        "print(json.dumps([__name__, __file__, sys.argv, sys.path[0], transformer_lens.__name__, kept]))\n"
    )
    before = sys.argv, list(sys.path), sys.modules["__main__"]
    assert cli.main(["run", str(path), "--keep-going", "-x", "y"]) == 0
    argv = [str(path), "--keep-going", "-x", "y"]
    shown = json.loads(capsys.readouterr().out)
    assert shown == ["__main__", str(path), argv, str(path.parent), "lensbridge", True]
    assert (sys.argv, list(sys.path), sys.modules["__main__"]) == before
    del sys.modules["neighbour"]


def test_an_exception_is_shown_with_the_programs_own_frames(
    program: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of the kinds that the command line itself reports in one line."""
    path = program("def fail():\n    open('/no/such/file')\n\nfail()\n")
    assert cli.main(["run", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[1].startswith(f'  File "{path}", line 4')
    assert lines[-1].startswith("FileNotFoundError:")


def test_a_mistake_in_the_source(program: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(program("x = (\n"))]) == 1
    assert "SyntaxError: '(' was never closed" in capsys.readouterr().err


def test_a_program_that_exits(program: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(program("import sys\nsys.exit(7)\n"))])
    assert stop.value.code == 7


def test_an_interruption(program: Callable[..., Path]) -> None:
    assert cli.main(["run", str(program("raise KeyboardInterrupt\n"))]) == 130


@pytest.mark.parametrize("name", ["theirs.py", "theirs.ipynb"])
def test_no_such_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", name]) == 2
    assert capsys.readouterr().err == f"lensbridge run: There is no file {name}.\n"


def test_code_and_modules(
    program: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program("import sys; print('module', __name__, sys.argv[1:])", "theirs_too.py").parent)
    before = sys.modules["__main__"]
    code = "import sys\nclass A: pass\nassert sys.modules['__main__'].A is A\nprint('code', sys.argv)"
    assert python.run_code(code, ["a"]) == 0
    assert python.run_module("theirs_too", ["b"]) == 0
    assert capsys.readouterr().out == "code ['-c', 'a']\nmodule __main__ ['b']\n"
    assert python.run_code("1 / 0") == 1
    assert capsys.readouterr().err.splitlines()[1] == '  File "<string>", line 1, in <module>'
    assert sys.modules["__main__"] is before


# --- notebooks --------------------------------------------------------------------------------------------------------

CELLS = [
    "# a title",
    "import os, sys, transformer_lens\nprint(transformer_lens.__name__, sys.argv[1:], os.path.basename(os.getcwd()))",
    "",
    "\ndef fail():\n    raise LookupError('not there')\n\nfail()",
    "%%time\nprint('still here')",
]


@pytest.fixture
def ipynb(tmp_path: Path) -> Path:
    """A notebook with a text, three cells that say something, and an empty one."""
    folder = tmp_path / "course"
    folder.mkdir()
    new = nbformat.v4
    cells = [new.new_markdown_cell(CELLS[0]), *(new.new_code_cell(cell) for cell in CELLS[1:])]
    cells[1].outputs = [new.new_output("stream", text="from an earlier run")]
    path = folder / "lesson.ipynb"
    nbformat.write(new.new_notebook(cells=cells), path)
    return path


def test_a_notebook(ipynb: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a kernel of its own, with one cell that fails and one behind it."""
    before = ipynb.read_bytes()
    assert cli.main(["run", str(ipynb), "data", "--keep-going", "--size", "3"]) == 1
    shown = capsys.readouterr().out
    assert ipynb.read_bytes() == before
    assert (
        "[1/3] import os, sys, transformer_lens" in shown and "[2/3] def fail():" in shown and "[3/3] %%time" in shown
    )
    assert "LookupError" in shown and "not there" in shown and "----> 4 fail()" in shown
    output = ipynb.with_suffix(".out.ipynb")
    assert "1 of 3 cells failed" in shown and str(output) in shown.replace("\n", "")
    done = nbformat.read(output, as_version=4)
    nbformat.validate(done)
    assert [cell.source for cell in done.cells] == CELLS
    assert [len(cell.outputs) for cell in done.cells[1:4]] == [1, 0, 1]
    assert done.cells[1].outputs[0].text == "lensbridge ['data', '--size', '3'] course\n"
    assert done.cells[3].outputs[0].ename == "LookupError"
    assert "still here" in done.cells[4].outputs[0].text


class _Client:
    """What a kernel would answer, without one."""

    def __init__(self, nb: Any, fail: dict[int, Any]) -> None:
        self.nb, self.fail, self.timeout, self.ran = nb, fail, 5, []

    def execute_cell(self, node: Any, index: int) -> None:
        self.ran.append(index)
        problem = self.fail.get(index)
        if isinstance(problem, Exception):
            raise problem
        if problem:
            node.outputs = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[problem])]


@pytest.fixture
def run_with(ipynb: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[int]]]:
    """Run the notebook's cells on a kernel that fails as told: exit code and the cells that ran."""

    def run(fail: dict[int, Any], keep_going: bool = False, tags: tuple[str, ...] = ()) -> tuple[int, list[int]]:
        nb = nbformat.read(ipynb, as_version=4)
        for cell in nb.cells:
            cell.metadata["tags"] = list(tags)
        client = _Client(nb, fail)

        class Opened:
            def __enter__(self) -> notebook.NotebookRun:
                return notebook.NotebookRun(client, notebook._code_cells(nb))

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(command, "open_notebook", lambda *_: Opened())
        return command.run_notebook(ipynb, ipynb.with_suffix(".out.ipynb"), [], keep_going), client.ran

    return run


def test_a_failing_cell_is_the_last_unless_told_otherwise(
    run_with: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with({}) == (0, [1, 3, 4])
    assert "all 3 cells ran" in capsys.readouterr().out
    assert run_with({3: "why"}) == (1, [1, 3])
    shown = capsys.readouterr().out
    assert "why" in shown and "1 cells were not run" in shown
    assert run_with({3: "why"}, keep_going=True) == (1, [1, 3, 4])
    assert run_with({4: "why"}) == (1, [1, 3, 4])
    assert "It was the last cell." in capsys.readouterr().out
    assert run_with({3: "why"}, tags=("raises-exception",)) == (0, [1, 3, 4])


def test_nothing_follows_without_a_kernel(run_with: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    assert run_with({1: DeadKernelError("died")}, keep_going=True) == (1, [1])
    assert "the kernel died" in capsys.readouterr().out
    assert run_with({1: CellTimeoutError("late")}, keep_going=True) == (1, [1])
    assert "no answer after 5 seconds (--timeout)" in capsys.readouterr().out


def test_options_of_a_notebook_stand_where_one_likes(ipynb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "run_notebook", lambda *given: seen.append(given[1:]) or 0)
    other = ipynb.with_name("elsewhere.ipynb")
    cli.main(["run", str(ipynb)])
    cli.main(["run", "--keep-going", str(ipynb), "--timeout", "3", "--output", str(other), "--n", "1"])
    cli.main(["run", "--timeout", "2.5", str(ipynb), "a"])
    usual = ipynb.with_suffix(".out.ipynb")
    assert seen == [(usual, [], False, None), (other, ["--n", "1"], True, 3.0), (usual, ["a"], False, 2.5)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}", "is not a notebook"),
        ("not json", "is not a notebook"),
        (
            json.dumps(
                {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"language": "R"}}, "cells": []}
            ),
            "is a notebook for R",
        ),
    ],
)
def test_what_is_no_notebook(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.ipynb"
    path.write_text(text)
    assert cli.main(["run", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_an_output_that_cannot_be_written(ipynb: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(ipynb), "--output", "/no/such/folder/x.ipynb"]) == 2
    assert "there is no directory /no/such/folder" in capsys.readouterr().err


def test_without_jupyter(ipynb: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "nbclient", None)
    assert cli.main(["run", str(ipynb)]) == 2
    assert "pip install 'lensbridge[notebook]'" in capsys.readouterr().err
    with pytest.raises(MissingPackageError), notebook.open_notebook(ipynb, ipynb):
        pass


def test_cells_and_failures_are_what_they_say() -> None:
    assert Cell(0, 1, "\n\n  x = 1\ny").title == "x = 1"
    assert Failure("why").is_final is False
    assert lensbridge.running.__doc__
