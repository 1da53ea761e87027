"""Is what the documents say true: does their code run, does what they name exist, are their numbers measured?"""

from __future__ import annotations

import ast
import importlib.util
import json
import linecache
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lensbridge import errors
from lensbridge.assets import TOY_DIRECTORY

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
#: `tests/test_docs.py`, `compat_tests/test_weights.py::test_state_dict`, `engine/plan.py`
FILE = re.compile(r"`?([\w.]+(?:/[\w.]+)+\.(?:py|md|txt|toml|json))(?:::(\w+))?")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What can stand after ``#`` in a link to the page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(page: Path) -> list[str]:
    return [code for language, code in CODE.findall(page.read_text(encoding="utf-8")) if language == "python"]


def code_of(page: Path) -> str:
    """The Python of a page, every line where it stands there."""
    text, code, end = page.read_text(encoding="utf-8"), "", 0
    for block in CODE.finditer(text):
        if block[1] == "python":
            code += "\n" * text.count("\n", end, block.start(2)) + block[2]
            end = block.end(2)
    return code


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in one namespace, from top to bottom, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    source, name = code_of(page), f"{page}.py"
    if "shim.install()" in source:
        # The alias wants a process into which the real transformer_lens was not imported.
        (tmp_path / "page.py").write_text(source, encoding="utf-8")
        subprocess.run([sys.executable, "page.py"], check=True)
        return
    # nnsight looks up the source around a trace, and around a backward pass.
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(keepends=True), name))
    exec(compile(source, name, "exec"), {"__name__": "__main__"})


def test_the_readme_has_the_totals_of_the_table_of_families() -> None:
    words = r"(\d+) entries in transformers.* list.*? (\d+)\s+are served, (\d+) of them.*? and\s+(\d+)"
    pages = (ROOT / "README.md", ROOT / "docs" / "families.md")
    ours, table = (re.search(words, page.read_text(encoding="utf-8"), re.DOTALL) for page in pages)
    assert ours is not None and table is not None and ours.groups() == table.groups()


def test_every_error_has_a_page() -> None:
    overview = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    known = {error.__name__ for error in vars(errors).values() if isinstance(error, type)} - {"LensbridgeError"}
    known = {name for name in known if issubclass(getattr(errors, name), errors.LensbridgeError)}
    assert set(re.findall(r"^\| \[(\w+)\]", overview, re.MULTILINE)) == known
    for name, page in re.findall(r"\[(\w+)\]\((errors/[\w-]+\.md)\)", overview):
        assert (ROOT / "docs" / page).read_text(encoding="utf-8").startswith(f"# {name}\n")


def test_every_page_is_in_the_sites_contents() -> None:
    """What mkdocs says when it builds the site (`make site`), without mkdocs."""
    contents = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages == contents - {"contributing.md", "changelog.md", "benchmarks.md"}


def test_the_readme_has_code_to_run() -> None:
    assert len(python_blocks(ROOT / "README.md")) >= 3


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path.replace("\\", "")).resolve() if path else page
        assert there.exists(), target
        assert ROOT in there.parents, target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    """Paths are those of the repository, of the package, or of the page's own folder."""
    for path, test in FILE.findall(re.sub(r"\]\([^)]*\)", "]", prose(page))):
        found = [base / path for base in (ROOT, ROOT / "lensbridge", page.parent) if (base / path).exists()]
        assert found, path
        if test:
            tree = ast.parse(found[0].read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{test}"


def script(name: str) -> ModuleType:
    """A script of ``docs/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_hook_points_is_up_to_date() -> None:
    maker = script("make_hook_points")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.render(), "run `make docs`"


def test_the_readmes_scores_of_the_bundled_model_are_the_measured_ones() -> None:
    maker = script("make_readme")
    scores = json.loads((TOY_DIRECTORY / "scores.json").read_text(encoding="utf-8"))["scores"]
    readme = maker.README.read_text(encoding="utf-8")
    assert maker.filled(readme, "toy", maker.toy_section(scores)) == readme, "run `make docs`"


def test_a_benchmarks_results_are_filled_in_whole() -> None:
    maker = script("make_readme")
    pages = [f"### {name}, 15 tokens\n\n| a | b |\n|---|---|\n| {name} | 2 |\n\nVersions: x.\n" for name in ("A", "B")]
    section = maker.benchmark_section(pages)
    assert section.startswith(maker.HOW_TO_READ)
    assert section.endswith(
        "\n\n**A, 15 tokens**\n\n| a | b |\n|---|---|\n| A | 2 |"
        "\n\n**B, 15 tokens**\n\n| a | b |\n|---|---|\n| B | 2 |\n\nVersions: x."
    )
    assert maker.filled("1 <!-- benchmark --> old <!-- /benchmark --> 2", "benchmark", "new") == (
        "1 <!-- benchmark -->\nnew\n<!-- /benchmark --> 2"
    )


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands[:2] == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
