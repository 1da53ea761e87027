"""Do the notebooks of ``examples/`` run, find what they say, and take another model in the same place?

Each runs in a kernel of its own, as in Jupyter. What a notebook finds is asserted in its own cells.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lensbridge.assets import TOY_DIRECTORY
from lensbridge.running.notebook import NotebookRun, open_notebook

ROOT = Path(__file__).resolve().parents[1]
#: What `lensbridge run` leaves beside a notebook is not one.
PATHS = sorted(path for path in (ROOT / "examples").glob("*.ipynb") if not path.name.endswith(".out.ipynb"))
MODEL_LINE = 'MODEL = "toy"'
#: Seconds for a cell. Most take less than one.
LIMIT = 120

every_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def sources(path: Path, kind: str = "code") -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def checks(source: str) -> bool:
    """Whether a cell says what was found, and does nothing else."""
    return source.startswith("assert ") or (source.startswith("if MODEL == ") and "assert " in source)


def drawing(path: Path) -> str | None:
    """The cell that says how tables are drawn."""
    return next((source for source in sources(path) if "\ndef heatmap(" in source), None)


@contextmanager
def running(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NotebookRun]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with open_notebook(path, tmp_path / "executed.ipynb", timeout=LIMIT) as notebook:
        yield notebook


@every_notebook
def test_a_notebook_finds_what_it_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(path, tmp_path, monkeypatch) as notebook:
        for cell in notebook.cells:
            failure = notebook.execute(cell)
            assert failure is None, f"cell {cell.number}\n{cell.source}\n{failure.traceback}"
    for cell in read(tmp_path / "executed.ipynb").cells:
        for output in cell.get("outputs", ()):
            if "application/vnd.plotly.v1+json" in output.get("data", {}):
                # A page that cannot draw the one shows the other.
                assert output.data["text/html"].startswith("<table>")


@pytest.mark.slow
@every_notebook
def test_the_model_is_one_line(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape and random weights: nothing is found, but every cell that does not check a finding runs."""
    torch.manual_seed(0)
    toy = GPT2Config.from_pretrained(TOY_DIRECTORY)
    config = GPT2Config(**{**toy.to_dict(), "n_layer": 5, "n_head": 2, "n_embd": 48})
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((TOY_DIRECTORY / name).read_bytes())
    document = read(path)
    document.cells = [cell for cell in document.cells if not checks(cell.source)]
    for cell in document.cells:
        cell.source = cell.source.replace(MODEL_LINE, f"MODEL = {str(tmp_path / 'other')!r}")
    nbformat.write(document, tmp_path / "other.ipynb")
    with running(tmp_path / "other.ipynb", tmp_path, monkeypatch) as notebook:
        for cell in notebook.cells:
            failure = notebook.execute(cell)
            assert failure is None, f"cell {cell.number}\n{cell.source}\n{failure.traceback}"


@every_notebook
def test_a_notebook_is_committed_without_what_it_puts_out(path: Path) -> None:
    document = read(path)
    nbformat.validate(document)
    for cell in document.cells:
        assert re.fullmatch(r"[a-z0-9-]+", cell.id)
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert len({cell.id for cell in document.cells}) == len(document.cells)
    assert document.metadata.kernelspec.name == "python3"


@every_notebook
def test_a_notebook_opens_with_its_question(path: Path) -> None:
    document = read(path)
    heading = document.cells[0].source.splitlines()[0]
    assert heading.startswith("# ") and heading.endswith("?")
    assert "".join(sources(path)).count(MODEL_LINE) == 1
    assert sum(map(checks, sources(path))) >= 5


def test_all_draw_in_the_same_way() -> None:
    assert len({drawing(path) for path in PATHS} - {None}) == 1


@pytest.mark.parametrize("plotly", [True, False])
def test_a_table_is_drawn_without_plotly_too(plotly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(IPython.display, "display", lambda picture, raw: shown.append(picture))
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **options)

    if not plotly:
        monkeypatch.setattr(builtins, "__import__", without)
    namespace: dict[str, Any] = {}
    source = next(filter(None, map(drawing, PATHS)))
    exec(source, namespace)
    values = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    namespace["heatmap"](values, "a < b", ["<s>", "x"], ["same", "same"])
    (picture,) = shown
    assert "a &lt; b" in picture["text/html"] and "&lt;s&gt;" in picture["text/html"]
    assert picture["text/html"].count("<td") == 4
    assert 'style="background:rgba(178,24,43,0.80)" title="&lt;s&gt;, same: -2.000">-2.00' in picture["text/html"]
    assert ("application/vnd.plotly.v1+json" in picture) == plotly
    if plotly:
        drawn = picture["application/vnd.plotly.v1+json"]["data"][0]
        assert drawn["z"] == values.tolist()


@every_notebook
def test_every_notebook_is_listed(path: Path) -> None:
    assert f"(../examples/{path.name})" in (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
