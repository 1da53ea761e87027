"""Which other values could an attribute of a config have?

Data and rules: a switch is turned, a number changed, a string replaced by what the code compares it with, an option
that is off is set to something that its name suggests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers.activations import ACT2FN

from ..tiny import sizes

#: A size that no rule gives.
UNUSUAL = 997


def others(name: str, value: Any, texts: Sequence[str]) -> Iterator[Any]:
    """Values of the attribute ``name`` that are not ``value``.

    Args:
        texts: the strings that the code compares it with.
    """
    for other in _candidates(name, value, texts):
        if type(other) is not type(value) or other != value:
            yield other


def _candidates(name: str, value: Any, texts: Sequence[str]) -> Iterator[Any]:
    if name in ("rope_parameters", "rope_scaling"):
        yield from _ropes(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield from ("relu", "silu", "gelu") if value in ACT2FN else texts
    elif isinstance(value, float):
        yield 0.05 if "eps" in name else value * 1.5 if value else 0.3
        if "eps" not in name and value:
            yield 1.0
    elif isinstance(value, int):
        yield from (value * 2, value // 2) if _is_size(name) else dict.fromkeys((value + 1, 0, 1, 2, value * 2))
    elif value is None:
        yield from _of_none(name, texts)
    elif isinstance(value, dict) and value.get("name") in ACT2FN:
        yield from (value | {"name": other} for other in ("relu", "silu") if other != value["name"])
    elif isinstance(value, (list, tuple)):
        yield from (type(value)(each) for each in _lists(name, value, texts))


def _of_none(name: str, texts: Sequence[str]) -> Iterator[Any]:
    """Values of an option that is off."""
    yield from texts
    if "token" in name:
        yield sizes.SPECIAL_TOKEN
    elif _is_size(name):
        size = sizes.size_of(name, UNUSUAL)
        yield size if size != UNUSUAL else sizes.WIDTH // 2
    elif name.endswith(("act", "act_fn", "activation")):
        yield "relu"
    elif name.startswith(("is_", "use_")):
        yield from (True, False)
    elif name == "layer_types":
        yield ["sliding_attention", "full_attention"]
    elif not texts:
        yield from (True, 2, 0.7, 1.5, "silu")


def _is_size(name: str) -> bool:
    """Whether a rule of the tiny configs knows the attribute as a size."""
    return sizes.size_of(name, UNUSUAL) != UNUSUAL or name.endswith(("embedding_size", "proj_dim"))


def _lists(name: str, value: Sequence[Any], texts: Sequence[str]) -> Iterator[list[Any]]:
    yield list(reversed(value))
    if value and all(isinstance(each, str) for each in value):
        yield from ([kind] * len(value) for kind in dict.fromkeys([*value, *texts]))
    elif value and all(isinstance(each, (int, float)) for each in value):
        for factor in (2,) if _is_size(name) else (0, 1, 2):
            yield [type(each)(each * factor) for each in value]
        if not _is_size(name):
            yield [1] * len(value)


def _ropes(value: Any) -> Iterator[Any]:
    """Every way to scale rotary frequencies that transformers knows."""
    if not isinstance(value, dict):
        return
    nested = {name: each for name, each in value.items() if isinstance(each, dict)}
    for name, each in nested.items():
        yield from (value | {name: other} for other in _ropes(each))
    if nested:
        return
    kind, short = value.get("rope_type", "default"), {"original_max_position_embeddings": sizes.ORIGINAL_POSITIONS}
    common = {"rope_theta": 10000.0} | {name: each for name, each in value.items() if name not in ("rope_type", "type")}
    yield common | {"rope_type": "default", "rope_theta": 777.0}
    yield common | {"rope_type": "linear", "factor": 2.0}
    yield common | {"rope_type": "dynamic", "factor": 2.0} | short
    yield common | {"rope_type": "yarn", "factor": 4.0} | short
    yield common | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | short
    yield common | {"rope_type": "proportional", "factor": 2.0}
    yield common | {"rope_type": kind, "partial_rotary_factor": 0.5}
