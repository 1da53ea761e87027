"""Of which families are there a record and a tiny model?"""

from __future__ import annotations

from functools import cache

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..architectures import BY_CLASS
from ..errors import UnsupportedModelError
from ..tiny import FAMILIES, tiny_config


def family_class(key: str) -> str:
    """The name of the HuggingFace class of a family of `lensbridge.tiny.FAMILIES`."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key.partition("@")[0]]
    return found if isinstance(found, str) else found[0]


@cache
def refusal(key: str) -> str | None:
    """Why the record of a family refuses its tiny config; None if it does not."""
    try:
        BY_CLASS[family_class(key)].for_config(tiny_config(key))
    except UnsupportedModelError as error:
        return str(error)
    return None


def recorded() -> list[str]:
    """The families whose class has a record, those that it refuses among them."""
    return [key for key in FAMILIES if family_class(key) in BY_CLASS]
