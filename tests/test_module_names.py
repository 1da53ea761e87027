"""Do TransformerLens' module paths lead to the same things as the project's own?"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lensbridge
from lensbridge.module_names import NOT_OFFERED, OLD_NAMES, SAME_MODULE, why_not

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", SAME_MODULE)
def test_both_paths_are_one_module(path: str) -> None:
    theirs, ours = (importlib.import_module(f"lensbridge.{name}") for name in (path, SAME_MODULE[path]))
    assert theirs is ours


@pytest.mark.parametrize("path", [path for path in SAME_MODULE if path[0].isupper()])
def test_a_module_that_is_named_after_a_class_has_the_class(path: str) -> None:
    """And the package has the class itself under the name, as after ``from transformer_lens import X``."""
    found = getattr(importlib.import_module(f"lensbridge.{path}"), path)
    assert isinstance(found, type) and getattr(lensbridge, path) is found


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_of_versions_1_and_2(name: str) -> None:
    assert getattr(lensbridge, name) is getattr(lensbridge, OLD_NAMES[name])
    assert name not in dir(lensbridge)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'lensbridge' has no attribute 'EasyTransformers'"):
        lensbridge.EasyTransformers  # noqa: B018


@pytest.mark.parametrize("path", NOT_OFFERED)
def test_what_is_not_offered_is_not_there(path: str) -> None:
    """Unless it has parts that are; then the reason is for the others."""
    below = path + ".no_such_part"
    assert why_not(path) == why_not(below) == NOT_OFFERED[path]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"lensbridge.{path if not path.startswith('tools.') else below}")


def test_key_value_caches_under_version_2s_names() -> None:
    from lensbridge import TransformerLensKeyValueCache, TransformerLensKeyValueCacheEntry
    from lensbridge.past_key_value_caching import HookedTransformerKeyValueCache, HookedTransformerKeyValueCacheEntry

    assert HookedTransformerKeyValueCache is TransformerLensKeyValueCache
    assert HookedTransformerKeyValueCacheEntry is TransformerLensKeyValueCacheEntry


def test_a_star_import_binds_what_the_package_offers_and_no_other_submodule() -> None:
    namespace: dict[str, object] = {}
    exec("from lensbridge import *", namespace)
    source = ast.parse((ROOT / "lensbridge" / "__init__.py").read_text(encoding="utf-8"))
    offered = {alias.asname for node in source.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(namespace) - {"__builtins__"} == offered - {None, "load_ipython_extension", "unload_ipython_extension"}
    assert {"HookedTransformer", "utils", "patching", "lit"} <= set(namespace) and "model" not in namespace


LINES = [
    "from lensbridge.past_key_value_caching import HookedTransformerKeyValueCache",
    "from lensbridge.HookedTransformerConfig import HookedTransformerConfig",
    "from lensbridge.HookedTransformer import HookedTransformer",
    "from lensbridge.ActivationCache import ActivationCache",
    "from lensbridge.config.transformer_bridge_config import TransformerBridgeConfig",
    "from lensbridge.hook_points import HookedRootModule, HookPoint",
    "import lensbridge.utils as utils; utils.get_act_name",
    "import lensbridge; lensbridge.lit.serve, lensbridge.tools.analysis, lensbridge.components.MLP",
]


def test_paths_are_there_before_anything_else_was_imported() -> None:
    subprocess.run([sys.executable, "-c", "\n".join(LINES)], cwd=ROOT, check=True, capture_output=True)
