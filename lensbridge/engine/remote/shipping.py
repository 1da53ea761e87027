"""How does code of this package get to a machine that does not have it?

nnsight sends functions as source and objects by value. What is of this package goes the same way, as lean as it can:
without docstrings, comments and annotations, and of each class and object only what something that travels may ask
for, by name. Functions of the user's keep their lines, so that a traceback from there shows them, and lose their
annotations, which may name packages that the other machine does not have.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copyreg
import dataclasses
import functools
import inspect
import io
import operator
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import cloudpickle.cloudpickle as by_value
from nnsight import Envoy
from nnsight.intervention.serialization import (
    DEFAULT_PROTOCOL,
    CustomCloudPickler,
    _fill,
    _load_function,
    code_reduce,
)
from torch import Tensor, nn

from ...config import HookedTransformerConfig
from .sources import lean, own_lines

PACKAGE = __name__.partition(".")[0]
#: Methods that Python calls, so that no source names them.
_MAKING = ("__init__", "__post_init__")
_CALLED_BY_PYTHON = frozenset(
    "__call__ __eq__ __hash__ __getitem__ __len__ __iter__ __contains__ __enter__ __exit__ "
    "__bool__ __mul__ __matmul__ __getattr__ __class__".split()
)
#: What is called of containers; methods of ours with these names are called by nothing that travels.
_OF_CONTAINERS = frozenset("get items keys values copy".split())


def shipped(value: Any, modules: Mapping[int, str], left_out: Collection[str] = ()) -> bytes:
    """``value`` pickled for nnsight's server.

    Args:
        modules: id of a module of the HF model -> its path in nnsight's tree, by which the server finds its own.
        left_out: names of methods that nothing will call.
    """
    names: frozenset[str] = frozenset()
    while True:
        # What a method that travels calls has to travel, too; once no name is new, all that is needed is there.
        buffer = io.BytesIO()
        pickler = _Shipper(buffer, modules, names)
        pickler.dump(value)
        named = pickler.named.difference(left_out)
        if named <= names:
            return buffer.getvalue()
        names |= named


class _Shipper(CustomCloudPickler):
    """Pickles what is of this package by value, whether or not it is installed where the pickle is read."""

    def __init__(self, file: Any, modules: Mapping[int, str], names: frozenset[str]) -> None:
        super().__init__(file, protocol=DEFAULT_PROTOCOL)
        self.modules = modules
        self.names = names
        #: Every name that what travels speaks of.
        self.named: set[str] = set()
        self._same: dict[Any, Any] = {}

    def persistent_id(self, obj: Any) -> Any:
        """How the server finds its own: modules of the HF model by their path, and what nnsight has marked."""
        if isinstance(obj, nn.Module) and id(obj) in self.modules:
            return f"Module:{self.modules[id(obj)]}"
        return super().persistent_id(obj)

    def reducer_override(self, obj: Any) -> Any:
        """What to pickle in the place of ``obj``, if not what pickle does by itself."""
        if isinstance(obj, functools._lru_cache_wrapper) and _is_ours(obj):
            return operator.getitem, ([obj.__wrapped__], 0)
        if isinstance(obj, types.FunctionType):
            return self._function(obj)
        if isinstance(obj, _Made):
            name = obj.text[len("def ") : obj.text.index("(")]
            arguments = (obj.text, name, obj.defaults, None, None, PACKAGE, 1)
            return _load_function, arguments, obj.scope, None, None, _fill
        if isinstance(obj, contextvars.ContextVar):
            return functools.partial(contextvars.ContextVar, default=None), (obj.name,)
        if isinstance(obj, functools.cached_property):
            return property, (obj.func,)
        if isinstance(obj, property):
            return property, (obj.fget, obj.fset, obj.fdel)
        if isinstance(obj, type):
            return self._class(obj) if _is_ours(obj) else super().reducer_override(obj)
        if isinstance(obj, Envoy):
            return _envoy(obj)
        if isinstance(obj, HookedTransformerConfig):
            return types.SimpleNamespace, (), {name: value for name, value in vars(obj).items() if name in self.names}
        if _is_ours(type(obj)) and not isinstance(obj, tuple | Tensor | BaseException | nn.Module):
            return self._instance(obj)
        return super().reducer_override(obj)

    # --- functions ----------------------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> Any:
        if _is_ours(function):
            if function.__code__.co_filename == contextlib.__file__:
                return contextlib.contextmanager, (function.__wrapped__,)  # type: ignore[attr-defined]
            return self._own_function(function)
        if by_value._should_pickle_by_reference(function):
            return NotImplemented
        return self._users_function(function)

    def _own_function(self, function: types.FunctionType) -> tuple:
        source, code = lean(function), function.__code__
        self.named |= source.names
        arguments = (source.text, code.co_name, function.__defaults__, function.__kwdefaults__, None)
        outer = _outer(function, source.outer)
        return _load_function, (*arguments, PACKAGE, 1), outer, None, None, _fill

    def _users_function(self, function: types.FunctionType) -> tuple:
        code = function.__code__
        try:
            lines, first = inspect.getsourcelines(code)
        except (OSError, TypeError):
            return self._dynamic_function_reduce(function)
        if code.co_name == "<lambda>":
            return self._dynamic_function_reduce(function)
        text = own_lines(textwrap.dedent("".join(lines)))
        closure = _outer(function, code.co_freevars)
        text, globals_, closed = code_reduce(text, function.__globals__, closure, function=True)
        arguments = (text, code.co_name, function.__defaults__, function.__kwdefaults__, None)
        return _load_function, (*arguments, code.co_filename, first), {**globals_, **closed}, None, None, _fill

    # --- classes ------------------------------------------------------------------------------------------------------

    def _class(self, cls: type) -> tuple:
        kept: dict[str, Any] = {n: value for n, value in vars(cls).items() if self._travels(cls, n, value)}
        kept["__module__"] = cls.__module__
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            defaults = list(cls._field_defaults.values())  # type: ignore[attr-defined]
            make = functools.partial(collections.namedtuple, defaults=defaults) if defaults else collections.namedtuple
            return make, (cls.__name__, list(cls._fields)), (kept, {}), None, None, by_value._class_setstate
        bases = tuple(base for base in cls.__bases__ if base is not object and base.__name__ != "Protocol")
        if dataclasses.is_dataclass(cls):
            kept = {n: v for n, v in _made_by_dataclass(cls).items() if n not in _MAKING or self._is_made(cls)} | kept
        made = type(cls) if not _is_ours(type(cls)) and issubclass(cls, nn.Module) else type
        # What a class says it is cannot be set afterwards.
        at_once = {name: kept.pop(name) for name in ("__class__",) if name in kept}
        skeleton: tuple = (made, cls.__name__, bases, at_once, None, None)
        return by_value._make_skeleton_class, skeleton, (kept, {}), None, None, by_value._class_setstate

    def _travels(self, cls: type, name: str, value: Any) -> bool:
        """Whether something of a class may be asked for on the other side."""
        if isinstance(value, property) and name in _constants(cls):
            return False
        if isinstance(value, functools.cached_property) and self._is_made(cls):
            return name in self.names
        if isinstance(value, functools.cached_property | types.MemberDescriptorType):
            # The value is in the instance where it is needed.
            return False
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(function) if callable(function) else function
        if isinstance(function, types.FunctionType):
            known = (
                name in self.names - _OF_CONTAINERS
                or name in _CALLED_BY_PYTHON
                or (name in _MAKING and self._is_made(cls))
            )
            return known and function.__code__.co_filename == inspect.getsourcefile(cls)
        return name in self.names and not name.startswith("__")

    def _is_made(self, cls: type) -> bool:
        """Whether an object of the class is made on the other side, and does not only come from here."""
        return any(each.__name__ in self.names for each in (cls, *_subclasses(cls)))

    def _instance(self, obj: Any) -> Any:
        """An object with those of its attributes that may be asked for; of several equal ones that are frozen, one."""
        state = vars(obj)
        if dataclasses.is_dataclass(obj):
            if _is_frozen(type(obj)):
                try:
                    same = self._same.setdefault((type(obj), obj), obj)
                except TypeError:
                    same = obj
                if same is not obj:
                    return operator.getitem, ([same], 0)
            # The defaults come with the class.
            default = {field.name: field.default for field in dataclasses.fields(obj)}
            state = {name: value for name, value in state.items() if default.get(name, dataclasses) is not value}
            if _is_frozen(type(obj)):
                state |= {name: getattr(obj, name) for name in _constants(type(obj)) & self.names}
        return copyreg.__newobj__, (type(obj),), {name: v for name, v in state.items() if name in self.names}  # type: ignore[attr-defined]


def _envoy(envoy: Envoy) -> tuple:
    """nnsight's handle on the whole model; the server has those on its parts."""
    kind = next(cls for cls in type(envoy).__mro__ if not _is_ours(cls))
    state = {name: value for name, value in envoy.__getstate__().items() if not isinstance(value, Envoy)}
    # What it was loaded with is the server's to know.
    return object.__new__, (kind,), state | {"_children": [], "args": (), "kwargs": {}}


