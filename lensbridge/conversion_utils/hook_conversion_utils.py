"""How is a set of conversions shown to a person?"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def get_weight_conversion_field_set(weights: dict[str, Any]) -> str:
    """One line for each field of a `TensorConversionSet`: its name and where its value comes from."""
    return "".join(f'"{name}" -> {_origin(value)}\n' for name, value in weights.items())


def _origin(value: Any) -> str:
    if isinstance(value, tuple):
        return f'"{value[0]}", {value[1]!r}'
    if not isinstance(value, Tensor):
        return f'"{value}",'
    for number, word in ((0, "zeros"), (1, "ones")):
        if bool((value == number).all()):
            return f'"Tensor filled with {word} of shape {value.shape}",'
    return f'"Tensor of shape {value.shape}",'


def model_info_cfg(cfg: Any) -> None:
    """Print where the parts of a model of this architecture lie in the HuggingFace model.

    Args:
        cfg: with ``original_architecture``, the HuggingFace class.

    Raises:
        UnsupportedModelError: (a ValueError) if there is no record of it.
    """
    from ..architectures import BY_CLASS
    from ..errors import UnsupportedModelError

    record = BY_CLASS.get(cfg.original_architecture)
    if record is None:
        raise UnsupportedModelError(
            f"no record of the architecture {cfg.original_architecture}; known: {', '.join(sorted(BY_CLASS))}"
        )
    print(f"{record.hf_class}:")
    for name, value in _roles(record):
        print(f"  {name:<12} {value}")


def _roles(record: Any) -> list[tuple[str, str]]:
    whole = [(name, getattr(record, name)) for name in ("embed", "pos_embed", "layers", "ln_final", "unembed")]
    names = ("ln1", "q", "k", "v", "qkv", "o", "ln1_post", "ln2", "gate", "mlp_in", "mlp_out", "ln2_post")
    block = [(name, getattr(record.block, name)) for name in names]
    return [*((n, v) for n, v in whole if v), *((n, f"{record.layers}.{{i}}.{v}") for n, v in block if v)]


def model_info(model_name: str) -> None:
    """`model_info_cfg` for a model's name."""
    from ..loading_from_pretrained import get_pretrained_model_config

    model_info_cfg(get_pretrained_model_config(model_name))
