"""How does code of this package get to a machine that does not have it?

nnsight sends functions as source and objects by value. What is of this package travels as lean as it can: of each class
and object only what something that travels may ask for, by name, and all of it as one text (`bundle`). Functions of the
user's keep their lines, so that a traceback from there shows them, and lose their annotations, which may name packages
that the other machine does not have.
"""

from __future__ import annotations

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
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import cloudpickle.cloudpickle as by_value
from nnsight import Envoy
from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.serialization import (
    DEFAULT_PROTOCOL,
    CustomCloudPickler,
    _fill,
    _load_function,
    code_reduce,
)
from nnsight.modeling.transformers import _PERSISTENT
from torch import Tensor, nn

from ...config import HookedTransformerConfig
from .bundle import Bundle, Parameter, inner_of
from .far import INSTEAD
from .sources import lean, own_lines

PACKAGE = __name__.partition(".")[0]
#: Methods that Python calls, so that no source names them.
_CALLED_BY_PYTHON = frozenset(
    "__call__ __eq__ __hash__ __getitem__ __len__ __iter__ __contains__ __enter__ __exit__ __bool__ __mul__ "
    "__matmul__ __getattr__ __torch_function__".split()
)
_MAKING = ("__init__", "__post_init__")
#: What is called of containers; methods of ours with these names are called by nothing that travels.
_OF_CONTAINERS = frozenset("get items keys values copy".split())


class Afterwards:
    """Stands in what is shipped where the last touches to classes go."""


def shipped(value: Any, modules: Mapping[int, str], left_out: Collection[str] = ()) -> bytes:
    """``value`` pickled for nnsight's server; somewhere in it is an `Afterwards`.

    Args:
        modules: id of a module of the HF model -> its path in nnsight's tree, by which the server finds its own.
        left_out: names of methods that nothing will call.
    """
    seen = _Looking(io.BytesIO(), modules, frozenset(), frozenset())
    while True:
        # What a method that travels calls has to travel, too; once no name is new, all that is needed is there.
        seen.dump(value)
        names, made = seen.names.union(seen.named.difference(left_out)), seen.made.union(seen.makes)
        if (names, made) == (seen.names, seen.made):
            break
        seen = _Looking(io.BytesIO(), modules, names, made)
    bundle = Bundle(INSTEAD)
    bundle.add(seen.functions.values(), seen.classes, seen.parameters)
    file = io.BytesIO()
    _Shipper(file, modules, seen.names, seen.made, bundle).dump(value)
    return file.getvalue()


class _Call(NamedTuple):
    """Something to be called on the other side."""

    function: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        """It is not called here."""


