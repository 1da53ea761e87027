"""How is a model's structure had without its weights?

A family's hook points follow from the modules that its config asks for. So the model is built on PyTorch's meta device,
where tensors have shapes and no values; nothing is downloaded but the config. A class without a record has to be
measured, which takes a run: then the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..architectures import BY_MODEL_TYPE
from ..checking.command import is_family, tiny_copy
from ..checking.hooking import hooked
from ..loading import explaining_where
from ..model import HookedTransformer
from ..model_names import known_names, resolve
from ..native import hub


def structure_of(name: str) -> Any:
    """A hooked model of which points and shapes can be asked; it may have no weights.

    Args:
        name: of a checkpoint or directory, or of a family or a HuggingFace class, of which a tiny random copy is made.

    Raises:
        ModelNotFoundError, UnsupportedModelError: see `HookedTransformer.from_pretrained`.
    """
    if is_family(name) and name not in known_names() and not Path(name).is_dir():
        return hooked(tiny_copy(name), name)
    location = resolve(name)
    if hub.is_own_format(location, {}):
        return HookedTransformer.from_pretrained_no_processing(name, device="cpu")
    with explaining_where(name, location, OSError, ValueError):
        config = AutoConfig.from_pretrained(location)
    if config.model_type not in BY_MODEL_TYPE:
        return HookedTransformer.from_pretrained_no_processing(name, device="cpu")
    for attribute, value in BY_MODEL_TYPE[config.model_type].loaded_with.items():
        setattr(config, attribute, value)
    try:
        return without_weights(config, name)
    except ValueError:
        # Configs of several modalities have parts that no class of language models is built from.
        return HookedTransformer.from_pretrained_no_processing(name, device="cpu")


def without_weights(config: Any, name: str | None = None) -> Any:
    """The hooked model of a config, on the meta device."""
    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return hooked(hf_model.eval(), name)
