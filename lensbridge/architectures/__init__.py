"""Which families are known, and which record describes a given model?"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from .bloom import BLOOM
from .gemma import GEMMA, GEMMA2, GEMMA3
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .gptj import GPT_NEO, GPTJ
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3
from .olmo import OLMO, OLMO2, OLMO3
from .opt import OPT
from .phi import PHI, PHI3
from .record import Architecture as Architecture

RECORDS = (
    *(GPT2, GPT_NEO, GPTJ, GPT_NEOX, OPT, BLOOM, LLAMA, MISTRAL, QWEN2, QWEN3),
    *(GEMMA, GEMMA2, GEMMA3, PHI, PHI3, OLMO, OLMO2, OLMO3),
)

#: HF class name -> record.
BY_CLASS = {record.hf_class: record for record in RECORDS}


def architecture_of(hf_model: Any) -> Architecture:
    """The record of a loaded HuggingFace model, with the variants its config selects.

    Raises:
        UnsupportedModelError: if the class has no record, or its config sets something the record refuses.
    """
    for cls in type(hf_model).__mro__:
        if cls.__name__ in BY_CLASS:
            return BY_CLASS[cls.__name__].for_model(hf_model)
    known = ", ".join(sorted(BY_CLASS))
    raise UnsupportedModelError(
        f"no record of the architecture {type(hf_model).__name__}; known: {known}. "
        "A family is one data file in lensbridge/architectures (see CONTRIBUTING.md)."
    )
