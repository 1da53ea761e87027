"""Is the package what it says it is: its public names, its version, what it imports and what it is made of?"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lensbridge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lensbridge"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = sorted(
    path
    for folder in ("lensbridge", "tests", "compat_tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)

#: What IPython looks for in the package; people do not call these.
FOR_IPYTHON = {"load_ipython_extension", "unload_ipython_extension"}
#: Modules that are imported when a command needs them, and may import what an extra brings.
WITH_AN_EXTRA = {PACKAGE / "porting" / "rewriting.py"}

PUBLIC = {
    "ActivationCache",
    "BertNextSentencePrediction",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "HookedAudioEncoder",
    "HookedEncoder",
    "HookedEncoderDecoder",
    "HookedTransformer",
    "HookedTransformerConfig",
    "LensHandle",
    "Processing",
    "TransformerBridgeConfig",
    "TransformerLensConfig",
    "TransformerLensKeyValueCache",
    "TransformerLensKeyValueCacheEntry",
    "SVDInterpreter",
    "components",
    "conversion_utils",
    "evals",
    "factories",
    "head_detector",
    "lenses",
    "lit",
    "patching",
    "supported_models",
    "tools",
    "train",
    "utilities",
    "utils",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """The full name of every module that is imported anywhere below a node, relative imports left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)


def packages(names: Iterator[str]) -> set[str]:
    """The packages that these modules belong to, but for Python's own and this one."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"lensbridge"}


def distributions(requirements: list[str]) -> set[str]:
    """``["nnsight>=0.8.1"]`` -> ``{"nnsight"}``, with the underscores that importing takes."""
    return {re.split(r"[^\w.-]", requirement)[0].replace("-", "_") for requirement in requirements}


# --- what a user sees -------------------------------------------------------------------------------------------------


def test_the_public_names_are_exactly_these() -> None:
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    bound = {alias.asname for node in source.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert bound - {None} == PUBLIC | FOR_IPYTHON


def test_everything_else_in_the_namespace_is_a_submodule() -> None:
    others = {
        name: thing for name, thing in vars(lensbridge).items() if name not in PUBLIC | FOR_IPYTHON and name[:2] != "__"
    }
    assert [name for name, thing in others.items() if not isinstance(thing, ModuleType)] == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_says_what_it_is(name: str) -> None:
    assert getattr(lensbridge, name).__doc__


def test_the_version_is_the_one_of_the_project_and_of_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", lensbridge.__version__)
    assert "version" in PROJECT["dynamic"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == lensbridge.__version__


def test_the_command_that_pip_installs_exists() -> None:
    module, function = PROJECT["scripts"]["lensbridge"].split(":")
    __import__(module)
    assert callable(getattr(sys.modules[module], function))


def test_import_leaves_the_expensive_packages_alone() -> None:
    """In a Python of its own, because this one has imported some of them for the tests."""
    expensive = "plotly pandas datasets matplotlib IPython wandb transformer_lens nbclient nbformat libcst".split()
    code = f"import sys, lensbridge, lensbridge.cli; print([name for name in {expensive} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what it stands on ------------------------------------------------------------------------------------------------


def test_what_is_imported_with_the_package_is_a_dependency() -> None:
    """At the top of a module, outside of ``if TYPE_CHECKING``."""
    found: set[str] = set()
    for path in set(MODULES) - WITH_AN_EXTRA:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found |= packages(
            name for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) for name in imports(node)
        )
    # huggingface_hub is what transformers loads with, and is a requirement of transformers in every version.
    assert found - {"huggingface_hub"} == distributions(PROJECT["dependencies"])


def test_constraints_name_every_requirement_once_per_python() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = [line.split("==")[0] for line in text.splitlines() if line and line[0] != "#"]
    wanted = {*distributions(PROJECT["dependencies"])}
    for extra in PROJECT["optional-dependencies"].values():
        wanted |= distributions(extra)
    assert wanted <= {name.replace("-", "_") for name in pinned} | {"build"}
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    for name in set(pinned):
        own = [line for line in lines if line.split("==")[0] == name]
        assert len(own) == 1 or sorted(line.split(";")[1].split()[1] for line in own) == ["<", ">="], name


# --- what it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL_CODE, ids=name_of)
def test_a_module_opens_with_a_docstring(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].strip()[-1] in ".?:,"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 500


def modules_that_import(package: str) -> set[str]:
    return {name_of(path) for path in MODULES if package in packages(imports(ast.parse(path.read_text("utf-8"))))}


def test_only_the_engine_knows_nnsight() -> None:
    assert modules_that_import("nnsight")
    assert {Path(name).parent.as_posix() for name in modules_that_import("nnsight")} == {
        "lensbridge/engine",
        "lensbridge/engine/remote",
    }


def test_nothing_here_runs_transformer_lens() -> None:
    """But a program that `lensbridge compare` starts in a process of its own."""
    assert modules_that_import("transformer_lens") == set()
    asking = [path for path in MODULES if 'import_module("transformer_lens' in path.read_text(encoding="utf-8")]
    assert [name_of(path) for path in asking] == ["lensbridge/comparing/worker.py"]
    own = [name for name in imports(ast.parse(asking[0].read_text(encoding="utf-8"))) if name.startswith("lensbridge")]
    assert own == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "architectures").glob("*.py")), ids=name_of)
def test_architectures_are_data(path: Path) -> None:
    assert packages(imports(ast.parse(path.read_text(encoding="utf-8")))) == set()


def test_backward_in_a_one_line_with_is_taken_by_nnsight() -> None:
    """A trap of the engine that docs/differences.md warns of; when this fails, the warning can go."""
    x = torch.ones(2, requires_grad=True)
    with torch.enable_grad(): (2 * x).sum().backward()  # noqa: E701  # fmt: skip
    assert x.grad is None
    with torch.enable_grad():
        (2 * x).sum().backward()
    assert x.grad is not None
