"""How is a HuggingFace model hooked that has no checkpoint and no tokenizer?"""

from __future__ import annotations

from typing import Any

from .. import loading
from ..model import HookedTransformer


def hooked(hf_model: Any, name: str | None = None, cls: type[HookedTransformer] = HookedTransformer) -> Any:
    """`HookedTransformer.from_pretrained_no_processing` of a loaded model, without looking for a tokenizer.

    Args:
        name: what the config calls the model; its model type if not given.
        cls: the class to make.

    Raises:
        UnsupportedModelError: there is no record of its architecture, or the record refuses it.
    """
    loaded = loading.load(loading.Wish(name or hf_model.config.model_type, hf_model=hf_model))
    with loading.building(loaded):
        return cls(loaded.cfg, None, move_to_device=False)