def _constants(cls: type) -> frozenset[str]:
    """The properties of a frozen dataclass: each instance has its own, once and for all."""
    if not (dataclasses.is_dataclass(cls) and _is_frozen(cls)):
        return frozenset()
    return frozenset(name for each in cls.__mro__ for name, value in vars(each).items() if isinstance(value, property))


def _is_frozen(cls: Any) -> bool:
    return cls.__dataclass_params__.frozen


def _subclasses(cls: type) -> Iterator[type]:
    below: list[type] = type.__subclasses__(cls)
    for each in below:
        yield each
        yield from _subclasses(each)


def _is_ours(obj: Any) -> bool:
    module = getattr(obj, "__module__", None)
    return isinstance(module, str) and (module == PACKAGE or module.startswith(f"{PACKAGE}."))


def _outer(function: types.FunctionType, names: Any) -> dict[str, Any]:
    """What a function finds under names outside of itself."""
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            found[name] = cell.cell_contents
    return found


class _Made(NamedTuple):
    """A method that ``dataclass`` has made, with a source."""

    text: str
    defaults: tuple[Any, ...]
    scope: dict[str, Any]


def _made_by_dataclass(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass' fields, and those of its methods that have no source."""
    arguments, lines, scope, made = ["self"], [], {}, {}
    for field in dataclasses.fields(cls):
        name = value = field.name
        if field.default_factory is not dataclasses.MISSING:
            scope[f"make_{name}"] = field.default_factory
            value = f"make_{name}() if {name} is None else {name}"
        if field.default is not dataclasses.MISSING:
            made[name] = field.default
        arguments.append(name if field.default is field.default_factory is dataclasses.MISSING else f"{name}=None")
        lines.append(f"    self.{name} = {value}")
    defaults = tuple(made.get(argument.removesuffix("=None")) for argument in arguments if argument.endswith("=None"))
    if hasattr(cls, "__post_init__"):
        lines.append("    self.__post_init__()")
    made["__init__"] = _Made("\n".join([f"def __init__({', '.join(arguments)}):", *lines]), defaults, scope)
    return made
