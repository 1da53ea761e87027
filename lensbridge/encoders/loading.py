"""How does a model name, a directory or a loaded HF model become an encoder to hook?

HuggingFace loads; nothing is converted or copied. Of the classes that a hooked encoder runs on, a checkpoint is loaded
as the first that it has all weights for, so that no head is made up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from .. import model_names
from ..config import HookedTransformerConfig
from ..errors import UnknownArgumentError, UnsupportedModelError
from ..loading import DTYPE_FROM_STRING, HF_ARGUMENTS, HUB_ARGUMENTS, explaining_where
from ..utilities.devices import get_device
from .bert import BERT
from .hubert import HUBERT
from .record import Family
from .t5 import GATED_T5, T5

#: HF class -> family.
FAMILIES: Mapping[str, Family] = {
    "BertForPreTraining": BERT,
    "BertForMaskedLM": BERT,
    "BertForNextSentencePrediction": BERT,
    "T5ForConditionalGeneration": T5,
    "HubertModel": HUBERT,
    "Wav2Vec2Model": HUBERT,
}


@dataclass
class Wish:
    """What was asked of a hooked encoder's ``from_pretrained``; see there."""

    model_name: str
    hf_model: Any = None
    device: str | torch.device | None = None
    move_to_device: bool = True
    dtype: torch.dtype | str = torch.float32
    checkpoint: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def family_of(hf_model: Any, hf_classes: Sequence[str], asked: str) -> Family:
    """The family of a HF model.

    Raises:
        UnsupportedModelError: if ``asked``, which runs on ``hf_classes``, does not run on this model.
    """
    kind = next((base.__name__ for base in type(hf_model).__mro__ if base.__name__ in hf_classes), None)
    if kind is None:
        raise UnsupportedModelError(f"{asked} runs on {', '.join(hf_classes)}, not on {type(hf_model).__name__}")
    family, config = FAMILIES[kind], hf_model.config
    if getattr(config, "do_stable_layer_norm", False):
        raise UnsupportedModelError(
            f"{asked} has the points of blocks whose norms stand behind attention and MLP; this {kind} has "
            "do_stable_layer_norm=True, and its norms stand before them"
        )
    if getattr(config, "is_decoder", False) and family is BERT:
        raise UnsupportedModelError(f"{asked} attends in both directions; this {kind} has is_decoder=True")
    return GATED_T5 if family is T5 and config.is_gated_act else family


def load(wish: Wish, hf_classes: Sequence[str], asked: str) -> tuple[Any, HookedTransformerConfig]:
    """The HF model that was asked for, loaded or taken as it is, and its config in TransformerLens' words.

    Raises:
        ModelNotFoundError: if the name leads to no checkpoint.
        UnsupportedModelError: if ``asked`` does not run on the model.
        UnknownArgumentError: for an argument that nothing would read.
        AssertionError: for weights in 8 or 4 bits.
    """
    if wish.kwargs.get("load_in_8bit") or wish.kwargs.get("load_in_4bit"):
        raise AssertionError("Quantization not supported: load hf_model yourself and pass it")
    if wish.checkpoint is not None:
        raise ValueError(f"{wish.model_name!r} has no numbered checkpoints; for another revision pass revision='...'")
    location = model_names.resolve(wish.model_name)
    hf_model = _loaded(wish, location, hf_classes, asked) if wish.hf_model is None else _given(wish)
    if wish.device is not None and wish.hf_model is not None and wish.move_to_device:
        hf_model.to(wish.device)
    return hf_model, read_config(hf_model, family_of(hf_model, hf_classes, asked), location)


def _given(wish: Wish) -> Any:
    if wish.kwargs:
        raise UnknownArgumentError(
            f"{', '.join(sorted(wish.kwargs))}: these go to HuggingFace's from_pretrained, which is not called when "
            "hf_model is given. Load hf_model with them instead."
        )
    dtype = getattr(wish.hf_model, "dtype", None)
    if wish.dtype not in (dtype, Wish.dtype):
        logging.warning("dtype=%s is not applied to hf_model, which stays %s: use model.to(dtype)", wish.dtype, dtype)
    # A model with a head on an encoder of sound holds the encoder itself.
    base = getattr(wish.hf_model, "base_model", wish.hf_model)
    return base if FAMILIES.get(type(base).__name__) is HUBERT else wish.hf_model


