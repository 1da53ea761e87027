"""Does a config set something that its model reads, and that nobody has looked at?

The table of the audit (`config_reads.TABLE`) has, for each family, the attributes that its modeling code read when the
record was last held against it. A later transformers may read another. Where a config sets such an attribute to
something else than its class does by itself, the model may compute what the record does not say; that deserves a word,
not a refusal. What no code reads changes nothing, so nothing is said of it.
"""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .architectures import BY_CLASS
from .config_reads import IDLE, TABLE, attributes_read

#: What says nothing of the function, and older names of what the table has under newer ones.
NO_MATTER = re.compile(rf"{IDLE.pattern}|.*_token_ids?|quantization_config|rope_theta|rope_scaling|pretraining_tp")
#: What an attribute is where a config's class does not have it.
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


def warn_of_unaudited(hf_model: Any) -> None:
    """Say which attributes a loaded model's config sets that the audit of its family has not seen."""
    for name, value in unaudited(hf_model).items():
        logging.warning(
            "the config of this %s sets %s=%r. Its code reads that in transformers %s, and lensbridge's record of the "
            "family was written without (%s): hook points may not show what they should. `lensbridge check` with the "
            "model's name says whether they do.",
            type(hf_model).__name__,
            name,
            value,
            transformers.__version__,
            table()["transformers"],
        )


def unaudited(hf_model: Any) -> dict[str, Any]:
    """The attributes that a model's config sets, its code reads, and the audit of its family has not seen."""
    if transformers.__version__ == table()["transformers"] and type(hf_model).__module__.startswith("transformers."):
        return {}
    known = known_attributes(next((cls.__name__ for cls in type(hf_model).__mro__ if cls.__name__ in BY_CLASS), ""))
    if known is None:
        return {}
    new = [name for name in sorted(attributes_read(hf_model) - known) if not NO_MATTER.fullmatch(name)]
    text = hf_model.config.get_text_config(decoder=True)
    nested = [value for value in vars(text).values() if isinstance(value, PreTrainedConfig)]
    return {name: value for config in (text, *nested) for name, value in _set_in(config, new).items()}


def _set_in(config: Any, names: list[str]) -> dict[str, Any]:
    """Those of the attributes that a config sets to something else than its class does."""
    values = {name: _value(config, name) for name in names}
    values = {name: value for name, value in values.items() if value not in OFF and not callable(value)}
    usual = _usual(config) if values else {}
    return {name: value for name, value in values.items() if value != usual.get(name)}


@cache
def table() -> dict[str, Any]:
    """What the audit has found."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@cache
def known_attributes(hf_class: str) -> frozenset[str] | None:
    """The attributes that the code of a class read when it was audited; None if it never was."""
    names = {name for name, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if hf_class in (cls, cls[0])}
    found = [found for key, found in table()["families"].items() if key.partition("@")[0] in names]
    paths = (path for each in found for names in each.values() for path in names.split())
    return frozenset(path.rpartition(".")[2] for path in paths) if found else None


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # what differs by layer
        return None


def _usual(config: Any) -> dict[str, Any]:
    """What the config's class sets by itself."""
    try:
        return {**vars(type(config)), **vars(type(config)())}
    except Exception:  # a class that cannot be made without arguments
        return dict(vars(type(config)))
