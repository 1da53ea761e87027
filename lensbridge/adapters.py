"""Which matrix does a layer multiply with that an adapter was put on?

LoRA (Hu et al. 2021) adds a product of two narrow matrices to what a layer computes, so that the layer still multiplies
with one matrix, the sum. It is computed from what peft's layers are set to at the moment: which adapters are active,
merged or disabled, and their scales. Other adapters change what a layer does in other ways and are refused while they
are active; merged or disabled, they leave a plain layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from inspect import getmro
from typing import Any

import torch
from torch import Tensor

from .computed import Computed
from .errors import UnsupportedModelError


def inside(module: Any) -> Any:
    """The layer that runs: peft may keep a trained copy of one beside it and call that, and adapters may be off."""
    while True:
        cls: Any = module.__class__
        copies = module._modules.get("modules_to_save")
        if copies is not None and "original_module" in module._modules:
            active = [] if module.disable_adapters else [name for name in module.active_adapters if name in copies]
            module = copies[active[0]] if active else module.original_module
        elif is_adapted(cls) and not _active(module):
            module = base_of(module)
        else:
            return module


def base_of(module: Any) -> Any:
    """The layer that adapters were put on."""
    return (module if hasattr(module, "base_layer") else module.token_adapter).base_layer


@lru_cache(maxsize=512)
def is_adapted(cls: Any) -> bool:
    """Whether a class is one of peft's layers that hold another."""
    names = {each.__name__ for each in getmro(cls) if each.__module__.startswith("peft.")}
    return not names.isdisjoint({"BaseTunerLayer", "TrainableTokensWrapper"})


def of_adapted(module: Any, base: Any, below: Computed | None, dtype: torch.dtype | None) -> Computed:
    """What a layer with active adapters multiplies with.

    Its ``weight`` raises an `UnsupportedModelError` where that is not known of the adapters.

    Args:
        base: the layer itself, and ``below`` what that multiplies with, if it is computed.
    """
    base, active = inside(base), _active(module)

    def plain() -> Tensor:
        if below is not None:
            return below.weight
        return base.weight.T if base.__class__.__name__ == "Conv1D" else base.weight

    stored = (base.weight,) if below is None else below.sources
    whole = Computed(
        shape=(plain().shape[0], plain().shape[1]) if below is None else below.shape,
        dtype=dtype or torch.float32,
        make=_refuse(f"with the adapters {', '.join(map(repr, active))} ({module.__class__.__module__})"),
        why=f"peft adds the adapters {', '.join(map(repr, active))} to the layer's own",
        sources=(*stored, *module.parameters()),
        state=(module.__class__, tuple(active), tuple(getattr(module, "merged_adapters", ()))),
        bias=getattr(base, "bias", None) if below is None else below.bias,
        made_bias=below is not None and below.made_bias,
    )
    if hasattr(module, "token_adapter"):
        return replace(whole, make=lambda: module.token_adapter.get_merged_weights(active)).with_bias_in(dtype)
    if getattr(module, "parameter_name", None) == "weight":
        return _with_parameter(module, whole, plain, active).with_bias_in(dtype)
    return (_with_lora(module, whole, plain, active) if _is_lora(module) else whole).with_bias_in(dtype)


def _with_parameter(module: Any, whole: Computed, plain: Callable[[], Tensor], active: list[str]) -> Computed:
    """The same where LoRA is on a parameter instead of a layer, as on that of a router of experts."""

    def merged() -> Tensor:
        total = plain()
        for name in active:
            total = total + module.get_delta_weight(name).to(total.dtype)
        return total

    scales = tuple(float(module.scaling[name]) for name in active)
    return whole if module.lora_variant else replace(whole, make=merged, state=(whole.state, scales))


def _with_lora(module: Any, whole: Computed, plain: Callable[[], Tensor], active: list[str]) -> Computed:
    """The same with what LoRA adds."""
    pairs = [_pair(module, name) for name in active]
    scales = [float(module.scaling[name]) for name in active]
    odd = [name for name in active if name in module.lora_variant]

    def merged() -> Tensor:
        total = plain()
        for (down, up), scale in zip(pairs, scales, strict=True):
            total = total + (_product(module, down, up) * scale).to(torch.promote_types(total.dtype, down.dtype))
        return total

    biases = [
        getattr(module.lora_B[name], "bias", None) if name in list(module.lora_B.keys()) else None for name in active
    ]
    shifts = [bias * scale for bias, scale in zip(biases, scales, strict=True) if bias is not None]
    bias = whole.bias
    if shifts:
        bias = sum(shifts, start=torch.zeros_like(shifts[0]) if bias is None else bias)
    return replace(
        whole,
        make=merged if not odd else _refuse(f"with a variant of LoRA (DoRA, say) in the adapters {', '.join(odd)}"),
        state=(whole.state, tuple(scales)),
        bias=bias,
        made_bias=whole.made_bias or bool(shifts),
    )


def _is_lora(module: Any) -> bool:
    names = {cls.__name__ for cls in module.__class__.__mro__ if cls.__module__.startswith("peft.tuners.lora.")}
    return "LoraLayer" in names and names.isdisjoint({"ParamWrapper", "MultiheadAttention", "_ConvNd"})


def _active(module: Any) -> list[str]:
    """The adapters whose parts run beside the layer itself."""
    if module.disable_adapters or getattr(module, "merged", False):
        return []
    there = module._get_available_adapters()
    return [name for name in module.active_adapters if name in there]


def _pair(module: Any, name: str) -> tuple[Tensor, Tensor]:
    """The matrices to the narrow width, ``[r, in]``, and from it, ``[out, r]``."""
    if name in list(module.lora_embedding_A.keys()):
        return module.lora_embedding_A[name], module.lora_embedding_B[name]
    return module.lora_A[name].weight, module.lora_B[name].weight


def _product(module: Any, down: Tensor, up: Tensor) -> Tensor:
    """What an adapter adds before its scale: ``[out, in]``, or for an embedding ``[rows, width]``."""
    wide = torch.float32 if down.dtype in (torch.float16, torch.bfloat16) else down.dtype
    product = up.to(wide) @ down.to(wide)
    return product.T if module.lora_embedding_A else product


def _refuse(what: str) -> Callable[[], Tensor]:
    def refuse() -> Tensor:
        raise UnsupportedModelError(
            f"the weights of a layer {what} are not shown: what it does is not one matrix that is known here. "
            "Activations are right: load with from_pretrained_no_processing to read and edit these. For the weights, "
            "merge the adapters (merge_and_unload() or merge_adapter() of peft's model), or disable them"
        )

    return refuse