class _Pickler(CustomCloudPickler):
    """Pickles what is of this package by value, whether or not it is installed where the pickle is read."""

    def __init__(
        self, file: Any, modules: Mapping[int, str], names: frozenset[str], made: frozenset[str], bundle: Any = None
    ) -> None:
        super().__init__(file, protocol=DEFAULT_PROTOCOL)
        self.modules = modules
        self.names = names
        #: The names of classes that are made on the other side, and do not only come from here.
        self.made = made
        self._same: dict[Any, Any] = {}

    def persistent_id(self, obj: Any) -> Any:
        """How the server finds its own: modules of the HF model by their path, and what nnsight has marked."""
        if isinstance(obj, nn.Module) and id(obj) in self.modules:
            return f"Module:{self.modules[id(obj)]}"
        return "Interleaver" if isinstance(obj, Interleaver) else super().persistent_id(obj)

    def reducer_override(self, obj: Any) -> Any:
        """What to pickle in the place of ``obj``, if not what pickle does by itself."""
        if isinstance(obj, functools._lru_cache_wrapper) and _is_ours(obj):
            return operator.getitem, ([obj.__wrapped__], 0)
        if isinstance(obj, types.FunctionType):
            function = INSTEAD.get(obj, obj)  # type: ignore[call-overload]
            if _is_ours(function):
                return self.own_function(function, obj)
            return NotImplemented if by_value._should_pickle_by_reference(obj) else self._users_function(obj)
        if isinstance(obj, functools.cached_property):
            return property, (obj.func,)
        if isinstance(obj, contextvars.ContextVar):
            return functools.partial(contextvars.ContextVar, default=None), (obj.name,)
        if isinstance(obj, type):
            return self.own_class(obj) if _is_ours(obj) else super().reducer_override(obj)
        if isinstance(obj, Envoy):
            return _envoy(obj)
        if isinstance(obj, HookedTransformerConfig):
            return types.SimpleNamespace, (), {name: value for name, value in vars(obj).items() if name in self.names}
        if isinstance(obj, Afterwards):
            return self.afterwards()
        if _is_ours(type(obj)) and not isinstance(obj, tuple | Tensor | BaseException | nn.Module):
            return self._instance(obj)
        return super().reducer_override(obj)

    def own_function(self, function: types.FunctionType, original: types.FunctionType) -> Any:
        """A function of this package, and what it travels in the place of, if not of itself."""
        raise TypeError

    def own_class(self, cls: type) -> Any:
        """A class of this package."""
        raise TypeError

    def afterwards(self) -> Any:
        """What is to be done once the classes are there."""
        return list, ()

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
        kept = {name: value for name, value in state.items() if name in self.names}
        return copyreg.__newobj__, (type(obj),), kept  # type: ignore[attr-defined]


