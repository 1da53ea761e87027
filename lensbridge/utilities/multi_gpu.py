"""Which device holds which part of a model?

Two ways exist to spread a model. A config's ``n_devices`` cuts the blocks into that many equal runs, one per GPU. A
HuggingFace ``device_map`` names a device per module and is carried out by accelerate; functions with an ``hf_model``
argument look at the map that such a model carries (``hf_device_map``).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

#: Pairs of a CUDA device's index and its free memory in bytes.
AvailableDeviceMemory = list[tuple[int, int]]

#: How much memory accelerate may use on each device: bytes, or a text such as "10GiB".
MaxMemory = dict[str | int, str | int]

_DeviceMap = str | dict[str, str | int]

#: Why a device_map with CPU and GPU entries is refused.
MIXED_CPU_GPU_ERROR = (
    "device_map names both CPU and GPU devices. accelerate then keeps the CPU part's parameters away from its modules "
    "except during a forward pass, so weights could not be read. Name GPUs only (or use n_devices), or the CPU only."
)


def calculate_available_device_cuda_memory(i: int) -> int:
    """Bytes of CUDA device ``i`` that this process has not allocated."""
    return torch.cuda.get_device_properties(i).total_memory - torch.cuda.memory_allocated(i)


def determine_available_memory_for_available_devices(max_devices: int) -> AvailableDeviceMemory:
    """Index and free memory (bytes) of the first ``max_devices`` CUDA devices."""
    return [(i, calculate_available_device_cuda_memory(i)) for i in range(max_devices)]


def sort_devices_based_on_available_memory(devices: AvailableDeviceMemory) -> AvailableDeviceMemory:
    """The same pairs, most free memory first."""
    return sorted(devices, key=lambda device: -device[1])


def get_best_available_cuda_device(max_devices: int | None = None) -> torch.device:
    """The CUDA device with most free memory, of the first ``max_devices`` (None: of all).

    Raises:
        OSError: there is no CUDA device.
    """
    n_devices = torch.cuda.device_count() if max_devices is None else max_devices
    ranked = sort_devices_based_on_available_memory(determine_available_memory_for_available_devices(n_devices))
    if not ranked:
        raise OSError("A CUDA device was asked for and none is available; choose device='cpu'.")
    return torch.device("cuda", ranked[0][0])


def get_best_available_device(cfg: Any) -> torch.device:
    """The config's device; where that is CUDA and ``n_devices`` is more than 1, the one with most free memory.

    Raises:
        AssertionError: the config has no device.
    """
    device = _device_of(cfg)
    if device.type == "cuda" and cfg.n_devices > 1:
        return get_best_available_cuda_device(cfg.n_devices)
    return device


def _device_of(cfg: Any) -> torch.device:
    if cfg.device is None:
        raise AssertionError("the config's device is None; set cfg.device")
    return torch.device(cfg.device)


def get_device_for_block_index(index: int, cfg: Any, device: torch.device | str | None = None) -> torch.device:
    """The device of block ``index`` when ``cfg.n_layers`` blocks are spread evenly over ``cfg.n_devices`` devices.

    Counting begins at ``device``, or the config's. On the CPU every block is there.

    Raises:
        AssertionError: the config has no device.
    """
    first = _device_of(cfg)
    if device is not None:
        first = torch.device(device)
    if first.type == "cpu":
        return first
    # Multiplied before dividing: exact where the blocks do not split evenly, or are fewer than the devices.
    return torch.device(first.type, (first.index or 0) + index * cfg.n_devices // cfg.n_layers)


def is_mixed_cpu_gpu(values: Iterable[Any]) -> bool:
    """Whether a device map's values name the CPU and also a GPU (an int is a GPU's index)."""
    named = ["cuda" if isinstance(value, int) else str(value).lower() for value in values]
    return "cpu" in named and any(name.startswith("cuda") for name in named)


def _check_device_map(device_map: _DeviceMap) -> None:
    if isinstance(device_map, str):
        return
    for module, target in device_map.items():
        if str(target).lower() == "disk":
            raise ValueError(
                f"device_map[{module!r}] is {target!r}: parameters kept on disk could not be read as weights. Name a "
                "GPU or the CPU."
            )
    if is_mixed_cpu_gpu(device_map.values()):
        raise ValueError(MIXED_CPU_GPU_ERROR)


def _free_cuda_memory(i: int) -> int:
    """Bytes of CUDA device ``i`` that no process has allocated, if the driver tells."""
    try:
        return int(torch.cuda.mem_get_info(i)[0])
    except (AttributeError, RuntimeError):
        return calculate_available_device_cuda_memory(i)


def resolve_device_map(
    n_devices: int | None,
    device_map: _DeviceMap | None,
    device: str | torch.device | None,
    max_memory: MaxMemory | None = None,
) -> tuple[_DeviceMap | None, MaxMemory | None]:
    """The ``(device_map, max_memory)`` to load a HuggingFace model with.

    A ``device_map`` is passed on as it is. Otherwise ``n_devices`` greater than 1 becomes ``"balanced"`` over that many
    GPUs, each with its free memory unless ``max_memory`` says how much; a single device needs no map.

    Raises:
        ValueError: ``device`` is given beside ``device_map``, the map names the disk or mixes CPU and GPU, or there are
            fewer GPUs than ``n_devices``.
    """
    if device_map is not None:
        if device is not None:
            raise ValueError("device and device_map exclude each other; pass one of them.")
        _check_device_map(device_map)
        return device_map, max_memory
    if n_devices is None or n_devices <= 1:
        return None, max_memory
    if not torch.cuda.is_available():
        raise ValueError(f"n_devices={n_devices} requires CUDA, which is not available.")
    if torch.cuda.device_count() < n_devices:
        raise ValueError(f"n_devices={n_devices}, but there are only {torch.cuda.device_count()} CUDA devices.")
    budget = {i: _free_cuda_memory(i) for i in range(n_devices)} if max_memory is None else dict(max_memory)
    return "balanced", budget  # type: ignore[return-value]


def _parameters_in_place(module: nn.Module) -> AbstractContextManager[Any]:
    """Within the block a module that accelerate offloaded has its real parameters."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def cast_floating_params_to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's floating-point parameters to ``dtype``, in place.

    Left alone are parameters without values (meta device) and floats of one byte, which mean nothing without their
    scales. For a model that may be quantized use :func:`maybe_cast_floating_params`.
    """
    for module in model.modules():
        with _parameters_in_place(module):
            for parameter in module.parameters(recurse=False):
                stored_as = parameter.dtype
                if stored_as.is_floating_point and stored_as.itemsize > 1 and not parameter.is_meta:
                    parameter.data = parameter.data.to(dtype)


def maybe_cast_floating_params(model: nn.Module, dtype: torch.dtype) -> None:
    """As :func:`cast_floating_params_to_dtype`, unless the model is quantized: its quantizer chose the dtypes."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method is None:
        cast_floating_params_to_dtype(model, dtype)


