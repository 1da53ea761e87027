"""How is a tiny config made into a model?"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .rough import roughen
from .shrinking import tiny_config
from .sizes import VOCABULARY


def tiny_model(
    config: PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
    seed: int = 0,
    attn_implementation: str = "eager",
) -> PreTrainedModel:
    """A model with rough random weights, in eval mode and float32; the caller's random state is left alone.

    Args:
        config: of any size, but made for `tiny_config`'s.
        model_class: transformers' causal-LM class of the config if not given.
        seed: the same seed gives the same weights.
        attn_implementation: a class that has only its own way of attention is built with that.

    Raises:
        UnsupportedModelError: if no causal-LM class is known for the config.
    """
    cls = model_class or causal_lm_class(config)
    config = copy.deepcopy(_config_for(cls, config))  # a model writes into its config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = cls._from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
        except ValueError as error:
            if "attn_implementation" not in str(error) and "attention implementation" not in str(error):
                raise
            model = cls._from_config(config, dtype=torch.float32)
    model = model.float().eval()
    roughen(model, seed)
    return model


def tiny_family(key: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of one key of `FAMILIES`.

    Raises:
        UnsupportedModelError: if there is no such family.
    """
    return tiny_model(tiny_config(key), seed=seed)


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token numbers of shape (batch, length) that any tiny model takes, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY - 8, (batch, length), generator=generator)


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal-LM class for a config.

    Raises:
        UnsupportedModelError: if it has none.
    """
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        for name in config.architectures or ():
            found = getattr(transformers, name, None)
            if found is not None:
                break
    if found is None:
        raise UnsupportedModelError(
            f"transformers has no causal language model for {type(config).__name__}; give the class (model_class=...)."
        )
    return found[0] if isinstance(found, tuple) else found


def _config_for(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The config itself, or the part of it that the class is built from."""
    wanted: Any = cls.config_class
    if isinstance(config, wanted):
        return config
    nested = [value for value in vars(config).values() if isinstance(value, wanted)]
    return nested[0] if nested else config.get_text_config(decoder=True)
