"""What happens to ``import transformer_lens`` after `install`?

Every path below ``transformer_lens`` leads to the module object that lensbridge has under the same path, so there is
one of each class and function, whichever name it was found by. A finder in front of Python's own answers for paths that
nobody has imported yet, and says why where there is nothing; modules that are loaded already are entered under the
other name at once, because importing a module binds its name in the parent, where ``HookedTransformer`` is the class.

    from lensbridge import shim

    shim.install()
    from transformer_lens import HookedTransformer  # lensbridge.HookedTransformer

From a shell, for a file, a module or code: ``python -m lensbridge.shim FILE | -m MODULE | -c CODE``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import AliasError, near_misses
from .module_names import EMULATED_VERSION, why_not

ALIAS = "transformer_lens"
#: This package, which the alias leads to.
OURS = "lensbridge"


def install(force: bool = False) -> None:
    """Make ``transformer_lens`` and everything below it an alias of lensbridge, until `uninstall`.

    ``importlib.metadata.version("transformer_lens")`` is then the version whose interface lensbridge has. It may be
    called again, and holds for this process and those forked from it: a new interpreter (``subprocess``,
    ``multiprocessing`` with spawn) has an import system of its own.

    Args:
        force: put the real package aside if it was imported already. What was bound from it before stays what it is.

    Raises:
        AliasError: the real package was imported already, without ``force``.
    """
    if is_installed():
        return
    real = _entries()
    if not force and any(module is not None and not _is_ours(module) for module in real.values()):
        raise AliasError(_imported_already(real))
    for name in real:
        del sys.modules[name]
    _finder.displaced = real
    sys.meta_path.insert(0, _finder)
    _enter_loaded()


def uninstall() -> None:
    """Undo `install`: ``transformer_lens`` is again what it was, imported or not. Does nothing without an alias."""
    if not is_installed():
        return
    sys.meta_path.remove(_finder)
    for name in _entries():
        del sys.modules[name]
    sys.modules.update(_finder.displaced)
    _finder.displaced = {}


def is_installed() -> bool:
    """Whether ``transformer_lens`` is an alias of lensbridge now."""
    return _finder in sys.meta_path


class _Metadata(Distribution):
    """What ``importlib.metadata`` is told about transformer-lens: the version, and what stands behind it."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: transformer-lens\nVersion: {EMULATED_VERSION}\nSummary: {OURS}\n"
        return f"{ALIAS}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parents[1] / path


class _Finder(DistributionFinder, Loader):
    """Answers for ``transformer_lens`` and what is below it, before Python looks for files."""

    def __init__(self) -> None:
        #: What ``sys.modules`` had under the alias before.
        self.displaced: dict[str, ModuleType] = {}

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != ALIAS and not name.startswith(f"{ALIAS}."):
            return None
        module = _ours(name)
        return ModuleSpec(name, self, origin=module.__file__, is_package=hasattr(module, "__path__"))

    def exec_module(self, module: ModuleType) -> None:
        # The empty module that Python made is left behind; what is in sys.modules now is what the import gives.
        sys.modules[module.__name__] = _ours(module.__name__)
        _enter_loaded()

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        name = context.name if context is not None else None
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == "transformer-lens":
            yield _Metadata()


_finder = _Finder()


def _entries() -> dict[str, ModuleType]:
    """What ``sys.modules`` has under the alias."""
    return {name: module for name, module in sys.modules.items() if name == ALIAS or name.startswith(f"{ALIAS}.")}


def _enter_loaded() -> None:
    """Enter every loaded module of ours under the alias, too."""
    for name, module in list(sys.modules.items()):
        if name == OURS or name.startswith(f"{OURS}."):
            sys.modules.setdefault(ALIAS + name.removeprefix(OURS), module)


def _is_ours(module: ModuleType) -> bool:
    return module.__name__ == OURS or module.__name__.startswith(f"{OURS}.")


def _ours(name: str) -> ModuleType:
    """Our module under an alias' path; a ModuleNotFoundError that carries the alias' name if there is none."""
    ours = OURS + name.removeprefix(ALIAS)
    try:
        return importlib.import_module(ours)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{ours}.".startswith(f"{error.name}."):
            raise  # an optional package that the module needs
        path = name.removeprefix(f"{ALIAS}.")
        reason = why_not(path)
        known = (entry.removeprefix(f"{OURS}.") for entry in sys.modules if entry.startswith(f"{OURS}."))
        message = f"{name} leads to lensbridge here, which has no {path}" + (
            f": {reason}." if reason else f".{near_misses(path, known)}"
        )
        raise ModuleNotFoundError(message, name=name) from None


def _imported_already(real: dict[str, ModuleType]) -> str:
    package = real.get(ALIAS)
    where = getattr(package, "__file__", None)
    return (
        f"transformer_lens was imported before the alias was installed{f' (from {where})' if where else ''}, and what "
        "was bound from it would stay the real thing. Install the alias first: at the top of the program, in a "
        "restarted notebook, or with `lensbridge run`. install(force=True) puts the real package aside from here on."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m lensbridge.shim``: run a file, ``-m MODULE`` or ``-c CODE`` as Python would, under the alias."""
    from .running import python

    arguments = list(sys.argv[1:] if argv is None else argv)
    kinds = {"-m": python.run_module, "-c": python.run_code}
    if not arguments or (arguments[0] in kinds and len(arguments) < 2):
        print("usage: python -m lensbridge.shim FILE | -m MODULE | -c CODE [arguments]", file=sys.stderr)
        return 2
    install()
    if arguments[0] in kinds:
        return kinds[arguments[0]](arguments[1], arguments[2:])
    return python.run_file(arguments[0], arguments[1:])


if __name__ == "__main__":
    # The module that others import, not the second one that is being executed under this name.
    sys.exit(importlib.import_module(f"{OURS}.shim").main())
