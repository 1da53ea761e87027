"""What does a function's source come down to when only what it does counts, and which names does it speak of?"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from nnsight.intervention.serialization import _function_referenced_names

#: What is looked up by a name that is put together.
_PUT_TOGETHER = frozenset("qkv")


class Source(NamedTuple):
    """A function's text, the names it needs from outside, all names that it speaks of, and of these what it calls."""

    text: str
    outer: frozenset[str]
    names: frozenset[str]
    calls: frozenset[str]


def lean(function: FunctionType) -> Source:
    """A function of this package without docstring, comments and annotations."""
    return _lean(function.__code__)


@lru_cache(maxsize=4096)
def _lean(code: CodeType) -> Source:
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(code)))
    if code.co_name == "<lambda>":
        # Its line may hold more than it.
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        if len(found) != 1:
            raise ValueError(f"{code.co_filename}:{code.co_firstlineno}: one lambda on a line, please")
        text = ast.unparse(found[0])
        return Source(
            text,
            frozenset(_function_referenced_names(text)) | frozenset(code.co_freevars),
            _names(found[0]),
            _calls(found[0]),
        )
    tree.body[0].decorator_list = []
    arguments = tree.body[0].args
    text = ast.unparse(_Leaner(first=[*arguments.posonlyargs, *arguments.args, None][0]).visit(tree))
    return Source(
        text, frozenset(_function_referenced_names(text)) | frozenset(code.co_freevars), _names(tree), _calls(tree)
    )


def _calls(tree: ast.AST) -> frozenset[str]:
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return frozenset(each.id for each in called if isinstance(each, ast.Name))


def _names(tree: ast.AST) -> frozenset[str]:
    found = set(_PUT_TOGETHER)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return frozenset(found)


class _Leaner(ast.NodeTransformer):
    """Takes out what does nothing when the code runs, and names what Python finds only within a class."""

    def __init__(self, first: ast.arg | None) -> None:
        self.first = first

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and self.first is not None:
            node.args = [ast.Name("__class__", ast.Load()), ast.Name(self.first.arg, ast.Load())]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign([node.target], node.value, lineno=node.lineno), node)

    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()


def own_lines(source: str) -> str:
    """A user's function without annotations, each statement on the line where it was.

    Annotations often name packages that nothing else of the function needs.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.annotation is not None:
            start = (node.lineno, node.col_offset + len(node.arg.encode()))
            _blank(lines, start, _end(node.annotation))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            _blank(lines, _arrow(lines, node.returns), _end(node.returns))
        elif isinstance(node, ast.AnnAssign):
            if node.value is None:
                _blank(lines, (node.lineno, node.col_offset), _end(node), "pass")
            else:
                _blank(lines, _end(node.target), _end(node.annotation))
    return "".join(lines)


def _end(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _arrow(lines: list[str], returns: ast.expr) -> tuple[int, int]:
    """Where the ``->`` before a return annotation begins."""
    number, before = returns.lineno, lines[returns.lineno - 1].encode()[: returns.col_offset]
    while b"->" not in before:
        number -= 1
        before = lines[number - 1].encode()
    return number, before.rindex(b"->")


def _blank(lines: list[str], start: tuple[int, int], end: tuple[int, int], instead: str = "") -> None:
    """Put spaces in the place of a part of the source; columns count bytes, as the parser's do."""
    for number in range(start[0], end[0] + 1):
        line = lines[number - 1].encode()
        first = start[1] if number == start[0] else 0
        last = end[1] if number == end[0] else len(line.rstrip(b"\r\n"))
        put = instead.encode().ljust(last - first) if number == start[0] else b" " * (last - first)
        # What follows on a later line goes on with this one.
        put = put if number == end[0] else put[:-1] + b"\\"
        lines[number - 1] = (line[:first] + put + line[last:]).decode()
