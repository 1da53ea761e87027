"""Whose turn is it to run the HuggingFace model?

Handles on modules, hooks and the attention implementation belong to the model and not to a thread, so threads that run
one model take turns. A run from inside another one (in a hook, or in the body of a trace) is a turn within a turn: the
traces around it stand by, so that they do not take its values for theirs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


class Turns:
    """The turns of one model: a context that a thread enters for each of its runs, also within one of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nobody is running the model."""
        self.lock = threading.RLock()
        #: nnsight's interleavers of the traces that are open on the model, outermost first.
        self.traces: list[Any] = []
        #: Of each turn under way, the traces that stand by for it.
        self._standing_by: list[list[Any]] = []

    def __enter__(self) -> None:
        self.lock.acquire()
        active = [trace for trace in self.traces if trace.interleaving] if self.traces else []
        for trace in active:
            trace.interleaving = False
        self._standing_by.append(active)

    def __exit__(self, *_: object) -> None:
        for trace in self._standing_by.pop():
            trace.interleaving = True
        self.lock.release()


_TURNS: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def turn(hf_model: nn.Module) -> Turns:
    """The time of one run of a model; entering it waits while another thread runs it."""
    turns = _TURNS.get(hf_model)
    if turns is None:
        with _MAKING:
            turns = _TURNS.setdefault(hf_model, Turns())
    return turns


def in_turn(function: F) -> F:
    """Make every call of a function one of the turns of its first argument's ``hf_model``."""

    @wraps(function)
    def called(owner: Any, *args: Any, **kwargs: Any) -> Any:
        with getattr(owner, "turns", None) or turn(owner.hf_model):
            return function(owner, *args, **kwargs)

    return called  # type: ignore[return-value]


@contextmanager
def watched_by(hf_model: nn.Module, interleaver: Any) -> Iterator[None]:
    """Within a turn: the time for which an interleaver follows the model."""
    traces = turn(hf_model).traces
    traces.append(interleaver)
    try:
        yield
    finally:
        traces.remove(interleaver)


def _forget() -> None:
    """In a forked process no other thread has survived to give a lock back."""
    global _MAKING
    _MAKING = threading.Lock()
    for turns in list(_TURNS.values()):
        turns.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
