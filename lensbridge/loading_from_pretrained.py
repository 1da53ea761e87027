"""What does TransformerLens' `loading_from_pretrained` say about a model?

The functions and lists of that module, as a thin layer: names come from `model_names`, configs and weights from what
`loading` reads off HuggingFace's config and model. `HookedTransformer.from_pretrained` does not go through here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from . import loading, model_names
from .architectures import architecture_of
from .components.transformer_block import POST_NORM
from .config import HookedTransformerConfig
from .errors import ModelNotFoundError, near_misses
from .model_names import PYTHIA_CHECKPOINTS as PYTHIA_CHECKPOINTS
from .model_names import PYTHIA_V0_CHECKPOINTS as PYTHIA_V0_CHECKPOINTS
from .model_names import STANFORD_CRFM_CHECKPOINTS as STANFORD_CRFM_CHECKPOINTS
from .native import NativeForCausalLM, hub
from .supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from .weights import WeightViews

#: Names of the table that are no hub ids: the weights were only given out on request.
NON_HF_HOSTED_MODEL_NAMES = ["llama-7b-hf", "llama-13b-hf", "llama-30b-hf", "llama-65b-hf"]

#: Prefixes of models whose repositories bring code of their own, which ``trust_remote_code`` allows to run.
NEED_REMOTE_CODE_MODELS = (
    "bigcode/santacoder",
    "Qwen/Qwen-",
    "Qwen/Qwen3-",
    "microsoft/phi-2",
    "microsoft/phi-4",
    "apple/OpenELM",
    "openai/gpt-oss-",
    "swiss-ai/Apertus-",
)

#: What a config says about how a model was loaded, not about the model.
_OF_LOADING = frozenset(
    "model_name device dtype n_devices init_weights seed default_prepend_bos from_checkpoint checkpoint_index "
    "checkpoint_value checkpoint_label_type tokenizer_prepends_bos n_params".split()
)

#: Matrices that must not be missing: without one, a branch of the block would be zero.
_NEEDED = frozenset("W_Q W_K W_V W_O _W_K _W_V W_in W_gate W_out".split())


# --- names ------------------------------------------------------------------------------------------------------------


def make_model_alias_map() -> dict[str, str]:
    """Every name and alias of the table, in lower case -> hub id."""
    return {
        name.lower(): official
        for official in OFFICIAL_MODEL_NAMES
        for name in (*MODEL_ALIASES.get(official, ()), official)
    }


def get_official_model_name(model_name: str) -> str:
    """The hub id that a name or alias of the table stands for, in any case.

    Raises:
        ValueError: for a name that is not in the table.
    """
    aliases = make_model_alias_map()
    if model_name.lower() not in aliases:
        raise ValueError(
            f"{model_name} not found among TransformerLens' model names.{near_misses(model_name, aliases)} "
            f"Valid official model names (excl aliases): {OFFICIAL_MODEL_NAMES}"
        )
    return aliases[model_name.lower()]


def get_checkpoint_labels(model_name: str, **kwargs: Any) -> tuple[list[int], str]:
    """(the labels of a model's training checkpoints, "step" or "token": what they count).

    For models in TransformerLens' own format the hub is asked, or the cache where the hub cannot be; ``kwargs``
    (``revision``, ``token``, ``cache_dir``) go there, and others, for models that HuggingFace loads, nowhere.

    Raises:
        ValueError: for a model that is not in the table or published no checkpoints.
        ModelNotFoundError: (a ValueError) neither the hub nor the cache knows the repository.
    """
    official = get_official_model_name(model_name)
    known = model_names.checkpoint_labels(official)
    if known is not None:
        if official.startswith("EleutherAI/pythia") and "v0" not in official:
            logging.warning("The Pythia models were trained again in April 2023; the first ones have -v0 in their name")
        return known[0], "step"
    if not hub.is_own_format(official):
        raise ValueError(f"Model {official} is not checkpointed.")
    options = {name: kwargs[name] for name in hub.HUB_ARGUMENTS if name in kwargs}
    with loading.explaining_where(model_name, official, OSError):
        labels = hub.Repository(official, options).labels()
    return list(labels.values), labels.kind


# --- configs ----------------------------------------------------------------------------------------------------------


def _skeleton(model_name: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> Any:
    """The HF model on PyTorch's meta device: modules and shapes without weights."""
    location = model_names.resolve(model_name)
    hub = {name: kwargs[name] for name in loading.HUB_ARGUMENTS if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(location, **hub)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"cannot read the config of {model_name!r} ({location!r}): {error} Offline, pass a local directory."
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _read_config(wish: loading.Wish) -> HookedTransformerConfig:
    """A config as `loading` reads it, without the weights."""
    wish.hf_model, wish.kwargs = _skeleton(wish.model_name, wish.dtype, wish.kwargs or {}), {}
    return loading.load(wish).cfg


def convert_hf_model_config(model_name: str, **kwargs: Any) -> dict[str, Any]:
    """The fields of a HookedTransformerConfig that describe a HuggingFace model, read from its config.

    ``model_name`` is a name of the table, a hub id or a directory; ``kwargs`` are for HuggingFace's
    ``AutoConfig.from_pretrained``.

    Raises:
        ModelNotFoundError: (a ValueError) there is no such model.
        UnsupportedModelError: (a ValueError) there is no record for the architecture.
    """
    cfg = _read_config(loading.Wish(model_name, kwargs=kwargs))
    cfg.n_devices = 1
    return {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name not in _OF_LOADING}


def convert_neel_model_config(official_model_name: str, **kwargs: Any) -> dict[str, Any]:
    """The fields of a HookedTransformerConfig that a repository in TransformerLens' own format states.

    Its ``config.json`` is downloaded, or found in the cache; ``kwargs`` go there (``revision``, ``cache_dir``, ...).

    Raises:
        ModelNotFoundError: (an OSError) neither the hub nor the cache has it.
        UnsupportedModelError: (a ValueError) it lacks fields that every model has.
    """
    official = get_official_model_name(official_model_name)
    with loading.explaining_where(official_model_name, official, OSError):
        return hub.Repository(official, kwargs).fields()


def _own_format_config(location: str, wish: loading.Wish) -> HookedTransformerConfig:
    with loading.explaining_where(wish.model_name, location, OSError):
        repository = hub.Repository(location, wish.kwargs)
        checkpoint = repository.checkpoint(wish.checkpoint_index, wish.checkpoint_value)
        asked = {"n_layers": wish.first_n_layers, "n_ctx": wish.n_ctx, "default_prepend_bos": wish.default_prepend_bos}
        changes = {name: value for name, value in asked.items() if value is not None}
        return hub.config_of(repository, checkpoint, dtype=wish.dtype, **changes)


def get_pretrained_model_config(
    model_name: str,
    hf_cfg: dict[str, Any] | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    fold_ln: bool = False,
    device: str | torch.device | None = None,
    n_devices: int = 1,
    default_prepend_bos: bool | None = None,
    dtype: torch.dtype = torch.float32,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    **kwargs: Any,
) -> HookedTransformerConfig:
    """The config that a pretrained model would be loaded with; no weights are read.

    Arguments as for `HookedTransformer.from_pretrained`. ``hf_cfg`` is the config of a loaded HuggingFace model as a
    dict, of which only the size of the vocabulary is taken.

    Raises:
        ModelNotFoundError: (a ValueError) the name leads to no config.
        UnsupportedModelError: (a ValueError) there is no record for the architecture.
    """
    wish = loading.Wish(
        model_name,
        dtype=dtype,
        first_n_layers=first_n_layers,
        n_ctx=n_ctx,
        default_prepend_bos=default_prepend_bos,
        checkpoint_index=checkpoint_index,
        checkpoint_value=checkpoint_value,
        kwargs=kwargs,
    )
    location = model_names.resolve(model_name)
    cfg = _own_format_config(location, wish) if hub.is_own_format(location, kwargs) else _read_config(wish)
    if hf_cfg is not None:
        cfg.d_vocab = cfg.d_vocab_out = hf_cfg.get("vocab_size", cfg.d_vocab)
    foldable = cfg.positional_embedding_type != "shortformer" and cfg.original_architecture not in POST_NORM
    if fold_ln and foldable and cfg.normalization_type in ("LN", "RMS"):
        cfg.normalization_type += "Pre"
    cfg.device = str(device) if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    cfg.n_devices = n_devices
    return cfg


def get_num_params_of_pretrained(model_name: str) -> int:
    """The number of weights in a model's attention and MLP matrices (``cfg.n_params``)."""
    n_params = get_pretrained_model_config(model_name).n_params
    assert n_params is not None
    return n_params


@dataclass
class Config:
    """The sizes of a model in a few words; the defaults are GPT-2 small's."""

    d_model: int = 768
    debug: bool = True
    layer_norm_eps: float = 1e-5
    d_vocab: int = 50257
    init_range: float = 0.02
    n_ctx: int = 1024
    d_head: int = 64
    d_mlp: int = 3072
    n_heads: int = 12
    n_layers: int = 12


def get_basic_config(model_name: str, **kwargs: Any) -> Config:
    """The sizes of a pretrained model; what is no size stays at its default. ``kwargs`` as for the full config."""
    found = get_pretrained_model_config(model_name, **kwargs).to_dict()
    return Config(**{field.name: found[field.name] for field in fields(Config) if field.name in found})


# --- weights ----------------------------------------------------------------------------------------------------------


def get_pretrained_state_dict(
    official_model_name: str,
    cfg: HookedTransformerConfig,
    hf_model: Any = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The unprocessed weights of a pretrained model under TransformerLens' names and in its shapes.

    Those of ``hf_model``, with which they share memory, if it is given; else the model is loaded, at the checkpoint
    that ``cfg`` names, in ``dtype``, with ``kwargs`` for HuggingFace's ``from_pretrained``. What a file in
    TransformerLens' own format does not have, such as biases that are zero, is not there (`fill_missing_keys`).

    Raises:
        ModelNotFoundError: (an OSError) the name leads to no checkpoint.
        UnsupportedModelError: (a ValueError) there is no record for the architecture.
    """
    dtype, label = kwargs.pop("torch_dtype", dtype), cfg.checkpoint_value if cfg.from_checkpoint else None
    location = model_names.resolve(official_model_name)
    if hf_model is None and hub.is_own_format(location, kwargs):
        with loading.explaining_where(official_model_name, location, OSError):
            return hub.Repository(location, kwargs).weights(label, dtype)
    if hf_model is None:
        wish = loading.Wish(
            official_model_name, dtype=dtype, move_to_device=False, checkpoint_value=label, kwargs=kwargs
        )
        hf_model = loading.load(wish).hf_model
    if isinstance(hf_model, NativeForCausalLM):
        return {name: value.detach() for name, value in hf_model.named_parameters()}
    views = WeightViews(hf_model, architecture_of(hf_model), cfg)
    return {name: views.get(name).detach() for name in views.names()}


def fill_missing_keys(model: torch.nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the model's own values to a state dict, which is changed, wherever it has none.

    Norms and other weights are warned of.

    Raises:
        ValueError: if a matrix of attention or of an MLP is missing.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state_dict and "hf_model" not in name]
    needed = sorted(name for name in missing if name.rsplit(".", 1)[-1] in _NEEDED)
    if needed:
        raise ValueError(
            f"Pretrained state dict is missing weight matrices the model expects: {needed}. A model with its present "
            "values there would run, and compute something else."
        )
    for name in missing:
        is_norm = name.rsplit(".", 1)[-1] in ("w", "b") and ("ln" in name or "norm" in name)
        if "W_" in name or is_norm:
            logging.warning("Missing from the pretrained state dict, kept at the model's own value: %s", name)
        state_dict[name] = own[name]
    return state_dict
