"""Which families are known, and which record describes a given model?"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from .gpt2 import GPT2
from .record import Architecture as Architecture

#: HF class name -> record.
BY_CLASS = {record.hf_class: record for record in (GPT2,)}


def architecture_of(hf_model: Any) -> Architecture:
    """The record of a loaded HuggingFace model, with the variants its config selects.

    Raises:
        UnsupportedModelError: if the class has no record, or its config sets something the record refuses.
    """
    for cls in type(hf_model).__mro__:
        if cls.__name__ in BY_CLASS:
            return BY_CLASS[cls.__name__].for_config(hf_model.config)
    known = ", ".join(sorted(BY_CLASS))
    raise UnsupportedModelError(
        f"no record of the architecture {type(hf_model).__name__}; known: {known}. "
        "A family is one data file in lensbridge/architectures (see CONTRIBUTING.md)."
    )
