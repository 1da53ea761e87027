"""What can a job name, and how is that known?

A package that a server does not have is hidden from this process, if the environment has it. What a payload names is
written down, and in strict mode refused if it is not of a short list, as NDIF does.
"""

from __future__ import annotations

import builtins
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

#: What a payload may name in strict mode: what NDIF allows to code of users, and what pickled blocks are made of.
ALLOWED = frozenset(
    "torch numpy math einops collections typing operator enum time functools itertools dataclasses abc types "
    "builtins copyreg _codecs nnsight cloudpickle transformers __future__".split()
)


class Hidden(MetaPathFinder):
    """Says of some packages that they do not exist."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def hide(names: list[str]) -> None:
    """Make packages impossible to import, and with them what lies beside one that is installed as a working tree."""
    if not names:
        return
    installed = {os.path.realpath(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    sys.path[:] = [
        entry
        for entry in sys.path
        if os.path.realpath(entry) in installed or not any(os.path.isdir(os.path.join(entry, name)) for name in names)
    ]
    sys.meta_path.insert(0, Hidden(names))


class NotAllowed(Exception):
    """A payload names what is not of the list."""


class Named:
    """The modules that one job names, when it is read and while it runs."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.modules: set[str] = set()

    def note(self, module: str) -> None:
        """Write a module down.

        Raises:
            NotAllowed: in strict mode, if it is not of the list.
        """
        self.modules.add(module)
        if self.strict and module.partition(".")[0] not in ALLOWED:
            raise NotAllowed(f"Module {module!r} is not allowed; allowed are: {', '.join(sorted(ALLOWED))}")

    def unpickler(self) -> type:
        """An unpickler of nnsight that tells about every global it looks up."""
        from nnsight.intervention.serialization import CustomCloudUnpickler

        named = self

        class Unpickler(CustomCloudUnpickler):
            def find_class(self, module: str, name: str) -> Any:
                named.note(module)
                found = super().find_class(module, name)
                if (module, name) != ("cloudpickle.cloudpickle", "subimport"):
                    return found

                def subimport(wanted: str) -> Any:
                    """A module that was pickled by its name."""
                    named.note(wanted)
                    return found(wanted)

                return subimport

        return Unpickler

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Write down what code of the job imports while it runs. Modules have a ``__spec__``; that code has none."""
        original = builtins.__import__

        def watched(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
            # A call of ``__import__`` itself need not pass its globals.
            scope = sys._getframe(1).f_globals if globals is None else globals
            if level == 0 and "__spec__" not in scope:
                self.note(name)
            return original(name, globals, locals, fromlist, level)

        builtins.__import__ = watched
        try:
            yield
        finally:
            builtins.__import__ = original
