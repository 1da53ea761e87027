"""Does ``transformer_lens`` lead to lensbridge, wholly, and back again?

Other tests of the same process may have imported the real package: here it is put aside, and must be back afterwards.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lensbridge
from lensbridge import shim
from lensbridge.errors import AliasError
from lensbridge.module_names import EMULATED_VERSION, NOT_OFFERED, SAME_MODULE

ROOT = Path(__file__).parent.parent


def theirs() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "transformer_lens"}


@pytest.fixture
def clean() -> Iterator[None]:
    """No transformer_lens at all; what there was is put back, and must not have changed."""
    before, finders = theirs(), list(sys.meta_path)
    for name in before:
        del sys.modules[name]
    yield
    shim.uninstall()
    assert theirs() == {} and sys.meta_path == finders
    sys.modules.update(before)


@pytest.fixture
def alias(clean: None) -> None:
    shim.install()


# --- what it leads to ------------------------------------------------------------------------------------------------


def test_the_package_is_lensbridge(alias: None) -> None:
    import transformer_lens
    from transformer_lens import HookedTransformer

    assert transformer_lens is lensbridge
    assert HookedTransformer is lensbridge.HookedTransformer
    assert transformer_lens.EasyTransformer is HookedTransformer


def test_every_way_of_importing(alias: None) -> None:
    namespace: dict[str, Any] = {}
    exec(
        "import transformer_lens.utils as utils\n"
        "import transformer_lens.hook_points, transformer_lens.utilities.tensors\n"
        "from transformer_lens.hook_points import HookPoint\n"
        "from transformer_lens import evals, utils as same\n"
        "from transformer_lens.HookedTransformer import HookedTransformer\n"
        "from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache\n"
        "from transformer_lens import *\n",
        namespace,
    )
    assert namespace["utils"] is namespace["same"] is lensbridge.utils
    assert namespace["HookPoint"] is lensbridge.HookPoint and namespace["evals"] is lensbridge.evals
    assert namespace["HookedTransformer"] is lensbridge.HookedTransformer
    assert namespace["HookedTransformerKeyValueCache"] is lensbridge.TransformerLensKeyValueCache
    assert namespace["ActivationCache"] is lensbridge.ActivationCache
    assert namespace["transformer_lens"].utilities.tensors is lensbridge.utilities.tensors


@pytest.mark.parametrize("path", SAME_MODULE)
def test_importing_a_module_leaves_the_class_of_its_name(alias: None, path: str) -> None:
    """Python binds a module in its parent when it imports it, but only the first time."""
    module = importlib.import_module(f"transformer_lens.{path}")
    assert module is importlib.import_module(f"lensbridge.{SAME_MODULE[path]}")
    if path[0].isupper():
        assert isinstance(getattr(lensbridge, path), type)


def test_a_module_that_nobody_has_imported_yet_is_loaded_once(alias: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lensbridge.native.old_weights", "transformer_lens.native.old_weights"):
        monkeypatch.delitem(sys.modules, name)
    first = importlib.import_module("transformer_lens.native.old_weights")
    assert first is importlib.import_module("lensbridge.native.old_weights")
    assert first.__name__ == first.__spec__.name == "lensbridge.native.old_weights"


@pytest.mark.parametrize("path", [*NOT_OFFERED, "hook_point", "model.no_such_module", "tools.no_such_module"])
def test_what_is_not_there_says_so(alias: None, path: str) -> None:
    path += ".no_such_part" if path.startswith("tools.") else ""
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(f"transformer_lens.{path}")
    assert raised.value.name is not None and f"transformer_lens.{path}".startswith(raised.value.name)
    if path in NOT_OFFERED:
        assert NOT_OFFERED[path] in str(raised.value)
    if path == "hook_point":
        assert "Closest: hook_points" in str(raised.value)


def test_an_optional_package_that_is_missing_is_what_is_reported(alias: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setattr(shim.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'pandas'$"):
        __import__("transformer_lens.no_such_module")


# --- what is done with it ---------------------------------------------------------------------------------------------


def test_instances_pickles_and_annotations(alias: None, lens: Any) -> None:
    import transformer_lens

    assert isinstance(lens, transformer_lens.HookedTransformer)
    cfg = lens.cfg
    stream = pickle.dumps(cfg, protocol=0)
    # As a process wrote it in which the class had TransformerLens' path.
    old = stream.replace(b"lensbridge.config", b"transformer_lens.HookedTransformerConfig")
    assert old != stream and pickle.loads(old) == pickle.loads(stream) == cfg

    @dataclasses.dataclass
    class Holder:
        model: "transformer_lens.HookedTransformer"

    hints = typing.get_type_hints(Holder, {"transformer_lens": transformer_lens})
    assert hints == {"model": lensbridge.HookedTransformer}


@pytest.mark.parametrize("name", ["transformer_lens", "transformer-lens", "Transformer.Lens"])
def test_the_version_is_the_one_that_is_emulated(alias: None, name: str) -> None:
    assert importlib.metadata.version(name) == EMULATED_VERSION
    assert importlib.metadata.metadata(name)["Name"] == "transformer-lens"


def test_other_packages_keep_their_metadata(alias: None) -> None:
    assert importlib.metadata.version("torch") == importlib.metadata.distribution("torch").version
    assert importlib.metadata.version("torch") != EMULATED_VERSION
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("transformer-lenses")
    listed = [one.metadata["Name"] for one in importlib.metadata.distributions()]
    assert listed[0] == "transformer-lens" and "torch" in listed
    assert "transformer-lens" in importlib.metadata.packages_distributions()["transformer_lens"]


# --- there and back ---------------------------------------------------------------------------------------------------


def test_installing_and_uninstalling_twice_is_once(clean: None) -> None:
    finders = list(sys.meta_path)
    assert not shim.is_installed()
    shim.uninstall()
    shim.install()
    shim.install()
    assert shim.is_installed() and len(sys.meta_path) == len(finders) + 1
    shim.uninstall()
    assert not shim.is_installed() and sys.meta_path == finders and theirs() == {}


def test_the_real_package_is_not_pushed_aside_unasked(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real, below = ModuleType("transformer_lens"), ModuleType("transformer_lens.utils")
    real.__file__ = "/somewhere/transformer_lens/__init__.py"
    before = {"transformer_lens": real, "transformer_lens.utils": below}
    for name, module in before.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(AliasError, match=r"from /somewhere.*force=True") as raised:
        shim.install()
    assert isinstance(raised.value, ImportError)
    assert theirs() == before and not shim.is_installed()
    shim.install(force=True)
    assert importlib.import_module("transformer_lens.utils") is lensbridge.utils
    shim.uninstall()
    assert theirs() == before


def test_in_a_notebook(clean: None) -> None:
    lensbridge.load_ipython_extension(SimpleNamespace())
    assert importlib.import_module("transformer_lens") is lensbridge
    lensbridge.unload_ipython_extension(SimpleNamespace())
    assert theirs() == {}


# --- from a shell -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-c"]])
def test_wrong_usage(arguments: list[str], clean: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert shim.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: python -m lensbridge.shim FILE | -m MODULE | -c CODE")


PLUGIN_TEST = """
import transformer_lens

def test_alias(request):
    assert transformer_lens.__name__ == "lensbridge"
"""


def test_pytest_in_a_process_of_its_own(tmp_path: Path) -> None:
    """By the option and by the ini file, without anything else having been imported."""
    (tmp_path / "test_theirs.py").write_text(PLUGIN_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nlensbridge_shim = true\n")
    command = [sys.executable, "-m", "pytest", "-p", "lensbridge_pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"transformer_lens: lensbridge {lensbridge.__version__}" in run.stdout and "1 passed" in run.stdout


def test_a_module_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Not the second copy of the alias that ``python -m`` executes is what others see."""
    (tmp_path / "theirs.py").write_text(
        "import sys, transformer_lens, lensbridge.shim\n"
        "assert lensbridge.shim.is_installed()\n"
        "print(transformer_lens.__name__, __name__, sys.argv[1:])\n"
        "sys.exit(3)\n"
    )
    command = [sys.executable, "-m", "lensbridge.shim", "-m", "theirs", "--flag"]
    run = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (3, "lensbridge __main__ ['--flag']\n"), run.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
