"""Which layers of a large model does a small one need, to have one of every kind?

A config says what layer ``i`` is in several ways at once: lists with one entry per layer, lists of layer numbers, a
count of first or last layers. Each is a property of every layer; layers that agree in all of them are of one kind. The
tiny model keeps the first layer of each kind, and every property of the layers it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Names of the number of layers.
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_blocks",
    "depth",
)
#: Lists of the numbers of the layers that have something.
NUMBERS = (
    *("cross_attention_layers", "attn_layer_indices", "moe_layers", "mlp_only_layers", "full_attn_idxs"),
    *("hybrid_layer_ids", "ple_layer_ids", "local_layer_ids", "dense_layers"),
)
#: How many layers, counted from the first, have something (a dense MLP before the mixtures of experts).
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
#: How many layers, counted from the last.
LAST = ("num_kv_shared_layers",)
#: Every how many layers something comes.
PERIODS = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "moe_layer_freq")

FEWEST, MOST = 2, 4


def layer_count(values: Mapping[str, Any]) -> int | None:
    """The number of layers that a config's entries state."""
    return next((values[name] for name in COUNTS if isinstance(values.get(name), int)), None)


def choose(values: Mapping[str, Any]) -> list[int]:
    """The numbers of the layers to keep, in order: two to four that have every property any layer has."""
    n_layers = layer_count(values) or FEWEST
    kinds = list(zip(*_properties(values, n_layers), strict=True)) or [()] * n_layers
    first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    if len(chosen) > MOST:
        chosen = _cover(kinds, chosen)
    for number in range(n_layers):
        if len(chosen) >= min(FEWEST, n_layers):
            break
        if number not in chosen:
            chosen.append(number)
    return sorted(chosen)


def keep(values: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """The entries of a config that speak of layers, said of the chosen layers alone."""
    n_layers = layer_count(values)
    kept: dict[str, Any] = {name: len(chosen) for name in COUNTS if isinstance(values.get(name), int)}
    if n_layers is None:
        return kept
    for name, value in values.items():
        if name in NUMBERS and isinstance(value, (list, tuple)):
            kept[name] = type(value)(new for new, old in enumerate(chosen) if old in value)
        elif name in FIRST and isinstance(value, int):
            kept[name] = sum(number < value for number in chosen)
        elif name in LAST and isinstance(value, int):
            kept[name] = sum(number >= n_layers - value for number in chosen)
        elif name in PERIODS and isinstance(value, int):
            kept[name] = min(value, 2)
        elif _per_layer(value, n_layers):
            kept[name] = type(value)(value[number] for number in chosen)
    return kept


def _per_layer(value: Any, n_layers: int) -> bool:
    """Whether a list has one entry per layer."""
    return isinstance(value, (list, tuple)) and n_layers > FEWEST and len(value) == n_layers


def _properties(values: Mapping[str, Any], n_layers: int) -> list[list[Any]]:
    """What a config says of its layers, one list of length ``n_layers`` for each way it says it."""
    found: list[list[Any]] = []
    for name, value in values.items():
        if name in NUMBERS and isinstance(value, (list, tuple)):
            found.append([number in value for number in range(n_layers)])
        elif name in FIRST and isinstance(value, int):
            found.append([number < value for number in range(n_layers)])
        elif name in LAST and isinstance(value, int):
            found.append([number >= n_layers - value for number in range(n_layers)])
        elif name in PERIODS and isinstance(value, int) and value > 1:
            found.append([(number + 1) % value == 0 for number in range(n_layers)])
        elif _per_layer(value, n_layers):
            found.append([repr(entry) for entry in value])
    return found


def _cover(kinds: Sequence[tuple[Any, ...]], candidates: list[int]) -> list[int]:
    """At most ``MOST`` of the candidates that together have as many different properties as possible."""
    missing = {pair for kind in kinds for pair in enumerate(kind)}
    chosen: list[int] = []
    while candidates and len(chosen) < MOST:
        best = max(candidates, key=lambda number: len(missing & set(enumerate(kinds[number]))))
        chosen.append(best)
        candidates = [number for number in candidates if number != best]
        missing -= set(enumerate(kinds[best]))
    return chosen