def _loaded(wish: Wish, location: str, hf_classes: Sequence[str], asked: str) -> Any:
    kwargs = dict(wish.kwargs)
    unknown = [name for name in kwargs if name not in HF_ARGUMENTS]
    if unknown:
        raise UnknownArgumentError(f"from_pretrained has no argument {', '.join(sorted(unknown))}")
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", wish.dtype))
    kwargs["dtype"] = DTYPE_FROM_STRING[dtype] if isinstance(dtype, str) else dtype
    kwargs.setdefault("attn_implementation", "eager")
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    with explaining_where(wish.model_name, location, OSError, ValueError):
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(location, **hub)
    fitting = [name for name in hf_classes if getattr(transformers, name).config_class is type(config)]
    if not fitting:
        raise UnsupportedModelError(
            f"{asked} runs on {', '.join(hf_classes)}; {wish.model_name!r} is of the type {config.model_type!r}"
        )
    with explaining_where(wish.model_name, location, OSError):
        hf_model = _complete(fitting, location, config, kwargs)
    if wish.move_to_device and "device_map" not in kwargs:
        hf_model.to(wish.device or get_device())
    return hf_model.eval()


def _complete(hf_classes: Sequence[str], location: str, config: Any, kwargs: dict[str, Any]) -> Any:
    """The checkpoint as the first class that it has all weights for."""
    missing: dict[str, list[str]] = {}
    for name in hf_classes:
        hf_model, info = getattr(transformers, name).from_pretrained(
            location, config=config, output_loading_info=True, **kwargs
        )
        missing[name] = sorted(info["missing_keys"])
        if not missing[name]:
            return hf_model
    lacks = "; ".join(f"as a {name} it lacks {', '.join(keys[:4])}" for name, keys in missing.items())
    raise UnsupportedModelError(f"the checkpoint {location!r} is incomplete: {lacks}")


def read_config(hf_model: Any, family: Family, location: str) -> HookedTransformerConfig:
    """A HookedTransformerConfig that describes a loaded HF model."""
    hf, first = hf_model.config, next(hf_model.parameters())
    fields = dict(family.constants)
    for name, attribute in family.config.items():
        fields[name] = getattr(hf, attribute, fields[name]) if name in fields else getattr(hf, attribute)
    fields.setdefault("d_head", fields["d_model"] // fields["n_heads"])
    return HookedTransformerConfig(
        **fields,
        original_architecture=family.architecture or type(hf_model).__name__,
        model_name=Path(location).name,
        tokenizer_name=location,
        init_weights=False,
        default_prepend_bos=True,
        dtype=first.dtype,
        device=str(first.device),
        n_devices=1,
    )


def build_hf_model(cfg: HookedTransformerConfig, hf_class: str) -> Any:
    """A HF model with new weights that has the sizes of a config.

    Raises:
        UnsupportedModelError: if heads do not fill the residual stream, where HF's have to.
    """
    family, kind = FAMILIES[hf_class], getattr(transformers, hf_class)
    if "d_head" not in family.config and cfg.d_head * cfg.n_heads != cfg.d_model:
        raise UnsupportedModelError(f"a {hf_class} has d_head * n_heads == d_model, not {cfg.d_head} * {cfg.n_heads}")
    if cfg.d_vocab == -1 and "d_vocab" in family.config:
        raise AssertionError("Must provide a tokenizer if d_vocab is not provided")
    # Those that HF computes from another one.
    derived = {"dense_act_fn", "is_gated_act"}
    sizes = {
        attribute: getattr(cfg, name)
        for name, attribute in family.config.items()
        if attribute not in derived and getattr(cfg, name) is not None
    }
    if "act_fn" in family.config and family.config["act_fn"] in derived:
        sizes["feed_forward_proj"] = f"gated-{cfg.act_fn}" if cfg.gated_mlp else cfg.act_fn
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    hf_model = kind(kind.config_class(**sizes, attn_implementation="eager")).to(cfg.dtype)
    logging.info("made a %s with new weights", hf_class)
    return hf_model.eval()
