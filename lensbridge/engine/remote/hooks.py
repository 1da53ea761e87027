"""What of a user's hooks has to travel, and what do they change outside of themselves?

A hook on a server writes into copies. So the lists, dicts, tensors and the like that it can reach (in its closure,
its globals, its partial arguments, its object's attributes) are noted before they travel, and get the contents that
they have there afterwards. What cannot come back is refused before anything is sent.
"""

from __future__ import annotations

import collections
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...errors import HookError
from ...hook_points import HookPoint

#: What is written back. Of an object of the user's own class, its attributes.
KINDS = (Tensor, np.ndarray, list, dict, set, collections.deque)
#: Modules whose functions and objects are there on the server, too.
_THERE = ("torch", "numpy", "builtins", "transformers", "nnsight", "math", "collections", "functools", "einops")


class States:
    """The user's objects that the hooks of a job can reach."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._seen: set[int] = set()
        self._where = ""

    def reached_by(self, hook: Callable, where: str) -> None:
        """Note what a hook can reach.

        Raises:
            HookError: it reaches what cannot travel, or changes what cannot come back.
        """
        self._where = where
        self._visit(hook)

    def add(self, state: Any) -> None:
        """Note an object that hooks are given."""
        if id(state) not in self._seen:
            self._seen.add(id(state))
            self.found.append(state)

    def _visit(self, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, types.ModuleType | type | HookPoint | str | bytes):
            return
        if isinstance(value, KINDS):
            self.add(value)
            parts = (
                value.values() if isinstance(value, dict) else () if isinstance(value, Tensor | np.ndarray) else value
            )
            for part in list(parts):
                self._visit(part)
            return
        self._seen.add(id(value))
        if isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__)
            self._visit(value.__self__)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, tuple | frozenset):
            for part in value:
                self._visit(part)
        else:
            self._object(value)

    def _function(self, function: types.FunctionType) -> None:
        if _is_there(function):
            return
        code = function.__code__
        rebound = {
            str(instruction.argval)
            for instruction in dis.get_instructions(code)
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
            or (instruction.opname in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars)
        }
        if rebound:
            raise HookError(
                f"{self._where} assigns to {', '.join(sorted(rebound))}, a name outside of it, which would stay on the "
                "server: use a list or a dict there, and change what is in it"
            )
        outer = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                outer[name] = cell.cell_contents
            except ValueError:
                continue
        for name, value in outer.items():
            self._refuse(name, value)
            self._visit(value)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value)

    def _object(self, value: Any) -> None:
        self._refuse(type(value).__name__, value)
        if isinstance(value, nn.Module) or _is_there(type(value)) or not hasattr(value, "__dict__"):
            return
        called = type(value).__dict__.get("__call__")
        if isinstance(called, types.FunctionType):
            self._function(called)
        self._visit(vars(value))

    def _refuse(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and hasattr(value, "hf_model"):
            raise HookError(
                f"{self._where} reads {name!r}, the model itself, which does not travel: take what the hook needs of "
                f"it (a weight, a number) before the run, as in `W_U = {name}.W_U`, and let the hook read that"
            )


def _names(code: types.CodeType) -> set[str]:
    """The global names that a function reads, and those inside of it do."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _is_there(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module.partition(".")[0] in _THERE


def hooks_of(point: Any, direction: str) -> list[Callable]:
    """The hooks that are on a point, in order, as the user gave them.

    Raises:
        HookError: PyTorch's own hooks on it, or a conversion of what hooks are shown.
    """
    if not isinstance(point, HookPoint):
        raise HookError(
            f"a {type(point).__name__} is in the place of a hook point, and does not travel: remote runs take functions"
        )
    if point._forward_hooks or point.hook_conversion is not None:
        raise HookError(f"{point.name!r} has PyTorch's own hooks or a conversion on it: remote runs take add_hook's")
    return [handle.user_hook or point._attached[handle.hook.id] for handle in point._handles(direction)]  # type: ignore[arg-type]


def put_back(states: Iterable[Any], changes: Mapping[int, Any]) -> None:
    """Give the user's objects the contents that a job has left in their copies."""
    known = list(states)

    def value_of(entry: tuple[str, Any]) -> Any:
        kind, value = entry
        return known[value] if kind == "known" else value

    for number, new in changes.items():
        state = known[number]
        if isinstance(state, Tensor):
            state.data.resize_(new.shape).copy_(new) if state.shape != new.shape else state.data.copy_(new)
        elif isinstance(state, np.ndarray):
            np.copyto(state, new)
        elif isinstance(state, dict):
            entries = {key: value_of(entry) for key, entry in new}
            state.clear()
            state.update(entries)
        else:
            entries_ = [value_of(entry) for entry in new]
            state.clear()
            (state.update if isinstance(state, set) else state.extend)(entries_)


def source_of(hook: Any) -> str:
    """What to call a hook in a message."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        return f"{name} ({inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]})"
    except (OSError, TypeError):
        return name
