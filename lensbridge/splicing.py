"""Which modules has the user put into the model's tree, and how does a run pass through them?

The tree of a hooked HuggingFace model computes nothing by itself, so a module that takes a place in it has to be called
from the run. In a hook point's place it is shown the value there (SAELens, AutoCircuit). In the place of an MLP or of
the unembedding it is called with what that reads, once the model has computed what that returns, which is dropped
(circuit-tracer, whose modules call the component that they took the place of: it computes once more).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .blocks import Component
from .errors import UnsupportedModelError
from .hook_points import HookPoint


@dataclass
class Splices:
    """The modules of the user's in one model's tree."""

    #: By the names of the hook points whose places they are in.
    in_points: dict[str, nn.Module] = field(default_factory=dict)
    #: By the names of the components.
    in_components: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tree: Mapping[str, nn.Module], served: Collection[str], components: Collection[str], interior: Any
    ) -> Splices:
        """Find them.

        Args:
            tree: the model's modules by name, as they are now.
            served: the names of the hook points that runs show values to.
            components: the names of the model's components.
            interior: which of these can be replaced.

        Raises:
            UnsupportedModelError: a module in the place of a component that is no MLP and not the unembedding, or
                where the model does more to what that returns than to add it.
        """
        taken = {name: tree[name] for name in components if name in tree and not isinstance(tree[name], Component)}
        for name, module in taken.items():
            if not interior.replaceable(name):
                raise UnsupportedModelError(
                    f"a {type(module).__name__} is in the place of {name!r}, where HuggingFace's module computes; "
                    "modules can be put in the place of MLPs and of the unembedding (where the model does no more to "
                    "what these return than to add or to norm it) and of hook points"
                )
        points = {name: tree[name] for name in served if name in tree and not isinstance(tree[name], HookPoint)}
        inside = tuple(f"{name}." for name in taken)
        return cls({name: module for name, module in points.items() if not name.startswith(inside or "\0")}, taken)

    def inside(self, name: str) -> bool:
        """Whether a module in a component's place has this name below it."""
        return any(name.startswith(f"{component}.") for component in self.in_components)

    def listeners(self) -> dict[str, nn.Module]:
        """What is shown values in a run on their account."""
        found = dict(self.in_points)
        for name, module in self.in_components.items():
            read = _Read()
            found |= {f"{name}.hook_in": read, f"{name}.hook_out": _Taken(module, read)}
        return found


class _Read(nn.Module):
    """Remembers what a component reads."""

    value: Tensor

    def forward(self, value: Tensor) -> Tensor:
        self.value = value
        return value


class _Taken(nn.Module):
    """Gives what a module makes of that, instead of what the component returns."""

    module: Any
    read: Any

    def __init__(self, module: nn.Module, read: _Read) -> None:
        super().__init__()
        # Neither is a part of this one.
        self.__dict__.update(module=module, read=read)

    def forward(self, value: Tensor) -> Tensor:
        return self.module(self.read.value)
