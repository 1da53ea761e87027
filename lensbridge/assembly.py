"""What is a hooked model made of, given what it is to be built from?

Either a HuggingFace model that was loaded: then its modules are components that carry hook points and show views of it.
Or a model of our own, made from the config alone or loaded from where one was saved: then its modules are the
facade's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .blocks import components_of
from .config import HookedTransformerConfig
from .errors import UnsupportedModelError
from .interior import Interior
from .loading import Loaded, find_tokenizer
from .native.interior import NativeInterior
from .native.model import NativeForCausalLM


class Assembled(NamedTuple):
    """What the parts share, and the modules of the facade by name."""

    interior: Interior | NativeInterior
    modules: dict[str, nn.Module | None]


def assembled(loaded: Loaded | None, cfg: HookedTransformerConfig) -> Assembled:
    """The parts of a loaded model, or with None those of a new one of this config.

    Raises:
        UnsupportedModelError: a new model that is to be spread over devices.
        AssertionError, ValueError: no model can be made from the config (`NativeBody.build`).
    """
    if loaded is not None and loaded.architecture is not None:
        interior = Interior.of(loaded.hf_model, loaded.architecture, cfg, loaded.service)
        return Assembled(interior, components_of(interior))
    if loaded is None and cfg.n_devices > 1:
        raise UnsupportedModelError(
            f"n_devices={cfg.n_devices}: a model made from a config is on one device; set cfg.n_devices = 1"
        )
    hf_model = NativeForCausalLM.from_cfg(cfg) if loaded is None else loaded.hf_model
    # The very dict, so that a module put in another's place on the facade is the one that runs.
    return Assembled(NativeInterior.of(hf_model), hf_model._modules)


def tokenizer_for(loaded: Loaded | None, given: Any, cfg: HookedTransformerConfig) -> Any:
    """The tokenizer that was given; for a new model also one of that name, or of the name in its config.

    Raises:
        ModelNotFoundError: (an OSError) the name leads to none.
    """
    name = cfg.tokenizer_name if given is None else given
    if loaded is None and isinstance(name, str):
        return find_tokenizer(name, cfg, {})
    return given
