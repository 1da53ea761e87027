"""How do many functions and classes travel as one text?

Each by itself costs a hundred bytes besides its source. Together they are the body of one function, which the other
side calls once: it defines them all and returns them by name. What they need from other packages comes as its globals;
what a class has besides methods, and no literal can say, is set afterwards.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import functools
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .sources import lean

#: From how many optional parameters on they are given by name only.
_MANY = 6
_INDENT = re.compile("^(?:    )+", re.MULTILINE)
#: What the text can say by itself.
_LITERALS = (type(None), bool, int, str)


class Parameter(NamedTuple):
    """One parameter of a method that ``dataclass`` has made, and what it is by default or makes it."""

    name: str
    default: Any = ...
    factory: Any = None


class Bundle:
    """The text of some functions and classes of this package.

    Args:
        instead: a function of ours -> what travels in its place.
    """

    def __init__(self, instead: Mapping[Any, Any]) -> None:
        self.instead = instead
        #: id of a function or class -> the name that it has in the text.
        self.known: dict[int, str] = {}
        #: name in the text -> what comes from outside.
        self.outer: dict[str, Any] = {}
        self.lines: list[str] = []
        #: (class, attribute, value) to be set once they are there.
        self.later: list[tuple[type, str, Any]] = []
        self._names: set[str] = set()
        self._outside: dict[int, str] = {}

    def add(
        self,
        functions: Iterable[types.FunctionType],
        classes: Mapping[type, Mapping[str, Any]],
        makes: Callable[[type], list[Parameter] | None],
    ) -> None:
        """Write the text.

        Args:
            classes: class -> those of its attributes that travel.
            makes: the parameters of the ``__init__`` that ``dataclass`` has made for a class, if it is to have one.
        """
        functions = list(functions)
        everything: list[Any] = [*classes, *functions]
        for each in everything:
            self.known[id(each)] = self._free(each.__name__)
        for cls in sorted(classes, key=lambda cls: len(cls.__mro__)):
            self._class(cls, classes[cls], makes(cls))
        for function in functions:
            self.lines += self._decorated(function, self.known[id(function)])

    @property
    def text(self) -> str:
        """A function that defines them all."""
        body = _INDENT.sub(lambda spaces: " " * (len(spaces[0]) // 4), "\n".join(self.lines))
        return f"def bundle():\n{textwrap.indent(body, ' ')}\n return locals()\n"

    def _free(self, name: str) -> str:
        free = name
        while free in self._names:
            free += "_"
        self._names.add(free)
        return free

    def _from_outside(self, value: Any, name: str) -> str:
        if id(value) not in self._outside:
            self._outside[id(value)] = free = self._free(name)
            self.outer[free] = value
        return self._outside[id(value)]

    def _named(self, value: Any, name: str) -> str:
        """What the text calls something that a function finds under a name."""
        if isinstance(value, types.FunctionType):
            value = self.instead.get(value, value)
        if isinstance(value, functools._lru_cache_wrapper) and id(value.__wrapped__) in self.known:
            value = value.__wrapped__
        return self.known.get(id(value)) or self._from_outside(value, name)

    def _decorated(self, function: types.FunctionType, name: str) -> list[str]:
        inner = inner_of(function)
        if inner is function:
            return [self._function(function, name)]
        return [f"@{self._from_outside(contextlib.contextmanager, 'contextmanager')}", self._function(inner, name)]

    # --- functions ----------------------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType, name: str) -> str:
        function = self.instead.get(function, function)
        source = lean(function)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        tree: Any = ast.parse(source.text)
        definition = tree.body[0]
        alone = isinstance(definition, ast.Expr)
        wanted = {*source.outer, *(() if alone else _in_defaults(definition))} - {"__class__"}
        names = {}
        for each in wanted:
            if each in cells:
                names[each] = self._named(cells[each].cell_contents, each)
            elif each in function.__globals__:
                names[each] = self._named(function.__globals__[each], each)
        if alone:
            # A lambda.
            tree.body = [ast.Assign([ast.Name(name, ast.Store())], definition.value, lineno=1)]
        else:
            definition.name = name
        changed = {old: new for old, new in names.items() if old != new}
        return ast.unparse(_Renamer(changed).visit(tree) if changed else tree)

    # --- classes ------------------------------------------------------------------------------------------------------

    def _class(self, cls: type, kept: Mapping[str, Any], parameters: list[Parameter] | None) -> None:
        bases = [self._named(base, base.__name__) for base in cls.__bases__ if base not in (object, tuple)]
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            make = self._from_outside(collections.namedtuple, "namedtuple")
            defaults = [self._value(each, "default") for each in cls._field_defaults.values()]  # type: ignore[attr-defined]
            bases = [f"{make}({cls.__name__!r}, {list(cls._fields)!r}, defaults=[{', '.join(defaults)}])"]
        lines = [f"__qualname__ = {cls.__name__!r}"] if issubclass(cls, BaseException) else []
        if parameters is not None:
            lines.append(self._init(parameters, hasattr(cls, "__post_init__")))
        for name, value in kept.items():
            lines += self._attribute(cls, name, value)
        body = textwrap.indent("\n".join(lines or ["pass"]), "    ")
        self.lines.append(f"class {self.known[id(cls)]}({', '.join(bases)}):\n{body}")

    def _attribute(self, cls: type, name: str, value: Any) -> list[str]:
        if isinstance(value, property):
            setter = [] if value.fset is None else [f"@{name}.setter", self._function(value.fset, name)]  # type: ignore[arg-type]
            return ["@property", self._function(value.fget, name), *setter]  # type: ignore[arg-type]
        if isinstance(value, functools.cached_property):
            return ["@property", self._function(value.func, name)]  # type: ignore[arg-type]
        if isinstance(value, staticmethod | classmethod):
            return [f"@{type(value).__name__}", self._function(value.__func__, name)]  # type: ignore[arg-type]
        if isinstance(value, types.FunctionType):
            return self._decorated(value, name)
        if isinstance(value, _LITERALS):
            return [f"{name} = {value!r}"]
        self.later.append((cls, name, value))
        return []

    def _init(self, parameters: list[Parameter], post: bool) -> str:
        optional = [each for each in parameters if each.default is not ... or each.factory is not None]
        if len(optional) > _MANY:
            return self._init_by_name(parameters, post)
        signature, lines = ["self"], []
        for name, default, factory in parameters:
            value = name
            if factory is not None:
                value, default = f"{self._named(factory, f'make_{name}')}() if {name} is None else {name}", None
            signature.append(name if default is ... else f"{name}={self._value(default, f'default_{name}')}")
            lines.append(f"    self.{name} = {value}")
        lines += ["    self.__post_init__()"] if post else []
        return "\n".join([f"def __init__({', '.join(signature)}):", *(lines or ["    pass"])])

    def _init_by_name(self, parameters: list[Parameter], post: bool) -> str:
        """The same for a long list: what is not required is given by name, and defaults are the class' own."""
        required = [name for name, default, factory in parameters if default is ... and factory is None]
        lines = [f"    self.{name} = {name}" for name in required]
        for name, _, factory in parameters:
            if factory is not None:
                lines.append(f"    self.{name} = {self._named(factory, f'make_{name}')}()")
        lines += ["    vars(self).update(given)", *(["    self.__post_init__()"] if post else [])]
        return "\n".join([f"def __init__(self, {', '.join(required)}, **given):", *lines])

    def _value(self, value: Any, name: str) -> str:
        return repr(value) if isinstance(value, _LITERALS) or value == () else self._named(value, name)


def inner_of(function: types.FunctionType) -> types.FunctionType:
    """The function that ``contextmanager`` has made a context of, or the function itself."""
    made = function.__code__.co_filename == contextlib.__file__
    return function.__wrapped__ if made else function  # type: ignore[attr-defined]


def _in_defaults(definition: ast.FunctionDef) -> set[str]:
    """The names in the default values of a function's parameters."""
    values = [*definition.args.defaults, *(each for each in definition.args.kw_defaults if each is not None)]
    return {node.id for value in values for node in ast.walk(value) if isinstance(node, ast.Name)}


class _Renamer(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node
