"""What are the values of a parameter that its module holds only in part, or not at all?

accelerate leaves meta tensors in modules whose parameters it keeps in main memory or on disk, and fetches the values
for the time of a call; tensor parallelism leaves each process a part of them. Who reads a weight is given a stand-in
for the module, whose parameters are whole: copies, which nobody can edit the model through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

from .errors import UnsupportedModelError

DIVIDED = "each process holds a part of it (tensor parallelism), and this is a copy put together from all of them"
FETCHED = "the model is elsewhere, and this is a copy of its weight"
OFFLOADED = "accelerate keeps it outside of the model between runs (offload), and this is a copy"


def is_divided(tensor: Any) -> bool:
    """Whether a tensor is one process's part of a larger one (a ``DTensor``)."""
    return isinstance(tensor, Tensor) and hasattr(type(tensor), "full_tensor")


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a parameter's values are not all to be had from itself."""
    return tensor.is_meta or is_divided(tensor)


def why_a_copy(original: Tensor) -> str:
    """Why what stands for a parameter is a copy; finishes the sentence 'it is no parameter of the model: ...'."""
    if hasattr(original, "fetched"):
        return FETCHED
    return DIVIDED if is_divided(original) else OFFLOADED


def is_fetched(hf_model: nn.Module) -> bool:
    """Whether another machine has a model's weights."""
    return hasattr(next(hf_model.parameters(), None), "fetched")


def is_spread(hf_model: nn.Module) -> bool:
    """Whether some parameters of a model may have to be fetched or put together before they can be read."""
    state = hf_model.__dict__
    if "_hf_hook" in state or state.get("_device_mesh") is not None:
        return True
    first = next(hf_model.parameters(), None)
    return first is not None and is_elsewhere(first)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or where accelerate brings them for the time of a call."""
    first = next(module.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in _alignments(part):
            if hook.execution_device is not None:
                device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cpu") if first is None else first.device


def home_of(hf_model: Any) -> torch.device:
    """Where a model's tokens go, and its logits come from: the device of its embedding."""
    if getattr(hf_model, "hf_device_map", None):
        try:
            return device_of(hf_model.get_input_embeddings())
        except (AttributeError, NotImplementedError):
            pass
    return device_of(hf_model)


def is_offloaded(hf_model: nn.Module) -> bool:
    """Whether accelerate keeps some of a model's parameters outside of its modules."""
    return any(hook.offload for module in hf_model.modules() for hook in _alignments(module))


def is_shared_out(hf_model: nn.Module) -> bool:
    """Whether several processes hold a model together (tensor parallelism)."""
    mesh = getattr(hf_model, "_device_mesh", None)
    return mesh is not None and mesh.size() > 1


def refuse_to_move(hf_model: Any, device: str | torch.device | None) -> None:
    """Refuse to move a model that is in several places, or to cast (``device`` None) one that is offloaded.

    Raises:
        UnsupportedModelError: what would be moved apart belongs together.
    """
    if is_offloaded(hf_model):
        raise UnsupportedModelError(
            "accelerate keeps some of this model's parameters outside of it (offload), where they can be neither moved "
            "nor cast: load it again with another device_map, or dtype"
        )
    if device is None:
        return
    places = set((getattr(hf_model, "hf_device_map", None) or {}).values())
    if len(places) > 1 or is_shared_out(hf_model):
        where = "several processes" if is_shared_out(hf_model) else "the devices " + ", ".join(map(str, places))
        raise UnsupportedModelError(
            f"this model is spread over {where}, and is not moved to {str(device)!r}: load it again with device="
        )


