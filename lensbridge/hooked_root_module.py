"""How do hooks get onto a model, and off it again?

`HookedRootModule` names every submodule, finds the hook points among them, and offers the ways to attach hooks: for a
run, for a context, until reset, or for good. It knows nothing of transformers: a user's own module can inherit from it,
give itself hook points, and call ``setup()``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnknownPointError, near_misses
from .hook_points import (
    Direction,
    Directions,
    HookIntrospectionMixin,
    HookPoint,
    NamesFilter,
    ReadOnlyHook,
    as_predicate,
)
from .later import Later, LaterDict
from .utilities.slice import Slice, SliceInput

Device = torch.device | str | None
NamedHook = tuple[str | Callable[[str], bool], Callable]

#: Points whose position axis is third from the end; on every other point it is second from the end.
HEAD_POINTS = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")


class Cut:
    """What is kept of a value: row 0 of the batch alone, or some of the positions."""

    def __init__(self, remove_batch_dim: bool, pos_slice: Slice | None) -> None:
        self.remove_batch_dim = remove_batch_dim
        self.pos_slice = pos_slice

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        kept = tensor[0] if self.remove_batch_dim else tensor
        if self.pos_slice is not None:
            axis = -3 if name.endswith(HEAD_POINTS) else -2
            if tensor.dim() >= -axis:
                kept = self.pos_slice.apply(kept, dim=axis)
        return kept


class CachingHook(ReadOnlyHook):
    """Puts what it is shown into a dict, detached, under the point's name (plus ``_grad`` for gradients)."""

    def __init__(
        self,
        cache: dict[str, Tensor],
        device: Device,
        remove_batch_dim: bool,
        pos_slice: Slice | None,
        suffix: str = "",
    ) -> None:
        self.cache = cache
        self.device = device
        self.cut = Cut(remove_batch_dim, pos_slice)
        self.suffix = suffix
        self._whole = device is None and not remove_batch_dim and pos_slice is None
        self._can_wait = self._whole and isinstance(cache, LaterDict)

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> None:
        self.keep(str(hook.name), tensor)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into the cache."""
        kept = tensor.detach() if tensor.requires_grad else tensor
        if self._whole:
            self.cache[name + self.suffix] = kept
        else:
            self.put(name + self.suffix, self.cut(name, kept if self.device is None else kept.to(self.device)))

    def put(self, entry: str, value: Tensor) -> None:
        """Put what has been cut into the cache."""
        self.cache[entry] = value if self.device is None else value.to(self.device)

    def keep_later(self, name: str, value: Later) -> None:
        """Put a value into the cache that need not be computed before somebody looks."""
        if self._can_wait:
            self.cache.put_off(name + self.suffix, value)  # type: ignore[attr-defined]
        else:
            self.keep(name, value())


class HookedRootModule(HookIntrospectionMixin, nn.Module):
    """Base class of modules with hook points (TransformerLens' HookedRootModule).

    A subclass creates its submodules and `HookPoint` attributes, then calls `setup`. Prefer `run_with_hooks` and
    `hooks`, which leave nothing behind, to `add_hook`, which does.
    """

    name: str | None
    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]
    #: What `run_with_cache` fills.
    _cache_type: type[dict] = dict

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.is_caching = False
        self.context_level = 0

    def setup(self) -> None:
        """Name every submodule and collect the hook points; call it at the end of ``__init__``."""
        self.mod_dict = {}
        self.hook_dict = {}
        self._within = [(f"{name}.", m) for name, m in self.named_modules() if name and isinstance(m, HookedRootModule)]
        for name, module in self.named_modules():
            if name == "":
                continue
            # Past nn.Module's __setattr__: a model has hundreds of modules.
            module.__dict__["name"] = name
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                self.hook_dict[name] = module

    def hook_points(self) -> Any:
        """All hook points."""
        return self.hook_dict.values()

    def remove_all_hook_fns(
        self, direction: Directions = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hooks from every point; see `HookPoint.remove_hooks`."""
        for point in self.hook_points():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def clear_contexts(self) -> None:
        """Empty the ``ctx`` of every point."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Directions = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove temporary hooks everywhere (permanent ones too, if told so) and empty the contexts."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level=level)
        self.is_caching = False

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: Callable,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Called before a hook is attached by name; a subclass raises here when the point cannot fire."""

    def check_and_add_hook(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: Callable,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """`check_hooks_to_add`, then attach."""
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir, is_permanent, prepend)
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Callable,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach ``hook`` until `reset_hooks`: to one point by name, or to all points that a predicate accepts.

        Raises:
            UnknownPointError: (a KeyError) if there is no module of that name.
            AssertionError: if the module of that name is no hook point.
            DisabledPointError: if the point's flag is off.
        """
        for point_name, point in self._points_to_hook(name):
            self.check_and_add_hook(point, point_name, hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: Direction = "fwd") -> None:
        """`add_hook` with ``is_permanent=True``."""
        self.add_hook(name, hook, dir=dir, is_permanent=True)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[NamedHook] = [],  # TransformerLens' default, and never changed
        bwd_hooks: Sequence[NamedHook] = [],
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRootModule]:
        """A context in which these hooks are attached; nested contexts remove only their own.

        Args:
            fwd_hooks: pairs of (name or predicate on names, hook).
            bwd_hooks: the same for gradients.
            reset_hooks_end: whether leaving the context removes them.
            clear_contexts: whether points' ``ctx`` are emptied with it.
        """
        try:
            self.context_level += 1
            for pairs, direction in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
                for name, hook in checked_pairs(pairs, f"{direction}_hooks"):
                    self._add_temporary(name, hook, direction)  # type: ignore[arg-type]
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[NamedHook] = [],
        bwd_hooks: Sequence[NamedHook] = [],
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass with these hooks attached; arguments as for `hooks` and ``forward``.

        Backward hooks are gone before a later ``loss.backward()`` unless ``reset_hooks_end=False``; `hooks` is the
        better place for them.
        """
        if len(bwd_hooks) > 0 and reset_hooks_end:
            logging.warning(
                "run_with_hooks removes its backward hooks on return, before a backward pass can run. "
                "Use `with model.hooks(bwd_hooks=...)` around forward and backward, or reset_hooks_end=False."
            )
        with self._turn(), self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(*model_args, **model_kwargs)

    def _turn(self) -> AbstractContextManager:
        """The time of a run with its hooks; a subclass may let other threads wait."""
        return nullcontext()

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Device = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
    ) -> dict:
        """Attach hooks that fill ``cache`` on every later run, until `reset_hooks`; returns the cache.

        Raises:
            AssertionError: if ``names_filter`` is neither None, a name, a list of names, nor a predicate.
        """
        if not (names_filter is None or callable(names_filter) or isinstance(names_filter, (str, list))):
            raise AssertionError("names_filter must be a name, a list of names, or a predicate on names")
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for pairs, direction in ((fwd, "fwd"), (bwd, "bwd")):
            for name, hook in pairs:
                self.hook_dict[name].add_hook(hook, direction)  # type: ignore[arg-type]
        return cache

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Device = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Slice | SliceInput | None = None,
    ) -> tuple[dict, list, list]:
        """(cache, forward hooks, backward hooks) to pass to `hooks`; the cache fills as they fire.

        Raises:
            ValueError: if ``names_filter`` is neither None, a name, a list of names, nor a predicate.
            UnknownPointError, DisabledPointError: if it names a point that does not exist or cannot fire.
        """
        cache = self._cache_type() if cache is None else cache
        if not (names_filter is None or callable(names_filter) or isinstance(names_filter, (str, list))):
            raise ValueError(
                f"names_filter must be None, a name, a list of names or a predicate on names, not "
                f"{type(names_filter).__name__}"
            )
        names = self._names_to_cache(names_filter)
        axis_slice = None if pos_slice is None else Slice.unwrap(pos_slice)
        self.is_caching = True
        forward = CachingHook(cache, device, remove_batch_dim, axis_slice)
        backward = CachingHook(cache, device, remove_batch_dim, axis_slice, suffix="_grad")
        return cache, [(n, forward) for n in names], [(n, backward) for n in names] if incl_bwd else []

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: Device = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """(output, dict of activations): one run that keeps what passes the chosen points.

        Args:
            names_filter: which points: None for all that are on, an exact name, a list of names, or a predicate.
            device: where the cached copies go; they stay where they are by default.
            remove_batch_dim: keep row 0 of the batch only, without its axis.
            incl_bwd: call ``backward`` on the output, which must then be a scalar (``return_type="loss"``), and keep
                the gradients too, as ``name + "_grad"``.
            pos_slice: which positions to keep, as for `Slice`.
        """
        cache, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim=remove_batch_dim, pos_slice=pos_slice
        )
        with self._turn(), self._caching(fwd, bwd, reset_hooks_end, clear_contexts):
            run = self._run_with_gradients if incl_bwd else self
            output = run(*model_args, **model_kwargs)
        return output, cache

    def _run_with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward pass."""
        output = self(*args, **kwargs)
        output.backward()
        return output

    def _caching(
        self, fwd_hooks: list, bwd_hooks: list, reset_hooks_end: bool, clear_contexts: bool
    ) -> AbstractContextManager:
        """The context in which `run_with_cache`'s hooks act; a subclass may know a cheaper way than attaching them."""
        return self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def cache_all(
        self, cache: dict | None, incl_bwd: bool = False, device: Device = None, remove_batch_dim: bool = False
    ) -> None:
        """`add_caching_hooks` for every point (deprecated in TransformerLens)."""
        logging.warning("cache_all is deprecated: use run_with_cache or add_caching_hooks")
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
        cache: dict | None,
        names: Callable[[str], bool],
        incl_bwd: bool = False,
        device: Device = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """`add_caching_hooks` for the points that ``names`` accepts (deprecated in TransformerLens)."""
        logging.warning("cache_some is deprecated: use run_with_cache or add_caching_hooks")
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)

    def _points_to_hook(self, name: str | Callable[[str], bool]) -> list[tuple[str, HookPoint]]:
        if isinstance(name, str):
            module = self._module_named(name)
            if not isinstance(module, HookPoint):
                raise AssertionError(f"{name!r} is a {type(module).__name__}, not a hook point.{self._closest(name)}")
            return [(name, module)]
        if not callable(name):
            raise TypeError(f"a hook is added to a name or to a predicate on names, not to a {type(name).__name__}")
        return [(key, point) for key, point in self.hook_dict.items() if name(key) and self._is_on(key)]

    def _add_temporary(self, name: str | Callable[[str], bool], hook: Callable, direction: Direction) -> None:
        if isinstance(name, str):
            module: Any = self._module_named(name)
            if not hasattr(module, "add_hook"):
                raise TypeError(f"{name!r} is a {type(module).__name__}, not a hook point.{self._closest(name)}")
            self.check_hooks_to_add(module, name, hook, direction)
            module.add_hook(hook, dir=direction, level=self.context_level)
            return
        for _, point in self._points_to_hook(name):
            point.add_hook(hook, dir=direction, level=self.context_level)

    def _names_to_cache(self, names_filter: NamesFilter) -> list[str]:
        if isinstance(names_filter, (str, list)):
            for name in [names_filter] if isinstance(names_filter, str) else names_filter:
                self.check_hooks_to_add(self._points_to_hook(name)[0][1], name, _no_hook)
        keep = as_predicate(names_filter)
        return [name for name in self.hook_dict if keep(name) and self._is_on(name)]

    def _is_on(self, name: str) -> bool:
        """Whether a point can fire; a predicate selects among those only. Hooked models inside know of their own."""
        return all(root._is_on(name.removeprefix(path)) for path, root in self._within if name.startswith(path))

    def _module_named(self, name: str) -> nn.Module:
        module = self.mod_dict.get(name)
        if module is None:
            reason = self._why_absent(name)
            raise UnknownPointError(f"{type(self).__name__} has no hook point {name!r}{reason}.{self._closest(name)}")
        return module

    def _why_absent(self, name: str) -> str:
        """What to add to the message about a point that is not there."""
        return ""

    def _closest(self, name: str) -> str:
        return near_misses(name, self.hook_dict)


def checked_pairs(pairs: Sequence[NamedHook], argument: str) -> Sequence[NamedHook]:
    """The pairs of a point (or a predicate on names) and a hook, if that is what they are.

    Raises:
        ValueError: something is no pair.
        TypeError: a hook is no function.
    """
    shape = f"{argument} is a list of (name, function) pairs"
    if isinstance(pairs, tuple) and len(pairs) == 2 and isinstance(pairs[0], str):
        raise ValueError(f"{shape}, and this is one pair: put it into a list")
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{shape}; {pair!r} is none")
        if not callable(pair[1]):
            raise TypeError(f"{shape}; what is to be called at {pair[0]!r} is a {type(pair[1]).__name__}")
    return pairs


def _no_hook(tensor: Tensor, *, hook: HookPoint) -> None:
    """Stands in for a hook where only the point is being checked."""
