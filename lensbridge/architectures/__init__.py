"""Which families are known, and which record describes a given model?

Every `Architecture` in a module of this package is one: a new family is a new file here, or a record in a relative's.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module
from typing import Any

from ..errors import UnsupportedModelError
from .irregular import REFUSED
from .record import Architecture as Architecture
from .record import holds


def _recorded() -> tuple[Architecture, ...]:
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    values = [value for module in modules for value in vars(module).values()]
    # A record that another module builds on is found there, too.
    return tuple({value.hf_class: value for value in values if isinstance(value, Architecture)}.values())


RECORDS = _recorded()

#: HF class name -> record.
BY_CLASS = {record.hf_class: record for record in RECORDS}

#: What HF configs call the families -> record.
BY_MODEL_TYPE = {name: record for record in RECORDS for name in (record.model_type, *record.also)}


def architecture_of(hf_model: Any) -> Architecture:
    """The record of a loaded HuggingFace model, with the variants its config selects and the kinds of its layers.

    Where its class has none, one is measured (`measuring`). A model of several modalities is one of a text here, and
    has what its language model's family says of the config.

    Raises:
        UnsupportedModelError: if the config sets something that the record refuses, or if there is no record, and the
            model is not built in a way that one could describe.
    """
    for cls in type(hf_model).__mro__:
        if cls.__name__ in BY_CLASS:
            return BY_CLASS[cls.__name__].for_model(hf_model)
    refuse(type(hf_model).__name__)
    # Measuring needs the whole package.
    from ..measuring import measured_record

    record, family = measured_record(hf_model), text_family(hf_model.config)
    if family is None:
        return record
    _refuse_other_attention(family, hf_model.config)
    return replace(record, constants={**family.constants, **record.constants})


def text_family(hf_config: Any) -> Architecture | None:
    """The record of the family that a model of several modalities has its language model from; None of any other."""
    text_config = hf_config.get_text_config(decoder=True)
    return None if text_config is hf_config else BY_MODEL_TYPE.get(text_config.model_type)


def _refuse_other_attention(family: Architecture, hf_config: Any) -> None:
    """Refuse what the family of a language model refuses, unless it runs with the attention that shows patterns.

    Raises:
        UnsupportedModelError: with the reason.
    """
    text_config = hf_config.get_text_config(decoder=True)
    for condition, reason in family.refused.items():
        if holds(text_config, condition) and text_config._attn_implementation != "eager":
            raise UnsupportedModelError(
                f"{hf_config.model_type} with {condition} is only supported with eager attention (load it with "
                f"attn_implementation='eager'): {reason}"
            )


def refuse(name: str) -> None:
    """Refuse a class or model type of which it is known that no record could describe it.

    Raises:
        UnsupportedModelError: with the reason.
    """
    reasons = {each: reason for model_type, (cls, reason) in REFUSED.items() for each in (model_type, cls)}
    if name in reasons:
        raise UnsupportedModelError(f"{name} is not supported: {reasons[name]}")
