"""Are imports rewritten, nothing else touched, and everything that could not be mapped remarked on?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lensbridge import cli
from lensbridge.porting import names
from lensbridge.porting.files import port_file
from lensbridge.porting.rewriting import rewrite

#: before -> after, where nothing is left to look at.
MAPPED = {
    "import transformer_lens": "import lensbridge",
    "import os, transformer_lens  # why": "import os, lensbridge  # why",
    "import transformer_lens as tl\ntl.utils.lm_accuracy": "import lensbridge as tl\ntl.utils.lm_accuracy",
    "import transformer_lens.utils as utils": "import lensbridge.utils as utils",
    "import transformer_lens.HookedTransformer as module": "import lensbridge.model as module",
    "import transformer_lens.utils\nx = transformer_lens.utils": "import lensbridge.utils\nx = lensbridge.utils",
    "from transformer_lens import *": "from lensbridge import *",
    "from transformer_lens import HookedTransformer, utils": "from lensbridge import HookedTransformer, utils",
    "from transformer_lens import loading_from_pretrained as l": "from lensbridge import loading_from_pretrained as l",
    "from transformer_lens import EasyTransformer": "from lensbridge import HookedTransformer as EasyTransformer",
    "from transformer_lens import EasyTransformer as E": "from lensbridge import HookedTransformer as E",
    "from transformer_lens.HookedTransformer import Output": "from lensbridge.model import Output",
    "from transformer_lens.components.mlp import MLP": "from lensbridge.components.mlps.mlp import MLP",
    "from transformer_lens.utilities import devices": "from lensbridge.utilities import devices",
    "from transformer_lens.hook_points import (\n    HookPoint,  # a\n    LensHandle,\n)": (
        "from lensbridge.hook_points import (\n    HookPoint,  # a\n    LensHandle,\n)"
    ),
    "def f():\n    import transformer_lens\n    return f'{transformer_lens.HookedTransformer}'": (
        "def f():\n    import lensbridge\n    return f'{lensbridge.HookedTransformer}'"
    ),
    "def f(model: 'int'):\n    from transformer_lens import HookedTransformer": (
        "def f(model: 'int'):\n    from lensbridge import HookedTransformer"
    ),
}

#: What has another meaning, or none that could be known, stays as it is and is no matter to look at.
UNTOUCHED = [
    "",
    "import transformer_lenses, my.transformer_lens",
    "from . import transformer_lens\nfrom .transformer_lens import x",
    "transformer_lens = 3\nprint(transformer_lens)",
    '"""About transformer_lens."""\n# import transformer_lens\n',
    "x = dict(transformer_lenses=1).utils",
]


@pytest.mark.parametrize("before", MAPPED)
def test_what_can_be_mapped(before: str) -> None:
    assert rewrite(before) == (MAPPED[before], [])
    compile(MAPPED[before], "after", "exec")
    exec(MAPPED[before], {})
    assert rewrite(MAPPED[before])[0] == MAPPED[before], "a second time changes nothing"


@pytest.mark.parametrize("source", UNTOUCHED)
def test_what_is_none_of_its_business(source: str) -> None:
    assert rewrite(source) == (source, [])


def test_a_name_is_changed_only_where_the_import_has_bound_it() -> None:
    source = "import transformer_lens\ndef f(transformer_lens):\n    return transformer_lens.x, g(transformer_lens=1)\n"
    after, remarks = rewrite(source)
    assert after == source.replace("import transformer_lens", "import lensbridge") and remarks == []
    assert rewrite("import transformer_lens\na.transformer_lens\n")[0] == "import lensbridge\na.transformer_lens\n"


@pytest.mark.parametrize(
    "source, line, says",
    [
        ("import os\nimport transformer_lens.model_bridge", 2, "it serves TransformerBridge"),
        ("from transformer_lens.pretrained.weight_conversions import x", 1, "it converts HuggingFace's weights"),
        ("from transformer_lens import HookedTransformers", 1, "lensbridge has no HookedTransformers. Closest: Hooked"),
        ("import transformer_lens as t\n\nt.utils.nothing", 3, "lensbridge.utils has no nothing"),
        ("import transformer_lens as t\nt.HookedTransformer.load", 2, "lensbridge.HookedTransformer has no load"),
        ("from transformer_lens import utils\nutils.no.such", 2, "lensbridge.utils has no no"),
        ("patch('transformer_lens.utils.x')", 1, "text that names TransformerLens: 'transformer_lens.utils.x'"),
        ("x = f'{1} transformer-lens'", 1, "text that names TransformerLens"),
    ],
)
def test_what_cannot_be_mapped_is_remarked_on(source: str, line: int, says: str) -> None:
    remarks = rewrite(source)[1]
    assert [remark.line for remark in remarks] == [line]
    assert says in remarks[0].text


def test_a_statement_that_can_be_mapped_in_part() -> None:
    after, remarks = rewrite("from transformer_lens import HookPoint, TransformerBridge, utils  # x\nprint(1)\n")
    assert after == (
        "from lensbridge import HookPoint, utils  # x\nfrom transformer_lens import TransformerBridge\nprint(1)\n"
    )
    assert len(remarks) == 1 and "TransformerBridge" in remarks[0].text
    source = "from transformer_lens.hook_points import (\n    HookPoint,\n    A,\n    B,\n)\n"
    after = "from lensbridge.hook_points import (\n    HookPoint,\n)\nfrom transformer_lens.hook_points import A, B\n"
    assert rewrite(source)[0].replace("    )", ")") == after


def test_names() -> None:
    assert names.is_theirs("transformer_lens") and names.is_theirs("transformer_lens.utils")
    assert not names.is_theirs("transformer_lensing")
    assert names.module_of("transformer_lens") == "lensbridge"
    assert names.module_of("transformer_lens.no_such") is None
    assert names.missing("transformer_lens.HookedTransformer.from_pretrained") is None
    assert names.missing("transformer_lens.HookedTransformer.from_pretrained.anything") is None
    assert names.missing("transformer_lens.tools.analysis.direct_path_patching") is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shown first, with the exit code of success; then written, with its line ends; then there is nothing to do."""
    path = tmp_path / "theirs.py"
    before = b"import torch\r\nimport transformer_lens\r\n"
    path.write_bytes(before)
    assert cli.main(["port", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "-import transformer_lens\n+import lensbridge\n" in shown and "1 of 1 files to change (--write" in shown
    assert path.read_bytes() == before
    assert cli.main(["port", "--write", str(path)]) == 0
    assert path.read_bytes() == before.replace(b"transformer_lens", b"lensbridge")
    assert "1 of 1 files changed, 0 places" in capsys.readouterr().out
    assert cli.main(["port", str(path)]) == 0
    assert "0 of 1 files to change" in capsys.readouterr().out


def test_the_exit_code_says_whether_something_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.py"
    path.write_text("import transformer_lens\nimport transformer_lens.benchmarks\n")
    assert cli.main(["port", "--write", str(path)]) == 1
    assert f"{path}:2: transformer_lens.benchmarks has no counterpart" in capsys.readouterr().out
    assert path.read_text() == "import lensbridge\nimport transformer_lens.benchmarks\n"


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("theirs.md", "", "neither a Python file (.py) nor a notebook"),
        ("theirs.py", "x = (", "cannot be read as Python: line"),
        ("theirs.ipynb", "{", "cannot be read as a notebook"),
        ("theirs.ipynb", "{}", "cannot be read as a notebook"),
    ],
)
def test_what_cannot_be_ported(
    name: str, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.py", tmp_path / name
    good.write_text("import transformer_lens\n")
    bad.write_text(text)
    assert cli.main(["port", "--write", str(good), str(bad)]) == 2
    assert says in capsys.readouterr().err
    assert good.read_text() == "import transformer_lens\n", "all files are read before any is written"


def test_without_libcst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.py"
    path.write_text("import transformer_lens\n")
    monkeypatch.delitem(sys.modules, "lensbridge.porting.rewriting")
    monkeypatch.setitem(sys.modules, "libcst", None)
    assert cli.main(["port", str(path)]) == 2
    assert "pip install 'lensbridge[port]'" in capsys.readouterr().err


CELLS = [
    ["%pip install transformer_lens\n", "import transformer_lens"],
    ["%%time\n", "if True:\n", "    !ls\n", "x = transformer_lens.utils.get_act_name('q', 0)\n", "\n"],
    ["transformer_lens.utils.get_act_name?\n", "names = !ls"],
    ["%%bash\n", "pip show transformer-lens"],
    ["y = transformer_lens.utils.nothing"],
    ["1 +"],
    ["print('é')"],
]
EXPECTED = [
    ["%pip install transformer_lens\n", "import lensbridge"],
    ["%%time\n", "if True:\n", "    !ls\n", "x = lensbridge.utils.get_act_name('q', 0)\n", "\n"],
    CELLS[2],
    CELLS[3],
    ["y = lensbridge.utils.nothing"],
    CELLS[5],
    CELLS[6],
]


def as_notebook(cells: list[Any]) -> dict[str, Any]:
    text = {"cell_type": "markdown", "metadata": {}, "source": ["import transformer_lens"]}
    code = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": one} for one in cells
    ]
    return {"cells": [text, *code], "metadata": {"a": "é"}, "nbformat": 4, "nbformat_minor": 5}


