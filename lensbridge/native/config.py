"""How does a HookedTransformerConfig travel as a HuggingFace config?

As one entry of it, with all its fields, so that no field can clash with one that HuggingFace gives a meaning to. Type
and place of the weights are not among them: the first is HuggingFace's ``dtype``, the second belongs to the machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..config import HookedTransformerConfig

#: Fields that are not stored with the others.
ELSEWHERE = ("dtype", "device")
#: What HuggingFace asks a config for -> the field with the answer.
HF_NAMES = {
    "hidden_size": "d_model",
    "head_dim": "d_head",
    "intermediate_size": "d_mlp",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_key_value_heads",
    "max_position_embeddings": "n_ctx",
    "vocab_size": "d_vocab",
}
#: A config without fields has to describe something: HuggingFace makes one to see what the defaults are.
SMALLEST = {"d_model": 8, "d_head": 8, "n_layers": 1, "n_ctx": 8, "d_vocab": 8, "attn_only": True}


class NativeConfig(PreTrainedConfig):
    """The config of a model that is described by a HookedTransformerConfig.

    Args:
        hooked_transformer: the fields of the HookedTransformerConfig, but for ``dtype`` and ``device``.
        kwargs: HuggingFace's own (``dtype``, ``architectures``, ...).
    """

    model_type = "lensbridge-native"

    hooked_transformer: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hooked_transformer is None:
            self.hooked_transformer = dict(SMALLEST)

    @classmethod
    def from_cfg(cls, cfg: HookedTransformerConfig, **kwargs: Any) -> NativeConfig:
        """The config that holds what ``cfg`` says now."""
        return cls(hooked_transformer=fields_of(cfg), dtype=cfg.dtype, **kwargs)

    def to_cfg(self) -> HookedTransformerConfig:
        """A new HookedTransformerConfig with these fields, on the CPU; its seed is noted and not set."""
        fields = dict(self.hooked_transformer or SMALLEST)
        seed = fields.pop("seed", None)
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else torch.float32
        cfg = HookedTransformerConfig.from_dict(fields | {"dtype": dtype, "device": "cpu"})
        cfg.seed = seed
        return cfg

    def __getattr__(self, name: str) -> Any:
        field = HF_NAMES.get(name)
        fields = self.__dict__.get("hooked_transformer")
        if field is None or not fields:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = fields.get(field)
        # Without groups, every head has keys and values of its own.
        return fields.get("n_heads") if value is None and field == "n_key_value_heads" else value


def fields_of(cfg: HookedTransformerConfig) -> dict[str, Any]:
    """The fields of a config as they are stored."""
    names = [field.name for field in dataclasses.fields(cfg) if field.name not in ELSEWHERE]
    return {name: getattr(cfg, name) for name in names}
