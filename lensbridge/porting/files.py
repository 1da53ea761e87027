"""How is a Python file or a notebook read, rewritten and written back?

A notebook's cells are rewritten as one program, because an import in one cell binds a name in the next. Lines that only
IPython understands stand aside meanwhile, and cells in other languages or with mistakes stay as they are.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lensbridge.errors import MissingPackageError

#: ``%magic``, ``!command``, ``?help``, ``x = !command``, ``help?``
IPYTHON = re.compile(r"^\s*([%!?]|[\w.,\s]+=\s*[%!]).*$|^.*\?\s*$")
#: Cell magics whose cell is Python.
PYTHON_CELLS = ("%%time", "%%timeit", "%%capture", "%%prun")
MARK = "# lensbridge port, cell"


@dataclass
class Port:
    """A file before and after: texts by place (``""`` for a Python file, ``"cell 3"``), and what was left as it is."""

    path: Path
    before: dict[str, str]
    after: dict[str, str]
    remarks: list[str] = field(default_factory=list)
    #: The whole new file.
    content: str = ""

    @property
    def is_changed(self) -> bool:
        """Whether anything is to be written."""
        return self.before != self.after

    def diff(self) -> Iterator[str]:
        """The changes as unified diffs."""
        for place, text in self.before.items():
            name = f"{self.path} {place}".rstrip()
            yield from difflib.unified_diff(
                text.splitlines(), self.after[place].splitlines(), f"{name} (before)", f"{name} (after)", lineterm=""
            )

    def write(self) -> None:
        """Put the new content in the old one's place."""
        with self.path.open("w", encoding="utf-8", newline="") as file:
            file.write(self.content)


def port_file(path: Path) -> Port:
    """Rewrite a file's imports, in memory.

    Raises:
        OSError: there is no such file, it is no Python file or notebook, or it cannot be parsed.
        MissingPackageError: without libcst.
    """
    if path.suffix not in (".py", ".ipynb"):
        raise OSError(f"{path} is neither a Python file (.py) nor a notebook (.ipynb).")
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    try:
        return _python(path, text) if path.suffix == ".py" else _notebook(path, text)
    except (SyntaxError, ValueError, KeyError) as error:
        raise OSError(
            f"{path} cannot be read as {'Python' if path.suffix == '.py' else 'a notebook'}: {error}"
        ) from error


def _rewrite(source: str) -> tuple[str, list[Any]]:
    try:
        from .rewriting import rewrite
    except ImportError as error:
        raise MissingPackageError("rewriting imports needs libcst: pip install 'lensbridge[port]'") from error
    return rewrite(source)


def _python(path: Path, text: str) -> Port:
    after, remarks = _rewrite(text)
    return Port(path, {"": text}, {"": after}, [f"{path}:{remark.line}: {remark.text}" for remark in remarks], after)


def _notebook(path: Path, text: str) -> Port:
    notebook = json.loads(text)
    style = _style(notebook, text)
    cells = {f"cell {index + 1}": cell for index, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"}
    before = {place: "".join(cell["source"]) for place, cell in cells.items()}
    port = Port(path, before, dict(before))
    _port_cells(port)
    for place, cell in cells.items():
        if port.after[place] != before[place]:
            is_list = isinstance(cell["source"], list)
            cell["source"] = port.after[place].splitlines(keepends=True) if is_list else port.after[place]
    port.content = json.dumps(notebook, **style) + "\n" * text.endswith("\n")
    return port


def _port_cells(port: Port) -> None:
    """Rewrite the cells together and take them apart again."""
    joined: list[str] = []
    starts: list[tuple[int, str]] = []
    aside: dict[str, list[str]] = {}
    for place, source in port.before.items():
        lines, aside[place] = _set_aside(source)
        if not _is_python(lines):
            if _names_it(source):
                port.remarks.append(f"{port.path}, {place}: not Python that can be parsed, left as it is")
            continue
        starts.append((len(joined) + 1, place))
        joined += [f"{MARK} {place}", *lines]
        port.remarks += [f"{port.path}, {place}: {line.strip()}" for line in aside[place] if _names_it(line)]
    source, remarks = _rewrite("\n".join(joined))
    for part in re.split(rf"^{MARK} (?=cell \d+$)", source, flags=re.MULTILINE)[1:]:
        place, _, text = part.partition("\n")
        # The line break before the next mark is not the cell's.
        text = text if place == starts[-1][1] else text.removesuffix("\n")
        port.after[place] = re.sub(r"pass  # aside (\d+)$", _put_back(aside[place]), text, flags=re.MULTILINE)
    for remark in remarks:
        start, place = max(begin for begin in starts if begin[0] <= remark.line)
        port.remarks.append(f"{port.path}, {place}, line {remark.line - start}: {remark.text}")


def _set_aside(source: str) -> tuple[list[str], list[str]]:
    """The lines of a cell with IPython's own replaced by a statement of the same depth, and those lines."""
    lines = source.split("\n")
    aside: list[str] = []
    for number, line in enumerate(lines):
        is_cell_magic = line.startswith("%%") and not line.startswith(PYTHON_CELLS)
        if IPYTHON.match(line) and not is_cell_magic:
            indent = line[: len(line) - len(line.lstrip())]
            lines[number] = f"{indent}pass  # aside {len(aside)}"
            aside.append(line.lstrip())
    return lines, aside


def _put_back(aside: list[str]) -> Any:
    return lambda match: aside[int(match[1])]


def _is_python(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def _names_it(text: str) -> bool:
    return "transformer_lens" in text.replace("-", "_").lower()


def _style(notebook: Any, text: str) -> dict[str, Any]:
    """How the file's JSON was laid out, so that only what is changed changes."""
    for indent in (1, 2, 4, None):
        for ascii_only in (False, True):
            style: dict[str, Any] = {"indent": indent, "ensure_ascii": ascii_only}
            if json.dumps(notebook, **style) == text.rstrip("\n"):
                return style
    return {"indent": 1, "ensure_ascii": False}
