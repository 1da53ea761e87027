"""How can a model be on several devices where there is one?

A `Boxed` tensor is a CPU tensor that says it is on a device "box:0", "box:1", ...: torch's device for backends that are
written in Python. What is computed are real values, on the CPU; an operation on tensors of several boxes raises, as
it does on a machine with GPUs, and ``.to`` moves. There is no autograd across boxes.

torch is not the same afterwards, so this is for processes of their own (`several_devices_worker.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_aten = torch.ops.aten
#: What copies between devices.
COPIES = {_aten.copy_.default}
#: What takes indices from the CPU.
INDEXES = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class Boxed(Tensor):
    """A tensor in a box."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Any:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def as_subclass(self, cls: Any) -> Any:
        """Itself: a tensor that Python has made cannot be of two classes."""
        return self

    def untyped_storage(self) -> Any:
        """Where the values are."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        """Where the values begin."""
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def unboxed(tensor: Tensor) -> Tensor:
    """The CPU tensor that holds the values."""
    return tensor.inner if isinstance(tensor, Boxed) else tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the device of its tensors."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    indices = {id(leaf) for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)} if func in INDEXES else set()
    there = _device_of(func, tensors, indices)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    inside = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Boxed)}
    if asked is not None:
        there, kwargs = asked, {**kwargs, "device": torch.device("cpu")}

    def boxed(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Boxed):
            return value
        if asked is None and id(value) in inside:
            # An edit in place returns what it was given.
            return inside[id(value)]
        return value if there.type == "cpu" else Boxed(value, there)

    bare = tree_map(lambda leaf: unboxed(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    if func is _aten.histc.default:
        # A CPU counts floats only, and HuggingFace's experts ask of what kind the device is.
        return boxed(func(bare[0][0].float(), *bare[0][1:], **bare[1]).to(bare[0][0].dtype))
    return tree_map(boxed, func(*bare[0], **bare[1]))


def _device_of(func: Any, tensors: list[Tensor], indices: set[int]) -> torch.device:
    """The one device of an operation's tensors; scalars may come from anywhere."""
    places = {tensor.device for tensor in tensors if tensor.dim() and id(tensor) not in indices}
    if len(places) > 1 and func not in COPIES:
        raise RuntimeError(f"{func} was given tensors on {sorted(map(str, places))}")
    for tensor in tensors:
        if id(tensor) in indices and tensor.device.type != "cpu" and tensor.device not in places:
            raise RuntimeError(f"{func} was given indices on {tensor.device} for a tensor on {places}")
    scalars = (tensor.device for tensor in tensors if isinstance(tensor, Boxed))
    return next(iter(places), None) or next(scalars, torch.device("cpu")) if func not in COPIES else tensors[0].device


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Tensors are made from Python's numbers on the CPU, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def boxes() -> Iterator[None]:
    """The time in which there are boxes."""
    _setup_privateuseone_for_python_backend("box")
    with _Operations(), _FromData(), torch.no_grad():
        yield
