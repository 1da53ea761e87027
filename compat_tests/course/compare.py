"""Are all numbers equal that the cells of a notebook bind, on transformer-lens 3.9.0 and under the alias?

    python -m compat_tests.course.compare [NOTEBOOK]

Each side is a process of its own that executes the cells one after the other in one namespace, and keeps after each
cell every tensor, number, array and cache among the names that it has bound anew, lists and dicts of them included.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import torch

NOTEBOOK = Path(__file__).with_name("course.ipynb")
ROOT = Path(__file__).parents[2]
#: Relative to the largest value of a tensor; differences of numbers that cancel are rounding, so small ones count as 0.
TOLERANCE, ZERO = 1e-4, 2e-5


def tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The numbers in a value, by name."""
    if isinstance(value, torch.Tensor):
        yield name, value.detach().clone()
    elif type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "fiub":
        yield name, torch.as_tensor(value).clone()
    elif isinstance(value, (bool, int, float)):
        yield name, torch.tensor(value)
    elif type(value).__name__ == "FactoredMatrix":
        yield from (*tensors(f"{name}.A", value.A), *tensors(f"{name}.B", value.B))
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from tensors(f"{name}[{index}]", each)
    elif not isinstance(value, type) and hasattr(value, "keys") and hasattr(value, "__getitem__"):
        keys = value.keys()
        for key in keys:
            yield from tensors(f"{name}[{key!r}]", value[key])


def cells_of(notebook: Path) -> list[str]:
    """The code of a notebook's cells."""
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def execute(notebook: Path, alias: bool) -> dict[str, torch.Tensor]:
    """Every number that the cells bind, by cell and name."""
    if alias:
        from lensbridge import shim

        shim.install()
    from transformers import AutoTokenizer

    from compat_tests.downstream.model import hf_model, offline
    from lensbridge.assets import TOY_DIRECTORY

    model = hf_model()
    namespace: dict[str, Any] = {"hf_model": model, "tokenizer": AutoTokenizer.from_pretrained(TOY_DIRECTORY)}
    found: dict[str, torch.Tensor] = {}
    with offline(model), mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):
        for number, code in enumerate(cells_of(notebook)):
            before = {name: id(value) for name, value in namespace.items()}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, f"cell {number}", "exec"), namespace)
            for name, value in list(namespace.items()):
                if before.get(name) != id(value) and not name.startswith("_"):
                    found.update(tensors(f"{number:02d} {name}", value))
    return found


def numbers(notebook: Path, alias: bool, folder: Path) -> dict[str, torch.Tensor]:
    """What `execute` finds in a process of its own."""
    path = folder / f"{alias}.pt"
    command = [sys.executable, "-m", "compat_tests.course.compare", str(notebook), str(path), str(int(alias))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{'the alias' if alias else 'transformer-lens 3.9.0'} failed:\n{done.stderr[-3000:]}")
    return torch.load(path)


def differences(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> list[str]:
    """A line for each number that is not the same."""
    found = [f"{name} is bound on one side only" for name in sorted(theirs.keys() ^ ours.keys())]
    for name in theirs.keys() & ours.keys():
        one, other = theirs[name], ours[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            found.append(f"{name}: {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}")
            continue
        if not one.numel() or torch.equal(one, other):
            continue
        infinite = ~one.double().isfinite()
        gap = (one.double() - other.double())[~infinite].abs().max().item()
        scale = one.double()[~infinite].abs().max().item()
        if not torch.equal(one[infinite], other[infinite]) or not gap <= max(TOLERANCE * scale, ZERO):
            found.append(f"{name}: off by {gap:.1e} of {scale:.1e}")
    return sorted(found)


def main(arguments: list[str]) -> int:
    """Compare, or with three arguments be one of the two sides."""
    if len(arguments) == 3:
        torch.set_num_threads(1)
        torch.save(execute(Path(arguments[0]), arguments[2] == "1"), arguments[1])
        return 0
    notebook = Path(arguments[0]) if arguments else NOTEBOOK
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = (numbers(notebook, alias, Path(folder)) for alias in (False, True))
    found = differences(theirs, ours)
    print("\n".join([*found, f"{len(cells_of(notebook))} cells, {len(theirs)} numbers, {len(found)} differ"]))
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
