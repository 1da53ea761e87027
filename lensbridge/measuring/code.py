"""What does a function's source call something?

A softmax is found again by what its call is named in the source, so its name has to be read there: from the place that
was running, which is where a call ends (Python 3.10 knows only its line).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from .recording import Caller


@dataclass(frozen=True)
class Called:
    """A call in the source: the names that it goes by (``nn``, ``functional``, ``softmax``), and its arguments."""

    names: tuple[str, ...]
    #: How many arguments are given by position.
    positional: int


def call_at(caller: Caller, hint: str) -> Called | None:
    """The call that a function was making, or None if its source does not tell.

    Args:
        hint: what the name may contain, where the place does not say which of several calls it is.
    """
    try:
        lines, first = inspect.getsourcelines(caller.code)
        source = textwrap.dedent("".join(lines))
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except (OSError, TypeError, SyntaxError):
        return None
    indent = len(lines[0]) - len(source.split("\n", 1)[0] + "\n")
    end = _end(caller)
    if end is not None:
        found = [node for node in calls if (_last_line(node, first), (node.end_col_offset or 0) + indent) == end]
    else:
        found = [node for node in calls if node.lineno + first - 1 <= caller.line <= _last_line(node, first)]
        named = [node for node in found if hint in "_".join(_names(node.func))]
        found = named or found
    if not found:
        return None
    starred = (index for index, argument in enumerate(found[0].args) if isinstance(argument, ast.Starred))
    return Called(_names(found[0].func), next(starred, len(found[0].args)))


def _last_line(node: ast.Call, first: int) -> int:
    return (node.end_lineno or node.lineno) + first - 1


def _end(caller: Caller) -> tuple[int | None, int | None] | None:
    """(line, column) where what was running ends, from Python 3.11 on."""
    positions = getattr(caller.code, "co_positions", None)
    if positions is None:
        return None
    _, line, _, column = list(positions())[caller.instruction // 2]
    return None if line is None else (line, column)


def _names(called: ast.expr) -> tuple[str, ...]:
    """``a.b[0].c`` -> a, b, c."""
    names: list[str] = []
    while isinstance(called, (ast.Attribute, ast.Subscript)):
        if isinstance(called, ast.Attribute):
            names.insert(0, called.attr)
        called = called.value
    return (called.id, *names) if isinstance(called, ast.Name) else tuple(names)


def within_forward(callers: list[Caller], module: nn.Module) -> list[Caller] | None:
    """The functions from the innermost up to a module's forward, without decorators; None if it is not among them."""
    forward: Any = module.__dict__.get("forward", type(module).forward)
    code = getattr(inspect.unwrap(getattr(forward, "__func__", forward)), "__code__", None)
    for index, caller in enumerate(callers):
        if caller.code is code:
            return [*(each for each in callers[:index] if not _passes_all_on(each.code)), caller]
    return None


def _passes_all_on(code: CodeType) -> bool:
    """Whether a function takes any arguments, as decorators do."""
    return bool(code.co_flags & inspect.CO_VARARGS and code.co_flags & inspect.CO_VARKEYWORDS) and not code.co_argcount
