"""What passes through HuggingFace's modules when nobody looks?

A second run of the HF model by itself, with PyTorch's own hooks: no nnsight, no hook points. What the points show is
compared with this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class Pass(NamedTuple):
    """What one call of a module was given and gave back: the first tensor of each."""

    input: Tensor | None
    output: Tensor | None


@dataclass
class Captured:
    """The calls of every module in one run, by path."""

    calls: dict[str, list[Pass]] = field(default_factory=dict)
    logits: Tensor | None = None

    def output(self, path: str, call: int = 0, of: int = 1) -> Tensor:
        """What a call of the module returned, of this many.

        Raises:
            LookupError: if it was not called so often, or gave no tensor.
        """
        return self._of(path, call, of).output  # type: ignore[return-value]

    def input(self, path: str, call: int = 0, of: int = 1) -> Tensor:
        """What a call of the module was given, of this many.

        Raises:
            LookupError: if it was not called so often, or was given no tensor.
        """
        return self._of(path, call, of).input  # type: ignore[return-value]

    def _of(self, path: str, call: int = 0, of: int = 1) -> Pass:
        calls = self.calls.get(path, [])
        if len(calls) != of:
            raise LookupError(f"{path!r} was called {len(calls)} times")
        return calls[call]


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor among the arguments or results of a module, inside one container at most."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return None
    return next((value for value in values if isinstance(value, Tensor)), None)


@contextmanager
def given_to(hf_model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While open, what the modules at these paths are given: the first tensor of the last call, by path."""
    found: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            value = first_tensor((*args, *kwargs.values()))
            assert value is not None
            found[path] = value.detach().clone()

        handles.append(hf_model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def called_with(hf_model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, tuple[tuple, dict[str, Any]]]]:
    """While open, what the modules at these paths are called with behind their first argument, by path."""
    found: dict[str, tuple[tuple, dict[str, Any]]] = {}
    handles = []
    for path in paths:

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            found[path] = (args[1:], kwargs) if args else ((), dict([*kwargs.items()][1:]))

        handles.append(hf_model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capturing(hf_model: nn.Module, live: bool = False) -> Iterator[Captured]:
    """While open, what the model's modules are given and give back is kept.

    Args:
        live: keep the tensors themselves, with their gradients, instead of copies of their values.
    """
    found = Captured()
    given: dict[str, list[Tensor | None]] = {}
    handles = []

    def kept(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if not live:
            return value.detach().clone()
        if value.requires_grad:
            value.retain_grad()
        return value

    for path, module in hf_model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            value = first_tensor(args)
            if value is None:
                hidden = kwargs.get("hidden_states")
                value = hidden if isinstance(hidden, Tensor) else first_tensor(kwargs)
            given.setdefault(path, []).append(kept(value))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            found.calls.setdefault(path, []).append(Pass(given[path].pop(), kept(first_tensor(output))))

        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
