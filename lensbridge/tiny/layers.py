"""Which layers of a large model does a small one need, to have one of every kind?

A config says what layer ``i`` is in several ways at once: lists with one entry per layer, lists of layer numbers, a
count of first or last layers, a period. Each is a property of every layer; layers that agree in all of them are of one
kind. The tiny model keeps the first layer of each kind, and every property of the layers it keeps.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

#: Names of the number of layers.
COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"),
    *("decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers"),
)
#: Lists of the numbers of the layers that have something, and the number of the first layer.
NUMBERS = {
    **dict.fromkeys(("cross_attention_layers", "attn_layer_indices", "moe_layers", "mlp_only_layers"), 0),
    **dict.fromkeys(("full_attn_idxs", "hybrid_layer_ids", "local_layer_ids"), 0),
    "ple_layer_ids": 1,
}
#: How many layers, counted from the first, have something (a dense MLP before the mixtures of experts).
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
#: How many layers, counted from the last.
LAST = ("num_kv_shared_layers",)
#: Every how many layers something comes.
PERIODS = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "moe_layer_freq")
#: A list that happens to be as long as a short model has layers speaks of layers only if its name does.
_OF_LAYERS = re.compile(r".*(layer|type|pattern|freq|heads|intermediate_size|sliding|window).*")
_LONG = 8

FEWEST, MOST = 2, 4


def layer_count(config: PreTrainedConfig) -> int | None:
    """How many layers a config states, if it does."""
    values = vars(config)
    stated = next((values[name] for name in COUNTS if isinstance(values.get(name), int)), None)
    return stated if stated is not None else getattr(config, "num_hidden_layers", None)


def choose(config: PreTrainedConfig, fewest: int = FEWEST) -> list[int]:
    """The numbers of the layers to keep, in order: at most four that have every property any layer has."""
    n_layers = layer_count(config) or fewest
    kinds = list(zip(*_properties(vars(config), n_layers), strict=True)) or [()] * n_layers
    chosen = sorted({kind: number for number, kind in reversed(list(enumerate(kinds)))}.values())
    if len(chosen) > MOST:
        chosen = _cover(kinds, chosen)
    spare = (number for number in range(n_layers) if number not in chosen)
    return sorted([*chosen, *itertools.islice(spare, max(fewest - len(chosen), 0))])


def keep(config: PreTrainedConfig, chosen: Sequence[int]) -> dict[str, Any]:
    """The entries of a config that speak of layers, said of the chosen layers alone."""
    values = vars(config)
    n_layers = layer_count(config)
    kept: dict[str, Any] = {name: len(chosen) for name in COUNTS if isinstance(values.get(name), int)}
    if n_layers is None:
        return kept
    for name, value in values.items():
        if name in NUMBERS and isinstance(value, (list, tuple)):
            start = NUMBERS[name]
            kept[name] = type(value)(new + start for new, old in enumerate(chosen) if old + start in value)
        elif name in FIRST and isinstance(value, int):
            kept[name] = sum(number < value for number in chosen)
        elif name in LAST and isinstance(value, int):
            kept[name] = sum(number >= n_layers - value for number in chosen)
        elif name in PERIODS and isinstance(value, int):
            kept[name] = min(value, 2)
        elif _is_per_layer(name, value, n_layers):
            kept[name] = type(value)(value[number] for number in chosen)
    overrides = _overrides(values)
    if overrides:
        kept["per_layer_config"] = {new: overrides[old] for new, old in enumerate(chosen) if old in overrides}
    return kept


def _overrides(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What single layers have instead of the config's own entries (``per_layer_config``), by layer."""
    spec = values.get("_heterogeneity_spec")
    return spec.per_layer_overrides if spec is not None else {}


def _is_per_layer(name: str, value: Any, n_layers: int) -> bool:
    """Whether an entry is a list with one entry per layer."""
    if not isinstance(value, (list, tuple)) or len(value) != n_layers:
        return False
    return n_layers >= _LONG or bool(_OF_LAYERS.fullmatch(name))


def _properties(values: Mapping[str, Any], n_layers: int) -> list[list[Any]]:
    """What a config says of its layers, one list of length ``n_layers`` for each way it says it."""
    numbers = range(n_layers)
    found: list[list[Any]] = []
    for name, value in values.items():
        if name in NUMBERS and isinstance(value, (list, tuple)):
            found.append([number + NUMBERS[name] in value for number in numbers])
        elif name in FIRST and isinstance(value, int):
            found.append([number < value for number in numbers])
        elif name in LAST and isinstance(value, int):
            found.append([number >= n_layers - value for number in numbers])
        elif name in PERIODS and isinstance(value, int) and value > 1:
            found.append([(number + 1) % value == 0 for number in numbers])
        elif _is_per_layer(name, value, n_layers):
            found.append([repr(entry) for entry in value])
    overrides = _overrides(values)
    if overrides:
        found.append([repr(overrides.get(number)) for number in numbers])
    return found


def _cover(kinds: Sequence[tuple[Any, ...]], candidates: list[int]) -> list[int]:
    """At most ``MOST`` of the candidates, chosen so that few pairs of properties are lost."""
    pairs = {number: set(itertools.combinations(enumerate(kinds[number]), 2)) for number in candidates}
    missing = set().union(*pairs.values())
    chosen: list[int] = []
    while len(chosen) < MOST:
        best = max((number for number in candidates if number not in chosen), key=lambda n: len(missing & pairs[n]))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
