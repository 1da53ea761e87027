"""Over which devices, or processes, is a model spread when it is loaded?

HuggingFace does the spreading: accelerate by a map of devices, transformers by a plan for tensor parallelism. What is
asked for in TransformerLens' words (``n_devices``) or in HuggingFace's becomes what HuggingFace takes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.distributed.configuration_utils import DistributedConfig

from .errors import UnsupportedModelError
from .utilities.multi_gpu import resolve_device_map

#: What has to be a multiple of the number of processes, in a HF config.
DIVIDED_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class Wished(Protocol):
    """What was asked for besides HuggingFace's arguments."""

    model_name: str
    n_devices: int
    device: str | torch.device | None


def spread(wish: Wished, config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a model is to be spread out; ``kwargs``, HuggingFace's arguments, say over what afterwards.

    Raises:
        ValueError: devices are named in two ways.
        UnsupportedModelError: the model cannot be divided among as many processes.
    """
    settings = _among_processes(kwargs)
    device_map, max_memory = kwargs.pop("device_map", None), kwargs.pop("max_memory", None)
    if settings is not None:
        if device_map is not None or wish.device is not None or wish.n_devices > 1:
            raise ValueError(
                "tensor parallelism excludes device, device_map and n_devices: each process has a device of its own"
            )
        _refuse_undividable(wish.model_name, config, settings)
        kwargs["distributed_config"] = settings
        return True
    if device_map is None:
        device_map, max_memory = resolve_device_map(wish.n_devices, None, wish.device, max_memory)
    elif wish.device is not None:
        raise ValueError("device and device_map exclude each other; pass one of them.")
    placing = {"device_map": device_map, "max_memory": max_memory}
    kwargs |= {name: value for name, value in placing.items() if value is not None}
    return device_map is not None


def _among_processes(kwargs: dict[str, Any]) -> DistributedConfig | None:
    """What was asked for of several processes, taken from ``kwargs``; None where there is one."""
    given, alone = kwargs.pop("distributed_config", None), {}
    for name in ("tp_plan", "tp_size"):
        value = kwargs.pop(name, None)
        if value is not None:
            alone[name] = value
    if given is not None and alone:
        raise ValueError(f"pass distributed_config, or {' and '.join(alone)}, not both")
    if given is None and not alone:
        return None
    if given is None:
        given = DistributedConfig(**alone)
    settings = DistributedConfig.from_dict(given) if isinstance(given, dict) else given
    several = any(getattr(settings, f"{kind}_size") > 1 for kind in ("tp", "ep", "fsdp", "pp"))
    return settings if several else None


def _refuse_undividable(name: str, config: Any, settings: DistributedConfig) -> None:
    """Refuse what transformers would load whole in each process, or fail on at the first run."""
    text, count = config.get_text_config(decoder=True), settings.tp_size or 1
    if count == 1:
        return
    plans = [each.base_model_tp_plan for each in (config, text) if getattr(each, "base_model_tp_plan", None)]
    if not plans and not isinstance(settings.tp_plan, dict):
        raise UnsupportedModelError(
            f"{name!r} cannot be divided among {count} processes: transformers has no tensor parallel plan for "
            f"{config.model_type!r} (base_model_tp_plan), and would load all of it in each. Load it on one device, "
            "over several by device_map, or pass a plan of your own: distributed_config={'tp_plan': {...}}"
        )
    sizes = {size: getattr(text, size, None) for size in DIVIDED_SIZES}
    uneven = {size: value for size, value in sizes.items() if isinstance(value, int) and value % count}
    if uneven:
        found = ", ".join(f"{size} is {value}" for size, value in uneven.items())
        raise UnsupportedModelError(f"{name!r} cannot be divided among {count} processes evenly: its {found}")
