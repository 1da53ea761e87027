"""How does a weight that is computed from others refuse to be edited?

A derived weight looks like a tensor, and an in-place edit of it would pass without an error and without any effect on
the model. `ReadOnlyTensor` raises there. Views of it (slices, ``.data``, ``.detach()``) stay read-only; anything
computed from it is a plain tensor again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ReadOnlyWeightError

#: Names that look like those of in-place functions and are none.
_HARMLESS = {"requires_grad_", "__invert__", "__index__", "__int__", "__iter__"}


class ReadOnlyTensor(torch.Tensor):
    """A tensor that raises `ReadOnlyWeightError` on every in-place edit; ``.clone()`` gives an editable copy."""

    #: What to tell who tries; set where the tensor is made.
    why: str = "this weight is computed from the model's parameters"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        guarded = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, ReadOnlyTensor)]
        if _edits(func, args, kwargs):
            raise _refusal(guarded, cls)
        versions = [_version(tensor) for tensor in guarded]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if versions != [_version(tensor) for tensor in guarded]:
            # Its name did not tell, as with functional.relu(..., inplace=True). `WeightViews` computes the weight anew.
            raise _refusal(guarded, cls)
        if isinstance(result, np.ndarray):
            result.flags.writeable = False
        return _guard_views(result, guarded[0] if guarded else None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.detach().clone()


def read_only(tensor: Tensor, why: str) -> ReadOnlyTensor:
    """``tensor`` as a read-only alias of itself; ``why`` finishes the sentence 'cannot edit: ...'."""
    guarded = tensor.as_subclass(ReadOnlyTensor)
    guarded.why = why
    return guarded


def _refusal(guarded: list[ReadOnlyTensor], cls: type[ReadOnlyTensor]) -> ReadOnlyWeightError:
    why = guarded[0].why if guarded else cls.why
    return ReadOnlyWeightError(
        f"cannot edit this tensor in place: {why}, so the edit would not reach the model. "
        "Use .clone() to work on a copy."
    )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, with those inside lists and tuples."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _version(tensor: Tensor) -> int | None:
    with torch._C.DisableTorchFunctionSubclass():
        return None if tensor.is_inference() else tensor._version


def _edits(func: Any, args: Any, kwargs: dict) -> bool:
    """Whether a function is known by its name to edit a read-only argument."""
    name = getattr(func, "__name__", "")
    if any(isinstance(target, ReadOnlyTensor) for target in _flat([kwargs.get("out")])):
        return True
    if not (args and isinstance(args[0], ReadOnlyTensor)):
        return False
    if name == "__set__":
        # Assigning to an attribute: .data would swap the values, .grad and .requires_grad would not.
        return getattr(func, "__self__", None) is Tensor.data
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _HARMLESS)
    return name.endswith("_") and name not in _HARMLESS


def _guard_views(result: Any, source: ReadOnlyTensor | None) -> Any:
    """Keep the guard on results that share memory with ``source``, and only on those."""
    if source is None:
        return result
    if isinstance(result, (tuple, list)):
        guarded = [_guard_views(item, source) for item in result]
        return type(result)(*guarded) if hasattr(result, "_fields") else type(result)(guarded)
    if not isinstance(result, Tensor):
        return result
    with torch._C.DisableTorchFunctionSubclass():
        shares = (
            result.layout == torch.strided
            and source.layout == torch.strided
            and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        )
    if shares and result.numel():
        return read_only(result, source.why) if not isinstance(result, ReadOnlyTensor) else result
    return result.as_subclass(Tensor) if isinstance(result, ReadOnlyTensor) else result