class _Looking(_Pickler):
    """Finds out what has to travel."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        #: Every name that what travels speaks of, and those of classes that it makes objects of.
        self.named: set[str] = set()
        self.makes: set[str] = set()
        #: Functions of modules, and classes with what of them travels.
        self.functions: dict[int, types.FunctionType] = {}
        self.classes: dict[type, dict[str, Any]] = {}

    def own_function(self, function: types.FunctionType, original: types.FunctionType) -> Any:
        if _stands_alone(original):
            self.functions[id(function)] = function
        source = lean(inner_of(function))
        self.named |= source.names
        self.makes |= source.calls
        return (
            object,
            (),
            _outer(inner_of(function), source.outer) | {"1": function.__defaults__, "2": function.__kwdefaults__},
        )

    def _users_function(self, function: types.FunctionType) -> tuple:
        # What hooks ask of their hook point, say.
        self.named.update(function.__code__.co_names)
        return super()._users_function(function)

    def own_class(self, cls: type) -> Any:
        kept: dict[str, Any] = {n: value for n, value in vars(cls).items() if self._travels(cls, n, value)}
        if dataclasses.is_dataclass(cls):
            kept |= {
                field.name: field.default
                for field in dataclasses.fields(cls)
                if field.name in self.names and field.default is not dataclasses.MISSING
            }
        self.classes[cls] = kept
        factories = [each.factory for each in self.parameters(cls) or ()]
        return object, (), {**kept, "bases": [base for base in cls.__bases__ if base is not object], "3": factories}

    def parameters(self, cls: type) -> list[Parameter] | None:
        """The parameters of the ``__init__`` that ``dataclass`` has made for a class, if objects are made of it."""
        if not dataclasses.is_dataclass(cls) or not self._is_made(cls):
            return None
        found = []
        for field in dataclasses.fields(cls):
            default = ... if field.default is dataclasses.MISSING else field.default
            factory = None if field.default_factory is dataclasses.MISSING else field.default_factory
            if factory is None or field.name in self.names:
                found.append(Parameter(field.name, default, factory))
        return found

    def _travels(self, cls: type, name: str, value: Any) -> bool:
        """Whether something of a class may be asked for on the other side."""
        if isinstance(value, property) and name in _constants(cls):
            return False
        if isinstance(value, functools.cached_property):
            # Otherwise the value is in the instance where it is needed.
            return self._is_made(cls) and name in self.names
        if isinstance(value, types.MemberDescriptorType) or name in getattr(cls, "_fields", ()):
            return False
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(function) if callable(function) else function
        if isinstance(function, types.FunctionType):
            known = name in self.names - _OF_CONTAINERS or name in _CALLED_BY_PYTHON
            known = self._is_made(cls) if name in _MAKING else known
            return known and function.__code__.co_filename == inspect.getsourcefile(cls)
        return (name in self.names or name == "__class__") and (not name.startswith("__") or name == "__class__")

    def _is_made(self, cls: type) -> bool:
        return any(each.__name__ in self.made for each in (cls, *_subclasses(cls))) or issubclass(cls, BaseException)


class _Shipper(_Pickler):
    """Pickles what was found to have to travel."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bundle: Bundle = arguments[-1]
        # nnsight reads a file once: another text needs another name.
        file = f"{PACKAGE}/{zlib.crc32(self.bundle.text.encode()):08x}"
        self._loader = _Call(self.bundle, (self.bundle.text, "bundle", None, None, None, file, 1))
        self._namespace = _Call(self._loader, ())
        # What may hold something of the bundle itself is known to it only when that is there.
        outer = self.bundle.outer
        self._at_once = {name: value for name, value in outer.items() if _is_of_others(value)}
        self._then = {name: value for name, value in outer.items() if name not in self._at_once}

    def reducer_override(self, obj: Any) -> Any:
        """A bundle is loaded once."""
        if type(obj) is _Call:
            if obj.function is self.bundle:
                return _load_function, obj.arguments, self._at_once, None, None, _fill
            return obj.function, obj.arguments
        return super().reducer_override(obj)

    def own_function(self, function: types.FunctionType, original: types.FunctionType) -> Any:
        if id(function) in self.bundle.known:
            return operator.getitem, (self._namespace, self.bundle.known[id(function)])
        source, code = lean(function), function.__code__
        arguments = (source.text, code.co_name, function.__defaults__, function.__kwdefaults__, None)
        return _load_function, (*arguments, PACKAGE, 1), _outer(function, source.outer), None, None, _fill

    def own_class(self, cls: type) -> Any:
        return operator.getitem, (self._namespace, self.bundle.known[id(cls)])

    def afterwards(self) -> Any:
        touches = [_Call(setattr, each) for each in self.bundle.later]
        return list, ([*touches, _Call(_fill, (self._loader, self._then))],)


def _is_of_others(value: Any) -> bool:
    """Whether something is a module, or a class or function of another package."""
    return isinstance(value, types.ModuleType) or (
        isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and not _is_ours(value)
    )


def _is_ours(obj: Any) -> bool:
    module = getattr(obj, "__module__", None)
    return isinstance(module, str) and (module == PACKAGE or module.startswith(f"{PACKAGE}."))


def _stands_alone(function: types.FunctionType) -> bool:
    """Whether a function is one of a module, rather than a method or one inside of another."""
    return function.__qualname__ == function.__name__ != "<lambda>"


def _outer(function: types.FunctionType, names: Any) -> dict[str, Any]:
    """What a function finds under names outside of itself."""
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            found[name] = cell.cell_contents
    return found


def _envoy(envoy: Envoy) -> tuple:
    """nnsight's handle on the whole model; the server has those on its parts, and knows what it has loaded."""
    kind = next(cls for cls in type(envoy).__mro__ if not _is_ours(cls))
    # Not what nnsight would pickle: that marks each module for good.
    given: dict[str, Any] = {"_parent": None, "_children": [], "_child_map": {}, "args": (), "kwargs": {}}
    given |= dict.fromkeys(_PERSISTENT)
    state = {name: value for name, value in vars(envoy).items() if not (isinstance(value, Envoy) or _is_ours(value))}
    return object.__new__, (kind,), {name: given.get(name, value) for name, value in state.items()}


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