@pytest.mark.parametrize("style", [{"indent": 1}, {"indent": 2, "ensure_ascii": False}, {"indent": None}], ids=str)
@pytest.mark.parametrize("end", ["", "\n"], ids=["", "line end"])
def test_a_notebook(style: dict[str, Any], end: str, tmp_path: Path) -> None:
    """An import in one cell counts in the next; the layout of the file stays."""
    path = tmp_path / "theirs.ipynb"
    path.write_text(json.dumps(as_notebook(CELLS), **style) + end, encoding="utf-8")
    port = port_file(path)
    assert port.content == json.dumps(as_notebook(EXPECTED), **style) + end
    port.write()
    assert path.read_text(encoding="utf-8") == port.content
    assert [remark.removeprefix(f"{path}, ").split(": ")[0] for remark in port.remarks] == [
        "cell 2",
        "cell 4",
        "cell 5",
        "cell 6, line 1",
    ]
    assert "lensbridge.utils has no nothing" in port.remarks[-1]
    assert any("cell 3 (after)" in line for line in port.diff())


def test_cells_may_be_one_text_or_none(tmp_path: Path) -> None:
    path = tmp_path / "theirs.ipynb"
    path.write_text(json.dumps(as_notebook(["import transformer_lens"])))
    assert json.loads(port_file(path).content) == as_notebook(["import lensbridge"])
    path.write_text(json.dumps(as_notebook([])))
    assert not port_file(path).is_changed
