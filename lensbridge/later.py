"""When is a cached value computed? When somebody looks at it.

Most points show a cheap function of a tensor that the HuggingFace model has made: the stream without its mean, the norm
of it, values without their bias; some show what follows from others: the stream in the middle of a block is the one
before it and what attention adds. A run that only fills a cache keeps the tensor and the function; the first look at
the entry computes it, and what nobody looks at costs neither time nor memory.

What others are made of is given to nobody: while an entry waits for a tensor, who takes that very tensor out of the
cache gets a copy, to edit as they like.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .errors import HookError


class Source:
    """A tensor of a forward pass from which cached values are made, or what it is made of itself.

    Args:
        tensor: it, off the graph; or None.
        function: what makes it otherwise, of the tensors in ``parents``.
    """

    __slots__ = ("_function", "_parents", "_tensor", "_version", "depth", "waiting")

    def __init__(
        self, tensor: Tensor | None, function: Callable[..., Tensor] | None = None, parents: tuple[Source, ...] = ()
    ) -> None:
        self._tensor = tensor
        self._version = None if tensor is None or tensor.is_inference() else tensor._version
        self._function = function
        self._parents = parents
        #: How many values are still to be made of it.
        self.waiting = 0
        #: How many such steps there are before it.
        self.depth = 0
        for parent in parents:
            parent.waiting += 1
            self.depth = max(self.depth, parent.depth + 1)

    def __call__(self, whatever_it_is: bool = False) -> Tensor:
        """The tensor.

        Args:
            whatever_it_is: whether it may have been overwritten.

        Raises:
            HookError: (a RuntimeError) something has overwritten it.
        """
        if self._tensor is None:
            assert self._function is not None
            self._tensor = made = self._function(*[parent() for parent in self._parents])
            self._version = made._version
            for parent in self._parents:
                parent.waiting -= 1
            self._function, self._parents = None, ()
        elif self._version is not None and self._tensor._version != self._version and not whatever_it_is:
            raise HookError(
                "a cached activation is lost: something in the model (a PyTorch hook on one of its modules, say) "
                "has overwritten in place what it was to be computed from. Run with device= to keep copies."
            )
        return self._tensor

    def is_of(self, tensor: Tensor) -> bool:
        """Whether what is held here is this tensor, on the graph or off it."""
        mine = self._tensor
        return (
            mine is not None
            and mine.data_ptr() == tensor.data_ptr()
            and (mine.shape, mine.stride(), mine.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        )

    def tensors(self) -> Iterator[Tensor]:
        """What is held here, or by what it is made of."""
        if self._tensor is not None:
            yield self._tensor
        for parent in self._parents:
            yield from parent.tensors()


class Later:
    """A value to be computed once: ``function`` of the sources, off the graph.

    Args:
        function: what makes it; None for the source itself.
        sources: what it is made of.
        shares: whether the value shares its memory with the source.
    """

    __slots__ = ("_function", "_shares", "_sources", "_value")

    def __init__(
        self, function: Callable[..., Tensor] | None, *sources: Source | Tensor, shares: bool | None = None
    ) -> None:
        self._function = function
        self._sources = tuple(each if isinstance(each, Source) else Source(each) for each in sources)
        self._shares = function is None if shares is None else shares
        self._value: Tensor | None = None
        for source in self._sources:
            source.waiting += 1

    def __call__(self) -> Tensor:
        """The value; two entries that share it get the same tensor.

        Raises:
            HookError: (a RuntimeError) something has overwritten the tensor that it is made of.
        """
        if self._value is None:
            sources = self._sources
            with ExitStack() as stack:
                # Whatever mode the caller is in, the value has to serve a later use in another.
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                given = [source(self._function is None) for source in sources]
                if torch._C._is_any_autocast_enabled():
                    stack.enter_context(torch.autocast(given[0].device.type, enabled=False))
                value = given[0] if self._function is None else self._function(*given)
                if self._shares and sources[0].waiting > 1:
                    value = value.clone()
            for source in sources:
                source.waiting -= 1
            self._value, self._function, self._sources = value, None, ()
        return self._value

    def tensors(self) -> Iterator[Tensor]:
        """The value, or what is kept to make it."""
        if self._value is not None:
            yield self._value
        for source in self._sources:
            yield from source.tensors()


class LaterDict(dict[str, Tensor]):
    """A dict whose values may be `Later`; whoever takes one out finds a tensor."""

    def __getitem__(self, key: str) -> Tensor:
        value: Any = super().__getitem__(key)
        if type(value) is Later:
            value = value()
            super().__setitem__(key, value)
        return value

    def put_off(self, key: str, value: Later) -> None:
        """Set an entry to a value that is not computed yet."""
        dict.__setitem__(self, key, value)  # type: ignore[misc]

    def held(self) -> list[Tensor]:
        """The tensors that the entries keep in memory now; several may be, or share, the same."""
        entries: list[Any] = [dict.__getitem__(self, name) for name in self]
        return [each for entry in entries for each in (entry.tensors() if type(entry) is Later else [entry])]

    def put_in_order(self, names: Iterable[str]) -> None:
        """Bring the entries into this order; those that are not named come last."""
        entries = {name: dict.__getitem__(self, name) for name in names if name in self}
        entries |= {name: dict.__getitem__(self, name) for name in self if name not in entries}
        self.clear()
        for name, value in entries.items():
            dict.__setitem__(self, name, value)

    # Without an __iter__ of its own, dict(cache) would copy the entries past __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    # What dict does in C, past __getitem__, in terms of it.
    get = Mapping.get  # type: ignore[assignment]
    items = Mapping.items  # type: ignore[assignment]
    values = Mapping.values  # type: ignore[assignment]
    setdefault = MutableMapping.setdefault
    __eq__ = Mapping.__eq__

    def pop(self, key: str, *default: Any) -> Any:
        """Take an entry out; without it, the default, or a KeyError."""
        value: Any = super().pop(key, *default)
        return value() if type(value) is Later else value

    def popitem(self) -> tuple[str, Tensor]:
        """Take the last entry out."""
        key = next(reversed(self.keys()))
        return key, self.pop(key)

    def copy(self) -> dict[str, Tensor]:
        """A plain dict of the values."""
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        # Copies and pickles have tensors only, and are of a class that torch.load(weights_only=True) lets through.
        return OrderedDict, (dict(self),)


# Functions on nested containers (torch.utils._pytree, torch.func) go into it as into any dict.
_pytree.register_pytree_node(
    LaterDict,
    lambda cache: (list(cache.values()), list(cache)),
    lambda values, names: dict(zip(names, values, strict=True)),
)
