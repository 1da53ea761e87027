"""When is a cached value computed? When somebody looks at it.

Most points show a cheap function of a tensor that the HuggingFace model has made: the stream without its mean, the norm
of it, values without their bias. A run that only fills a cache keeps the tensor and the function; the first look at the
entry computes it, and what nobody looks at costs neither time nor memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .errors import HookError


class Later:
    """A value to be computed once: ``function(raw)``, off the graph."""

    __slots__ = ("_function", "_value", "_version")

    def __init__(self, function: Callable[[Tensor], Tensor], raw: Tensor) -> None:
        self._function: Callable[[Tensor], Tensor] | None = function
        self._value = raw
        self._version = None if raw.is_inference() else raw._version

    def __call__(self) -> Tensor:
        """The value; two entries that share it get the same tensor.

        Raises:
            HookError: (a RuntimeError) something has overwritten the tensor that it is made of.
        """
        if self._function is not None:
            if self._version is not None and self._value._version != self._version:
                raise HookError(
                    "a cached activation is lost: something in the model (a PyTorch hook on one of its modules, say) "
                    "has overwritten in place what it was to be computed from. Run with device= to keep copies."
                )
            # Whatever mode the caller is in, the value has to serve a later use in another.
            with torch.inference_mode(False), torch.no_grad():
                self._value = self._function(self._value)
            self._function = None
        return self._value


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
