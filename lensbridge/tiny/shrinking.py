"""What is the smallest config of a family whose model still has every part?

A copy of a config in which sizes are tiny, most layers are left out (one of each kind stays), multipliers act and
nothing is dropped out; what the config says besides, it still says. Entries that a config's class works out from others
are left to the class: only what is changed, or differs from the class's default, is said.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UnknownArgumentError, UnsupportedModelError, near_misses
from . import layers, sizes
from .families import DERIVED, FAMILIES, SPECIAL, Family

#: Entries that a tiny random model has no use for, or that its class derives from the sizes of the parts of a head.
_LEFT_OUT = frozenset({"transformers_version", "dtype", "torch_dtype", "quantization_config", "qk_head_dim"})
#: Nested configs that a text never reaches.
_OTHER_MODALITY = re.compile(r".*(vision|image|video|audio|speech|encoder$).*")


def tiny_config(config: PreTrainedConfig | type | str, **overrides: Any) -> PreTrainedConfig:
    """A tiny config of the same family, with every kind of layer.

    Args:
        config: a config, whose options are kept and whose sizes are not; or a config class, a model class, a
            ``model_type``, or a key of `FAMILIES`, for the defaults of that family.
        overrides: entries of the tiny config, last word; a dict changes entries of a nested config.

    Raises:
        UnsupportedModelError: if the name is of no family that transformers has.
        UnknownArgumentError: if an override is no entry of this config.
    """
    if isinstance(config, PreTrainedConfig):
        base, family = config, SPECIAL.get(config.model_type, Family())
    elif isinstance(config, str):
        base, family = default_config(config), _family(config)
    else:
        cls = getattr(config, "config_class", None) or config
        family = SPECIAL.get(getattr(cls, "model_type", ""), Family())
        base = cls(**family.base)
    values = _shrink(base)
    _merge(values, family.set)
    _merge(values, _checked(base, overrides, known={*values, *family.set}))
    return type(base)(**values)


def default_config(key: str) -> PreTrainedConfig:
    """The full-size config of a ``model_type``, or of a key of `FAMILIES`, with its class's defaults.

    Raises:
        UnsupportedModelError: if transformers has no such ``model_type``.
    """
    model_type = key.partition("@")[0]
    if model_type not in CONFIG_MAPPING or ("@" in key and key not in FAMILIES):
        raise UnsupportedModelError(f"no family {key!r}.{near_misses(key, [*FAMILIES, *CONFIG_MAPPING])}")
    return CONFIG_MAPPING[model_type](**_family(key).base)


def _family(key: str) -> Family:
    """What is special about a key of `FAMILIES`, or about any other ``model_type``."""
    return FAMILIES.get(key) or SPECIAL.get(key) or Family()


def _checked(base: PreTrainedConfig, overrides: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The overrides under the names that the config's class stores them by."""
    stored = {base.attribute_map.get(name, name): value for name, value in overrides.items()}
    known = known | set(vars(base))
    for name in stored:
        if name not in known and not hasattr(type(base), name):
            raise UnknownArgumentError(f"{type(base).__name__} has no entry {name!r}.{near_misses(name, known)}")
    return stored


def _shrink(config: PreTrainedConfig, fewest: int = layers.FEWEST) -> dict[str, Any]:
    """The arguments from which a config's class makes its tiny copy."""
    values = {name: value for name, value in vars(config).items() if name[0] != "_" and name not in _LEFT_OUT}
    try:
        defaults = vars(type(config)())
    except Exception:  # whatever a class says that cannot be built without arguments: it has no defaults
        defaults = {}
    chosen = layers.keep(config, layers.choose(config, fewest))
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            one_is_enough = _OTHER_MODALITY.fullmatch(name)
            tiny[name] = _shrink(value, 1 if one_is_enough else layers.FEWEST) | {"model_type": value.model_type}
            _merge(tiny[name], SPECIAL.get(value.model_type, Family()).set)
            continue
        new = sizes.rope(value, config) if name == "rope_parameters" else _resize(name, chosen.get(name, value))
        if name in chosen or _differs(new, value) or name not in defaults or _differs(value, defaults[name]):
            tiny[name] = new
    if "per_layer_config" in chosen:
        tiny["per_layer_config"] = {
            number: {name: _relative(name, value, values.get(name)) for name, value in entries.items()}
            for number, entries in chosen["per_layer_config"].items()
        }
    return tiny | sizes.related(config)


def _resize(name: str, value: Any) -> Any:
    """One entry of a config at its tiny size, whatever it is made of."""
    if isinstance(value, dict) and name not in ("id2label", "label2id"):
        return {key: _resize(str(key), entry) for key, entry in value.items()}
    numbers = isinstance(value, (list, tuple)) and all(type(entry) is int for entry in value)
    if numbers and not name.endswith(sizes.TOKENS):
        ranks = {entry: rank for rank, entry in enumerate(sorted(set(value)))}
        return type(value)(_ranked(name, entry, ranks[entry]) for entry in value)
    return sizes.size_of(name, value)


def _ranked(name: str, value: int, rank: int) -> int:
    """The tiny value of one of several sizes of the same thing, which stay different."""
    size = sizes.size_of(name, value)
    return value if size == value else size * (rank + 1)


def _relative(name: str, value: Any, base: Any) -> Any:
    """The tiny value of what one layer has instead of ``base``: larger if it was, smaller if it was."""
    size = sizes.size_of(name, value)
    if size == value or not isinstance(base, (int, float)):
        return size
    return size * 2 if value > base else max(size // 2, 1)


def _differs(left: Any, right: Any) -> bool:
    """Whether two entries are not the same."""
    return type(left) is not type(right) or left != right


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Lay ``more`` over ``values``, in place, entry by entry inside nested ones."""
    for name, value in more.items():
        if value is DERIVED:
            values.pop(name, None)
        elif isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value
