"""How does a weight that is computed from others refuse to be edited?

A derived weight looks like a tensor, and an in-place edit of it would pass without an error and without any effect on the
model. `ReadOnlyTensor` raises there. Views of it (slices, ``.data``, ``.detach()``) stay read-only; anything computed from
it is a plain tensor again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import ReadOnlyWeightError

#: Functions whose names end in "_" without editing their first argument.
_HARMLESS = {"requires_grad_", "retain_grad", "__set__requires_grad", "__torch_function__"}


class ReadOnlyTensor(torch.Tensor):
    """A tensor that raises `ReadOnlyWeightError` on every in-place edit; ``.clone()`` gives an editable copy."""

    #: What to tell who tries; set where the tensor is made.
    why: str = "this weight is computed from the model's parameters"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _edits(func, args, kwargs):
            target = kwargs["out"] if "out" in kwargs else args[0]
            why = getattr(target, "why", cls.why)
            raise ReadOnlyWeightError(
                f"cannot edit this tensor in place: {why}, so the edit would not reach the model. "
                "Use .clone() to work on a copy."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        source = next((a for a in args if isinstance(a, ReadOnlyTensor)), None)
        return _guard_views(result, source)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.detach().clone()


def read_only(tensor: Tensor, why: str) -> ReadOnlyTensor:
    """``tensor`` as a read-only alias of itself; ``why`` finishes the sentence 'cannot edit: ...'."""
    guarded = tensor.as_subclass(ReadOnlyTensor)
    guarded.why = why
    return guarded


def _edits(func: Any, args: Any, kwargs: dict) -> bool:
    name = getattr(func, "__name__", "")
    if isinstance(kwargs.get("out"), ReadOnlyTensor):
        return True
    if not (args and isinstance(args[0], ReadOnlyTensor)):
        return False
    if name == "__setitem__" or (name.startswith("__i") and name.endswith("__") and name != "__invert__" and
                                 name not in ("__index__", "__int__")):
        return True
    if name == "__set__":
        # Assigning to an attribute: .data would swap the values, .grad and .requires_grad would not.
        return getattr(func, "__self__", None) is Tensor.data
    return name.endswith("_") and not name.startswith("__") and name not in _HARMLESS


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
