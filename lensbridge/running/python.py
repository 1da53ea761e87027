"""How does Python code run as it would under ``python FILE``, ``python -m MODULE`` and ``python -c CODE``?

In this process and as ``__main__``, so that the alias of `lensbridge.shim` holds. An exception that is not caught is
shown with the program's own traceback, without the frames that led to it, and becomes exit code 1; ``SystemExit``
passes.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType


def run_file(path: str | Path, arguments: Sequence[str] = ()) -> int:
    """Run a file with these ``sys.argv[1:]``; 0, or 1 after an exception."""
    path = str(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {path}.")
    directory = str(Path(path).resolve().parent)
    with _arguments([path, *arguments], directory):
        return _code(lambda: runpy.run_path(path, run_name="__main__"))


def run_module(name: str, arguments: Sequence[str] = ()) -> int:
    """Run a module, as ``python -m`` does; 0, or 1 after an exception."""
    with _arguments([name, *arguments], str(Path.cwd())):
        return _code(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def run_code(source: str, arguments: Sequence[str] = ()) -> int:
    """Run source code, as ``python -c`` does; 0, or 1 after an exception."""

    def execute() -> None:
        module = ModuleType("__main__")
        before, sys.modules["__main__"] = sys.modules["__main__"], module
        try:
            exec(compile(source, "<string>", "exec"), module.__dict__)
        finally:
            sys.modules["__main__"] = before

    with _arguments(["-c", *arguments], ""):
        return _code(execute)


@contextmanager
def _arguments(argv: list[str], directory: str) -> Iterator[None]:
    """``sys.argv`` and the first entry of ``sys.path`` are the program's."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = argv, directory
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


def _code(program: Callable[[], object]) -> int:
    """0 after a program that ended, 1 after one that raised; its traceback is printed."""
    try:
        program()
    except Exception as error:
        traceback.print_exception(type(error), error, _own(error.__traceback__))
        return 1
    return 0


def _own(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from where the program itself begins."""
    leading = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in leading:
        trace = trace.tb_next
    return trace