def _alignments(module: nn.Module) -> Iterator[Any]:
    """The hooks by which accelerate brings a module's tensors together."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", () if hook is None else (hook,)):
        if hasattr(each, "execution_device"):
            yield each


class Reading:
    """A time in which each parameter is fetched once, or only looked at for its shape."""

    def __init__(self, shapes_only: bool) -> None:
        self.shapes_only = shapes_only
        #: The parameters that were looked at for their shapes.
        self.looked_at: list[Tensor] = []
        self._copies: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def whole(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """What stands for a parameter (or buffer) of a module."""
        if self.shapes_only:
            self.looked_at.append(tensor)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        key = (id(module), name)
        if key not in self._copies:
            self._copies[key] = _copy(module, name, tensor), tensor
        return self._copies[key][0]

    def bring(self, branches: object) -> None:
        """Fetch from the machine that has them the values of what was looked at in order to make these."""
        if self.looked_at:
            first: Any = self.looked_at[0]
            first.fetched.bring(self.looked_at)

    def note_copies(self, weights: dict[str, Tensor], made: dict[str, str], sources: dict[str, Tensor]) -> None:
        """Say of weights (by name) that are views of copies why they are no parameters, and what they are of."""
        for name, weight in weights.items():
            found = None if name in made else self._original_of(weight)
            if found is not None:
                sources[name], original = found
                made[name] = why_a_copy(original)

    def _original_of(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """(the copy that a weight is a view of, the parameter that this stands for), if it is one."""
        place = weight.untyped_storage().data_ptr()
        copies = (pair for pair in self._copies.values() if pair[0] is not pair[1])
        return next((pair for pair in copies if pair[0].untyped_storage().data_ptr() == place), None)


_READING: ContextVar[Reading | None] = ContextVar("lensbridge_reading", default=None)


@contextmanager
def reading(shapes_only: bool = False) -> Iterator[Reading]:
    """The time of a `Reading`; one inside another is the outer one, if that wants no more than shapes."""
    outer = _READING.get()
    now = outer if outer is not None and outer.shapes_only else Reading(shapes_only)
    token = _READING.set(now)
    try:
        yield now
    finally:
        _READING.reset(token)


def _copy(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter's whole values, on the graph if it can have gradients."""
    with torch.inference_mode(False):
        divided: Any = tensor
        copy: Any = _Whole.apply(divided.full_tensor()) if is_divided(tensor) else _fetched(module, name, tensor)
    if copy is not tensor:
        copy.stands_for = tensor
    return copy


class _Whole(torch.autograd.Function):
    """The same value, with zeros where there is no gradient: a DTensor's redistribution cannot do without one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def _fetched(module: nn.Module, name: str, tensor: Any) -> Tensor:
    if hasattr(tensor, "fetched"):
        return tensor.fetched.get(tensor)
    for hook in _alignments(module):
        if hook.weights_map is not None:
            value = hook.weights_map[name]
            # What accelerate keeps in main memory is not handed out itself: nobody can tell whether it is used again.
            fetched = value.detach().to(device_of(module), tensor.dtype)
            return fetched.clone() if fetched.data_ptr() == value.data_ptr() else fetched
    return tensor


def style_of(hf_model: Any, path: str) -> str | None:
    """How tensor parallelism divides a module; None where it does not."""
    if not is_shared_out(hf_model) or not path:
        return None
    return hf_model.tp_plan.get(replace_layer_number_by_wildcard(path))


def counted_once(hf_model: Any, path: str, parameter: Tensor) -> Tensor:
    """A parameter for use on whole values where the gradients of all processes are added up.

    It is so in norms over heads under tensor parallelism: each process has the heads that it has.
    """
    if style_of(hf_model, path) != "replicated_with_grad_allreduce":
        return parameter
    return _Share.apply(parameter, hf_model._tp_size)


class _Share(torch.autograd.Function):
    """The same value, with a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] / ctx.processes, None


class StandIn:
    """A module of which each parameter reads as a whole; everything else is the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.__dict__["_module"] = module

    @property
    def __class__(self) -> Any:
        return type(self._module)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("what stands for a module is not to be changed")

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__["_module"]
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            return stand_in(value)
        if isinstance(value, Tensor) and is_elsewhere(value):
            now = _READING.get() or Reading(shapes_only=False)
            return now.whole(module, name, value)
        return value

    def __iter__(self) -> Iterator[Any]:
        return (stand_in(part) for part in self._module)

    def __getitem__(self, index: int) -> Any:
        return stand_in(self._module[index])

    def __len__(self) -> int:
        return len(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Its own parameters, whole."""
        return ((name, getattr(self, name)) for name, _ in self._module.named_parameters(recurse=False))

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Its own buffers, whole."""
        return ((name, getattr(self, name)) for name, _ in self._module.named_buffers(recurse=False))


def stand_in(module: nn.Module) -> Any:
    """The module, or what stands for it if it holds a parameter or buffer in part or not at all."""
    tensors = [*module.parameters(), *module.buffers()]
    return StandIn(module) if any(is_elsewhere(tensor) for tensor in tensors) else module


def itself(module: Any) -> Any:
    """The module that something stands for."""
    return module.__dict__.get("_module", module) if type(module) is StandIn else module
