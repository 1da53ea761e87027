"""Which families are known, and which record describes a given model?

Every `Architecture` in a module of this package is one: a new family is a new file here, or a record in a relative's.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from ..errors import UnsupportedModelError
from .irregular import REFUSED
from .record import Architecture as Architecture


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

    Raises:
        UnsupportedModelError: if the class has no record, or its config sets something the record refuses.
    """
    for cls in type(hf_model).__mro__:
        if cls.__name__ in BY_CLASS:
            return BY_CLASS[cls.__name__].for_model(hf_model)
    raise unrecorded(type(hf_model).__name__)


def unrecorded(name: str) -> UnsupportedModelError:
    """What to raise for a model of a class or model type without a record."""
    reasons = {each: reason for model_type, (cls, reason) in REFUSED.items() for each in (model_type, cls)}
    if name in reasons:
        return UnsupportedModelError(f"{name} is not supported: {reasons[name]}")
    known = ", ".join(sorted(BY_CLASS))
    return UnsupportedModelError(
        f"no record of the architecture {name}; known: {known}. A family is one data file in lensbridge/architectures "
        "(see CONTRIBUTING.md)."
    )