def _as_device(target: int | str | torch.device) -> torch.device:
    return torch.device("cuda", target) if isinstance(target, int) else torch.device(target)


def find_embedding_device(hf_model: Any) -> torch.device | None:
    """The device on which a spread-out HuggingFace model expects its tokens; None for a model on one device.

    It is that of the input embedding; where the model does not tell, that of the first entry of its map.
    """
    placement = getattr(hf_model, "hf_device_map", None)
    if not placement:
        return None
    try:
        return next(hf_model.get_input_embeddings().parameters()).device
    except (AttributeError, NotImplementedError, StopIteration, TypeError):
        return _as_device(next(iter(placement.values())))


def count_unique_devices(hf_model: Any) -> int:
    """Number of devices that a HuggingFace model is spread over; 1 for a model without a map."""
    placement = getattr(hf_model, "hf_device_map", None)
    return len(set(placement.values())) if placement else 1


def find_misplaced_modules(hf_model: Any) -> list[tuple[str, str, str]]:
    """``(module, mapped device, actual device)`` where a module's parameters are not where the map puts them.

    It happens to tied parameters that the map sends to two devices. Offloaded modules (meta device) are in order.
    """
    misplaced = []
    for name, target in (getattr(hf_model, "hf_device_map", None) or {}).items():
        try:
            parameter = next(hf_model.get_submodule(name).parameters(), None)
        except AttributeError:
            continue
        if parameter is None or parameter.is_meta:
            continue
        mapped, actual = _as_device(target), parameter.device
        if mapped.type != actual.type or mapped.index not in (None, actual.index):
            misplaced.append((name, str(target), str(actual)))
    return misplaced
