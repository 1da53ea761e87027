"""What is the smallest config of a family whose model still has every part?

A copy of a config in which sizes are tiny, most layers are left out (one of each kind stays), multipliers act and
nothing is dropped out; what the config says besides, it still says. Entries that a config's class works out from others
are left to the class: only what is changed, or differs from the class's default, is said.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UnknownArgumentError, UnsupportedModelError, near_misses
from . import layers, sizes
from .families import DERIVED, FAMILIES, Family

#: Derived from the sizes of the parts of a head.
_ALWAYS_DERIVED = frozenset({"qk_head_dim"})
#: What embeddings may have as a width of their own, with a projection to the model's.
_EMBEDDING_WIDTHS = ("embedding_size", "input_embedding_size", "output_embedding_size", "word_embed_proj_dim")


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
    family = Family()
    if isinstance(config, str):
        family = FAMILIES.get(config, family)
        base = default_config(config)
    elif isinstance(config, PreTrainedConfig):
        base = config
        family = Family(set=FAMILIES.get(config.model_type, family).set)
    else:
        cls = getattr(config, "config_class", config)
        family = FAMILIES.get(getattr(cls, "model_type", ""), family)
        base = cls(**family.base)
    unknown = [name for name in overrides if not hasattr(base, name)]
    if unknown:
        raise UnknownArgumentError(
            f"{type(base).__name__} has no entry {unknown[0]!r}.{near_misses(unknown[0], base.to_dict())}"
        )
    values = _shrink(base)
    for more in (family.set, overrides):
        _merge(values, more)
    return type(base)(**values)


def default_config(key: str) -> PreTrainedConfig:
    """The full-size config of a ``model_type``, or of a key of `FAMILIES`, with its class's defaults.

    Raises:
        UnsupportedModelError: if transformers has no such ``model_type``.
    """
    model_type = key.partition("@")[0]
    if model_type not in CONFIG_MAPPING or ("@" in key and key not in FAMILIES):
        raise UnsupportedModelError(f"no family {key!r}.{near_misses(key, [*FAMILIES, *CONFIG_MAPPING])}")
    return CONFIG_MAPPING[model_type](**FAMILIES.get(key, Family()).base)


def _shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments from which a config's class makes its tiny copy."""
    values = {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and name not in ("transformers_version", "architectures", "dtype")
    }
    try:
        defaults = vars(type(config)())
    except Exception:  # a class that cannot be built without arguments has no defaults
        defaults = {}
    chosen = layers.keep(values, layers.choose(values))
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = _shrink(value) | {"model_type": value.model_type}
            continue
        if name in _ALWAYS_DERIVED:
            continue
        new = _resize(name, chosen.get(name, value))
        if name in chosen or _differs(new, value) or name not in defaults or _differs(value, defaults[name]):
            tiny[name] = new
    return tiny | _tied_sizes(config)


def _resize(name: str, value: Any) -> Any:
    """One entry of a config at its tiny size, whatever it is made of."""
    if isinstance(value, dict) and name not in ("id2label", "label2id"):
        return {key: _resize(str(key), entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        return type(value)(sizes.size_of(name, entry) for entry in value)
    return sizes.size_of(name, value)


def _tied_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that depend on how two entries of the large config compare."""
    tiny: dict[str, Any] = {}
    values = vars(config)
    width = values.get("hidden_size") or values.get("d_model")
    for name in _EMBEDDING_WIDTHS:
        if values.get(name) is not None:
            tiny[name] = sizes.WIDTH if values[name] == width else sizes.WIDTH // 2
    if values.get("n_inner", 0) is None:
        tiny["n_inner"] = sizes.MLP
    if values.get("kv_lora_rank") is not None:  # latent attention has as many keys as queries
        tiny |= {"num_key_value_heads": sizes.HEADS} if "num_key_value_heads" in values else {}
        if values.get("head_dim") is not None and values["head_dim"] == values.get("qk_rope_head_dim"):
            tiny["head_dim"] = sizes.size_of("qk_rope_head_dim", values["head_dim"])
    if "is_decoder" in values and not config.is_encoder_decoder:
        tiny["is_decoder"] = True
    return tiny


def _differs(left: Any, right: Any) -> bool:
    """Whether two entries are not the same; nested configs count as different."""
    return type(left) is not type(right) or left != right


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Lay ``more`` over ``values``, in place, entry by entry inside nested configs."""
    for name, value in more.items():
        if value is DERIVED:
            values.pop(name, None)
        elif isinstance(value, dict) and isinstance(values.get(name), dict) and "model_type" in values[name]:
            _merge(values[name], value)
        else:
            values[name] = value
