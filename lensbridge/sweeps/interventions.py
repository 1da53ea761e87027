"""Where does an intervention first touch the model, and can it share a run with others?

An intervention is what `run_with_hooks` takes: pairs of (name or predicate on names, hook). Everything below the first
layer that it touches is as without it, which is what allows a sweep to start there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..hook_points import HookPoint
from ..hooked_root_module import NamedHook

#: Points that need eager attention, and where an edit changes what padding attends to.
SQUARES = ("attn.hook_attn_scores", "attn.hook_pattern")


@dataclass(frozen=True)
class Intervention:
    """One of a sweep's interventions.

    Args:
        index: its place among them.
        pairs: as they were given.
        hooks: point name -> the hooks there, in order.
        start: the first layer that it touches; ``n_layers`` if it touches what comes after the blocks only.
        alone: whether it cannot share a run.
        kind: interventions of different kinds do not share a run.
    """

    index: int
    pairs: Sequence[NamedHook]
    hooks: dict[str, list[Callable]]
    start: int
    alone: bool
    kind: tuple[str, ...] = ()


def layer_of(name: str, n_layers: int) -> int:
    """The block to start at in order to pass the point: 0 for the embeddings too, ``n_layers`` behind the blocks."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0])
    return n_layers if first in ("ln_final", "unembed") else 0


def resolve(model: Any, interventions: Iterable[Sequence[NamedHook]], padded: bool) -> list[Intervention]:
    """The interventions with their points looked up.

    Args:
        padded: whether the input has masked positions.

    Raises:
        UnknownPointError, DisabledPointError: for a point that does not exist or is off.
        TypeError: if there is no list of interventions, or an intervention is not a list of pairs.
    """
    if not isinstance(interventions, Iterable):
        raise TypeError(f"a sweep takes a list of interventions, not a {type(interventions).__name__}")
    return [_resolved(model, index, pairs, padded) for index, pairs in enumerate(interventions)]


def _resolved(model: Any, index: int, pairs: Sequence[NamedHook], padded: bool) -> Intervention:
    pairs = list(pairs)
    hooks: dict[str, list[Callable]] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"intervention {index} holds {pair!r}: an intervention is a list of (name, hook) pairs, as "
                "run_with_hooks takes, and a sweep takes a list of interventions"
            )
        name, hook = pair
        if not callable(hook):
            raise TypeError(f"intervention {index}: the hook at {name!r} is a {type(hook).__name__}, not a function")
        for point in _names(model, name, hook):
            hooks.setdefault(point, []).append(hook)
    # Points inside a module that was put in a hook point's place fire when that module calls them, rows and all.
    alone = any(name in model._foreign or name in model._spliced for name in hooks)
    start = min((layer_of(name, model.cfg.n_layers) for name in hooks), default=model.cfg.n_layers)
    kind = tuple(sorted(name for name in hooks if name.endswith(SQUARES))) if padded else ()
    return Intervention(index, pairs, hooks, start, alone, kind)


def _names(model: Any, name: str | Callable[[str], bool], hook: Callable) -> list[str]:
    if not isinstance(name, str):
        return [point for point, _ in model._points_to_hook(name)]
    module = model._module_named(name)
    if not hasattr(module, "add_hook"):
        raise TypeError(f"{name!r} is a {type(module).__name__}, not a hook point.{model._closest(name)}")
    if isinstance(module, HookPoint):
        model.check_hooks_to_add(module, name, hook)
    return [name]
