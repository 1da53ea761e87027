"""Who is listening, and what happens when a value passes a hook point?

A `HookPoint` is an identity module that holds its listeners in order; calling it with a tensor is the whole protocol.
The engine calls it with values that pass through a HuggingFace model, and a user's own `HookedRootModule` calls it from
its ``forward``: both get the same semantics from this file, and neither needs PyTorch's module hooks.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import HookError, TraceError

Direction = Literal["fwd", "bwd"]
Directions = Literal["fwd", "bwd", "both"]
NamesFilter = Callable[[str], bool] | Sequence[str] | str | None
DeviceType = torch.device | None


@runtime_checkable
class HookFunction(Protocol):
    """A hook: called as ``fn(tensor, hook=hook_point)``; returns a replacement, or None to keep the (edited) tensor."""

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> Any: ...


class Server(Protocol):
    """Gives and takes values of hook points while a trace runs."""

    def read(self, point: HookPoint) -> Tensor:
        """The value at ``point``."""

    def write(self, point: HookPoint, value: Tensor) -> None:
        """Put ``value`` in its place."""


#: What serves the code of the trace that runs here, if any.
SERVER: ContextVar[Server | None] = ContextVar("lensbridge_server", default=None)


class ReadOnlyHook:
    """Base of hooks that promise not to edit what they are given, so that they may be handed the live tensor."""

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> None:
        raise TypeError(f"{type(self).__name__} must define __call__(tensor, *, hook)")


@dataclass
class LensHandle:
    """One attached hook, as `HookPoint.fwd_hooks` and `HookPoint.bwd_hooks` list them (TransformerLens' LensHandle)."""

    hook: RemovableHandle
    is_permanent: bool = False
    context_level: int | None = None
    user_hook: Callable | None = None


class HookPoint(nn.Module):
    """An identity that shows each tensor passing through it to its hooks (TransformerLens' HookPoint).

    Forward hooks run in order of addition, each seeing the previous one's result. Backward hooks are given the gradient
    with respect to the point's output and may return the one to use for its input.
    """

    fwd_hooks: list[LensHandle]
    bwd_hooks: list[LensHandle]
    ctx: dict
    name: str | None
    hook_conversion: Any
    backward_scale: float
    #: The hooks that nobody has removed by ``handle.hook.remove()``, by the handle's id.
    _attached: OrderedDict[int, Callable]

    def __init__(self) -> None:
        super().__init__()
        # A model has hundreds of points: set past nn.Module's own __setattr__, which looks for parameters and modules.
        self.__dict__.update(
            fwd_hooks=[],
            bwd_hooks=[],
            ctx={},
            name=None,
            hook_conversion=None,
            backward_scale=1.0,
            _attached=OrderedDict(),
        )

    def __repr__(self) -> str:
        parts = [f"name={self.name!r}"] if self.name is not None else []
        parts += [f"{len(hooks)} {kind}" for kind, hooks in (("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks)) if hooks]
        return f"HookPoint({', '.join(parts)})"

    def add_perma_hook(self, hook: Callable, dir: Direction = "fwd") -> None:
        """Add a hook that `reset_hooks` leaves in place unless told otherwise."""
        self.add_hook(hook, dir=dir, is_permanent=True)

    def add_hook(
        self,
        hook: Callable,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> None:
        """Attach ``hook``; ``prepend`` puts it before the others, ``level`` is the `hooks()` context it belongs to.

        With ``alias_names`` the hook is called once per name, with a stand-in for this point that bears the name.

        Raises:
            ValueError: if ``dir`` is neither "fwd" nor "bwd".
        """
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"Invalid direction {dir!r}: a hook is added to 'fwd' or to 'bwd'")
        called = hook if alias_names is None else _under_aliases(hook, alias_names)
        if not isinstance(hook, ReadOnlyHook):
            called = _converting(called, dir)
        removable = RemovableHandle(self._attached)
        self._attached[removable.id] = called
        handles = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        handles.insert(0 if prepend else len(handles), LensHandle(removable, is_permanent, level, user_hook=hook))

    def has_hooks(self, dir: Directions = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether a hook of this direction (and level, if given) is attached."""
        return any(
            (including_permanent or not handle.is_permanent) and (level is None or handle.context_level == level)
            for handle in self._handles(dir)
        )

    def remove_hooks(
        self, dir: Directions = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove temporary hooks (of one level, if given); ``including_permanent``: all hooks, whatever their level."""
        for handle in self._handles(dir):
            if including_permanent or (not handle.is_permanent and (level is None or handle.context_level == level)):
                handle.hook.remove()
        for handles in (self.fwd_hooks if dir != "bwd" else [], self.bwd_hooks if dir != "fwd" else []):
            handles[:] = [handle for handle in handles if handle.hook.id in self._attached]

    def clear_context(self) -> None:
        """Forget what hooks have stored in ``ctx``."""
        self.ctx = {}

    def enable_reshape(self, hook_conversion: Any = None) -> None:
        """Show hooks ``hook_conversion.convert(tensor)``, and ``revert`` what they return; None turns it off."""
        self.hook_conversion = hook_conversion

    def layer(self) -> int:
        """The layer in the point's name, ``blocks.{layer}. ...``.

        Raises:
            ValueError, IndexError: if the name has no layer (as in TransformerLens).
        """
        if self.name is None:
            raise ValueError("this HookPoint has no name yet: call setup() on the root module")
        return int(self.name.split(".")[1])

    def forward(self, x: Tensor) -> Tensor:
        """Show ``x`` to the hooks and return what they make of it."""
        if not (self.fwd_hooks or self.bwd_hooks):
            return x
        if self.bwd_hooks and torch.is_grad_enabled() and isinstance(x, Tensor):
            # The graph keeps them: they are called even if they are removed before the backward pass, as PyTorch's own.
            edits = not all(isinstance(handle.user_hook, ReadOnlyHook) for handle in self.fwd_hooks)
            return watching_gradient(self, x, self._live(self.bwd_hooks), edits)
        return self.run_forward_hooks(x)

    @property
    def value(self) -> Tensor:
        """In a trace (`HookedTransformer.trace`): the value at this point, in the active basis. Waits until it exists.

        Assigning replaces it for the rest of the forward pass, and so does editing the tensor in place, as long as
        nothing else has been asked of the trace in between.

        Raises:
            TraceError: outside of a trace, or when the forward pass has already come past.
        """
        try:
            return _served(self).read(self)
        except AttributeError as error:
            # nn.Module would take it for its own, and say that there is no such attribute as ``value``.
            raise TraceError(f"serving {self.name!r} failed: {error}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "value":
            # Past nn.Module's own, which would register a parameter.
            _served(self).write(self, value)
        elif name in ("fwd_hooks", "bwd_hooks"):
            # A model looks at the lists themselves.
            getattr(self, name)[:] = value
        else:
            super().__setattr__(name, value)

    def run_forward_hooks(self, x: Tensor) -> Tensor:
        """Show ``x`` to the forward hooks in order; returns what they make of it."""
        attached = self._attached
        # A hook may remove itself, which must not make the next one be passed over.
        for handle in (*self.fwd_hooks,):
            hook = attached.get(handle.hook.id)
            if hook is not None:
                try:
                    result = hook(x, hook=self)
                except TypeError as error:
                    _explain_signature(handle.user_hook or hook, self, error)
                    raise
                if result is not None:
                    x = result
        return x

    @property
    def only_reads(self) -> bool:
        """Whether no listener here can change the value: only caches listen, and only forward."""
        return not (self.bwd_hooks or self._forward_hooks) and all(
            isinstance(handle.user_hook, ReadOnlyHook) for handle in self.fwd_hooks
        )

    def _handles(self, dir: Directions) -> list[LensHandle]:
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"Invalid direction {dir!r}: use 'fwd', 'bwd' or 'both'")
        return [*(self.fwd_hooks if dir != "bwd" else ()), *(self.bwd_hooks if dir != "fwd" else ())]

    def _live(self, handles: list[LensHandle]) -> list[Callable]:
        return [self._attached[handle.hook.id] for handle in handles if handle.hook.id in self._attached]


def watching_gradient(point: Any, x: Tensor, hooks: Sequence[Callable], edits: bool) -> Tensor:
    """Run a point's forward hooks between two identities; backward hooks see one's gradient and set the other's.

    Args:
        hooks: the backward hooks.
        edits: whether a forward hook may edit the value in place.
    """
    replacement: list[Tensor] = []

    def at_output(gradient: Tensor) -> Tensor | None:
        replacement.clear()
        for hook in hooks:
            result = hook(gradient, hook=point)
            if result is not None:
                replacement[:] = [result[0] if isinstance(result, tuple) else result]
        # Where a forward hook starts the graph, nothing comes before it.
        return None if x.requires_grad else at_input(gradient)

    def at_input(gradient: Tensor) -> Tensor | None:
        return replacement[0] if replacement else None

    inner = x
    if x.requires_grad:
        # An edit in place would move the hook at the input behind itself; a copy keeps it before.
        inner = x.clone() if edits else x.view_as(x)
        inner.register_hook(at_input)
    outer = point.run_forward_hooks(inner)
    if not outer.requires_grad:
        return outer
    outer = outer.view_as(outer)
    outer.register_hook(at_output)
    return outer


def _explain_signature(hook: Callable, point: HookPoint, error: TypeError) -> None:
    """Say what hooks are called with, if one failed because it does not take that."""
    try:
        inspect.signature(hook).bind(None, hook=point)
    except ValueError:
        return
    except TypeError as reason:
        raise HookError(
            f"the hook at {point.name!r} cannot be called: {reason}. Hooks are called as fn(value, hook=point), so the "
            "second argument has to be called hook; the others need defaults (functools.partial gives them)"
        ) from error


def _served(point: HookPoint) -> Server:
    server = SERVER.get()
    if server is None:
        raise TraceError(
            f"{point.name!r} has a value only while a trace runs: use it in the body of `with model.trace(input):`, or "
            "of `with tracer.invoke(input):` inside a trace without input. Outside, run_with_cache keeps values. "
            "Before `with loss.backward():`, read those that the block is about"
        )
    return server


def _converting(user_hook: Callable, dir: Direction) -> Callable:
    def called(tensor: Tensor, *, hook: HookPoint) -> Any:
        # What is set on the point that is passed, which in a copy of the model is another one.
        if dir == "bwd" and hook.backward_scale != 1.0:
            tensor = tensor * hook.backward_scale
        conversion = hook.hook_conversion
        if conversion is None:
            return user_hook(tensor, hook=hook)
        result = user_hook(conversion.convert(tensor), hook=hook)
        return result if result is None else conversion.revert(result)

    return called


class HookIntrospectionMixin:
    """`list_hooks` for any class with a ``hook_dict`` of name -> `HookPoint`."""

    hook_dict: dict[str, HookPoint]

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """The attached hooks by point; points without any are left out.

        Args:
            name_filter: a name, a list of names, or a predicate on names; None for all.
            dir: "fwd", "bwd" or "both".
            including_permanent: whether permanent hooks are listed.
        """
        keep = as_predicate(name_filter)
        found = {
            name: [h for h in point._handles(dir) if including_permanent or not h.is_permanent]
            for name, point in self.hook_dict.items()
            if keep(name)
        }
        return {name: handles for name, handles in found.items() if handles}


def as_predicate(names_filter: NamesFilter) -> Callable[[str], bool]:
    """A names filter of any kind as a predicate; a string or a list means exactly these names."""
    if names_filter is None:
        return lambda name: True
    if callable(names_filter):
        return names_filter
    wanted = {names_filter} if isinstance(names_filter, str) else set(names_filter)
    return wanted.__contains__


class _AliasedPoint:
    """A hook point as a hook sees it under another name."""

    def __init__(self, point: HookPoint, name: str) -> None:
        self._point = point
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._point, attribute)

    def layer(self) -> int:
        return int(self.name.split(".")[1])


def _under_aliases(hook: Callable, names: list[str]) -> Callable:
    def called(tensor: Tensor, *, hook: HookPoint) -> Any:
        replacement = None
        for name in names:
            result = user_hook(tensor, hook=_AliasedPoint(hook, name))
            if result is not None:
                tensor = replacement = result
        return replacement

    user_hook = hook
    return called


def __getattr__(name: str) -> Any:
    # TransformerLens has it here too; importing it at the top would be a circle.
    if name == "HookedRootModule":
        from .hooked_root_module import HookedRootModule

        return HookedRootModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
