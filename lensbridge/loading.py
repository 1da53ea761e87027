"""How does a model name, a directory or a loaded HF model become something to hook?

HuggingFace loads; nothing is converted or copied. What is added is the record of the architecture, a
HookedTransformerConfig read off the HF config, and a tokenizer. Models of our own (`native`) bring their config along.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from . import model_names
from .architectures import BY_MODEL_TYPE, Architecture, architecture_of, refuse, text_family
from .checkpoints import Labels
from .config import HookedTransformerConfig
from .engine.tensor_parallel import refuse_unknown_styles
from .errors import ModelNotFoundError, UnknownArgumentError, UnsupportedModelError, near_misses
from .hf_config import described
from .native import NativeConfig, NativeForCausalLM, hub
from .native.narrowing import narrowed
from .processing import Processing
from .spreading import spread
from .unaudited import warn_of_unaudited
from .utilities.devices import get_device
from .utilities.multi_gpu import count_unique_devices
from .wrapped import unwrapped

DTYPE_FROM_STRING = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

#: Arguments of HF's ``from_pretrained`` that are passed on; attributes of the model's config are accepted too.
HF_ARGUMENTS = frozenset(
    "cache_dir force_download local_files_only token revision use_safetensors weights_only variant subfolder proxies "
    "trust_remote_code code_revision torch_dtype dtype device_map max_memory offload_folder offload_buffers "
    "offload_state_dict quantization_config attn_implementation experts_implementation tp_plan tp_size device_mesh "
    "low_cpu_mem_usage ignore_mismatched_sizes key_mapping config state_dict adapter_kwargs use_kernels "
    "distributed_config kernel_config commit_hash gguf_file".split()
)
#: Those among them that tokenizers and configs understand as well.
HUB_ARGUMENTS = tuple("cache_dir force_download local_files_only token revision subfolder trust_remote_code".split())


@dataclass
class Loaded:
    """A model ready to be hooked."""

    hf_model: Any
    #: None for a model of our own (`native`), which is described by its config.
    architecture: Architecture | None
    cfg: HookedTransformerConfig
    #: What runs the model, if its weights are elsewhere.
    service: Any = None


@dataclass
class Wish:
    """What was asked of ``from_pretrained`` about the model itself; see `HookedTransformer.from_pretrained`."""

    model_name: str
    hf_model: Any = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device | None = None
    n_devices: int = 1
    move_to_device: bool = True
    first_n_layers: int | None = None
    n_ctx: int | None = None
    default_prepend_bos: bool | None = None
    checkpoint_index: int | None = None
    checkpoint_value: int | None = None
    kwargs: dict[str, Any] | None = None
    #: A record of the user's own.
    architecture: Any = None
    #: Who has the weights, if they are not to be loaded (`HookedTransformer.forward` says what there is).
    remote: Any = None


_BUILDING: ContextVar[Loaded | None] = ContextVar("lensbridge_building", default=None)


@contextmanager
def building(loaded: Loaded) -> Iterator[None]:
    """Within the context, ``HookedTransformer.__init__`` (and a subclass' with any signature) finds this model."""
    token = _BUILDING.set(loaded)
    try:
        yield
    finally:
        _BUILDING.reset(token)


def being_built() -> Loaded | None:
    """The model that `building` announced, if any."""
    return _BUILDING.get()


def load(wish: Wish) -> Loaded:
    """Load, or take as it is, the HF model that was asked for.

    Raises:
        ModelNotFoundError: if the name leads to no checkpoint.
        UnsupportedModelError: if there is no record for the architecture.
        UnknownArgumentError: for an argument that HF's ``from_pretrained`` would not know either.
    """
    kwargs = dict(wish.kwargs or {})
    location = model_names.resolve(wish.model_name)
    if wish.hf_model is None and hub.is_own_format(location, kwargs):
        hf_model = _in_own_format(location, wish, kwargs)
        return Loaded(hf_model, None, _own_config(hf_model, wish))
    checkpoint, service = _checkpoint(location, wish, kwargs), None
    if wish.remote:
        service = _elsewhere(location, wish, kwargs)
        hf_model = service.hf_model
    else:
        hf_model = _from_hub_or_disk(location, wish, kwargs) if wish.hf_model is None else _as_given(wish, kwargs)
    if isinstance(hf_model, NativeForCausalLM):
        hf_model = narrowed(hf_model, wish.first_n_layers, wish.n_ctx)
        hf_model.cfg.tokenizer_name = hf_model.cfg.tokenizer_name or location
        return Loaded(hf_model, None, _own_config(hf_model, wish))
    refuse_unknown_styles(hf_model)
    architecture = _record_of(hf_model, wish)
    if wish.architecture is None:
        warn_of_unaudited(hf_model)
    if wish.first_n_layers is not None and wish.first_n_layers != len(architecture.blocks):
        hf_model = truncated(hf_model, architecture, wish.first_n_layers)
        architecture = _record_of(hf_model, wish)
    cfg = read_config(hf_model, architecture, wish, location)
    for name, value in checkpoint.items():
        setattr(cfg, name, value)
    if service is not None and service.unloaded is not None:
        # Where tokens are, and what comes back.
        cfg.device = "cpu"
    return Loaded(hf_model, architecture, cfg, service)


def _elsewhere(location: str, wish: Wish, kwargs: dict[str, Any]) -> Any:
    """What runs a model whose weights are not loaded; or, with ``remote="local"``, one that is loaded.

    Raises:
        UnsupportedModelError: an option that would change the model, or say where its weights go.
    """
    from .engine.remote.service import Service, Unloaded

    if wish.remote == "local":
        local = replace(wish, remote=None)
        given = _from_hub_or_disk(location, local, kwargs) if wish.hf_model is None else _as_given(local, kwargs)
        return Service(given, "local")
    placing = [name for name in ("device_map", "max_memory", "tp_plan", "quantization_config") if name in kwargs]
    asked = {"hf_model": wish.hf_model, "device": wish.device, "first_n_layers": wish.first_n_layers}
    asked["n_devices"] = wish.n_devices if wish.n_devices > 1 else None
    refused = [*placing, *(name for name, value in asked.items() if value is not None)]
    if refused:
        raise UnsupportedModelError(
            f"{', '.join(refused)}: with remote={wish.remote!r} the model is the server's, as it has loaded it"
        )
    config = _config_for(location, wish, kwargs)
    options = {name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
    attention = kwargs.get("attn_implementation", "eager")
    unloaded = Unloaded(location, config=config, attn_implementation=attention, **options)
    return Service(unloaded._module, wish.remote, unloaded)


def _record_of(hf_model: Any, wish: Wish) -> Architecture:
    """The record that was passed, or the family's."""
    if wish.architecture is None:
        return architecture_of(hf_model)
    from .measuring import given_record

    return given_record(wish.architecture, hf_model)


def _in_own_format(location: str, wish: Wish, kwargs: dict[str, Any]) -> NativeForCausalLM:
    """A model in TransformerLens' own format."""
    dtype = kwargs.pop("torch_dtype", wish.dtype)
    _warn_of_float16(dtype, wish.device)
    with explaining_where(wish.model_name, location, OSError, revision=kwargs.get("revision")):
        repository = hub.Repository(location, kwargs)
        checkpoint = repository.checkpoint(wish.checkpoint_index, wish.checkpoint_value)
        hf_model: Any = hub.load(repository, checkpoint, dtype)
    hf_model = narrowed(hf_model, wish.first_n_layers, wish.n_ctx)
    if wish.move_to_device:
        hf_model.to(wish.device or get_device())
    return hf_model


def _own_config(hf_model: NativeForCausalLM, wish: Wish) -> HookedTransformerConfig:
    """The config of a native model, with what was asked for."""
    if wish.n_devices > 1:
        raise UnsupportedModelError(f"n_devices={wish.n_devices}: a model made from a config is on one device")
    cfg, first = hf_model.cfg, hf_model.embed.W_E
    cfg.device, cfg.dtype = str(first.device), first.dtype
    if wish.default_prepend_bos is not None:
        cfg.default_prepend_bos = wish.default_prepend_bos
    return cfg


def _as_given(wish: Wish, kwargs: dict[str, Any]) -> Any:
    if kwargs:
        raise UnknownArgumentError(
            f"{', '.join(sorted(kwargs))}: these go to HuggingFace's from_pretrained, which is not called when "
            "hf_model is given. Load hf_model with them instead."
        )
    hf_model = unwrapped(wish.hf_model)
    if not hasattr(hf_model, "config"):
        raise AssertionError(f"hf_model must be a HuggingFace model with a config, not {type(hf_model).__name__}")
    devices = count_unique_devices(hf_model)
    if wish.n_devices > 1 and devices != wish.n_devices and not isinstance(hf_model, NativeForCausalLM):
        raise UnsupportedModelError(
            f"n_devices={wish.n_devices} is not applied to hf_model, which is on {devices}: load it with "
            "device_map='balanced'"
        )
    dtype = getattr(hf_model, "dtype", wish.dtype)
    if wish.dtype not in (dtype, Wish.dtype):
        logging.warning("dtype=%s is not applied to hf_model, which stays %s: use model.to(dtype)", wish.dtype, dtype)
    return hf_model


def _from_hub_or_disk(location: str, wish: Wish, kwargs: dict[str, Any]) -> Any:
    config = _config_for(location, wish, kwargs)
    if "torch_dtype" in kwargs:
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    kwargs.setdefault("dtype", wish.dtype)
    kwargs.setdefault("attn_implementation", "eager")
    is_spread_out = spread(wish, config, kwargs)
    _warn_of_float16(kwargs["dtype"], wish.device)
    with explaining_where(wish.model_name, location, OSError, revision=kwargs.get("revision")):
        hf_model: Any = _auto_class(config).from_pretrained(location, config=config, **kwargs)
    if wish.move_to_device and not is_spread_out and getattr(hf_model, "quantization_method", None) is None:
        hf_model.to(wish.device or get_device())
    return hf_model


def _auto_class(config: Any) -> Any:
    """What loads a checkpoint: as a causal language model, or where that is a part of it, as one that also sees."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _config_for(location: str, wish: Wish, kwargs: dict[str, Any]) -> Any:
    """The HF config, with those of its attributes that are among ``kwargs``, which lose them."""
    options = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        # transformers raises ValueError for a config.json that names no model type.
        with explaining_where(wish.model_name, location, OSError, ValueError, revision=kwargs.get("revision")):
            config = AutoConfig.from_pretrained(location, **options)
    if wish.architecture is None:
        _refuse_unrecorded(config)
    if config.model_type in BY_MODEL_TYPE:
        for name, value in BY_MODEL_TYPE[config.model_type].loaded_with.items():
            kwargs.setdefault(name, value)
    return _with_attributes(config, kwargs)


def _warn_of_float16(dtype: torch.dtype, device: str | torch.device | None) -> None:
    on_cpu = str(device or "cpu").startswith("cpu") and not torch.cuda.is_available()
    if dtype == torch.float16 and on_cpu:
        logging.warning("float16 models may be slow or fail on CPU; use bfloat16 or a GPU")


def _with_attributes(config: Any, kwargs: dict[str, Any]) -> Any:
    """The config with the attributes of it that are among ``kwargs``, which lose them.

    Raises:
        UnknownArgumentError: for a name that is neither an argument of HF's ``from_pretrained`` nor such an attribute.
    """
    changes = {}
    for name in [name for name in kwargs if name not in HF_ARGUMENTS]:
        if not hasattr(config, name) or callable(getattr(config, name)):
            known = [*HF_ARGUMENTS, *config.to_dict()]
            raise UnknownArgumentError(f"from_pretrained has no argument {name!r}.{near_misses(name, known)}")
        changes[name] = kwargs.pop(name)
    if changes:
        config = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(config, name, value)
    return config


def _refuse_unrecorded(config: Any) -> None:
    """Refuse before the weights are read, by the config, what has no record and can get none."""
    refuse(config.model_type)
    if config.model_type not in {NativeConfig.model_type, *BY_MODEL_TYPE}:
        from .measuring import refuse_unmeasurable

        refuse_unmeasurable(config)


@contextmanager
def explaining_where(name: str, location: str, *errors: type[Exception], revision: str | None = None) -> Iterator[None]:
    """Turn HF's many ways of not finding a model into one error that says where it was looked for and what to do."""
    try:
        yield
    except errors as error:
        if isinstance(error, ModelNotFoundError):
            raise
        if Path(location).is_dir():
            raise ModelNotFoundError(
                f"the directory {location!r} holds no model that can be loaded. HuggingFace said: {error}"
            ) from error
        details = [f"the hub id {location!r}"] if location != name else []
        details += [f"revision {revision!r}"] if revision is not None else []
        alias = f" ({', '.join(details)})" if details else ""
        known = model_names.known_names()
        closest = "" if name in known else near_misses(name, known)
        raise ModelNotFoundError(
            f"cannot load {name!r}{alias}: there is no such local directory, and neither HuggingFace's cache nor the "
            f"hub gave it. If this machine is offline, download the model elsewhere and pass its directory, or pass a "
            f"loaded model as hf_model=.{closest} HuggingFace said: {error}"
        ) from error


def _checkpoint(location: str, wish: Wish, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn a checkpoint index or step into a revision (in ``kwargs``) and the config fields that record it."""
    if wish.checkpoint_index is None and wish.checkpoint_value is None:
        return {}
    labels = model_names.checkpoint_labels(location)
    if labels is None:
        raise ValueError(
            f"{wish.model_name!r} has no numbered checkpoints; those of stanford-crfm's GPT-2 and EleutherAI's Pythia "
            "models have. For another revision pass revision='...'"
        )
    if "revision" in kwargs:
        raise ValueError("a checkpoint is a revision: give one of checkpoint_index, checkpoint_value and revision")
    steps, prefix = labels
    checkpoint = Labels(steps, "step").choose(repr(wish.model_name), wish.checkpoint_index, wish.checkpoint_value)
    if wish.hf_model is None:
        kwargs["revision"] = f"{prefix}{checkpoint.value}"
    return checkpoint.fields()


def at_first(chosen: Processing, cfg: HookedTransformerConfig) -> Processing:
    """The options that a loaded model gets: as in TransformerLens, a shortformer's logits are not centred then."""
    if cfg.positional_embedding_type != "shortformer" or not chosen.center_unembed:
        return chosen
    logging.warning("center_unembed is left out for a shortformer")
    return replace(chosen, center_unembed=False)


def truncated(hf_model: Any, architecture: Architecture, n_layers: int) -> Any:
    """A model of the first layers of another: the same modules and parameters, in new containers.

    Raises:
        ValueError: if ``n_layers`` is not between 0 and the number of layers.
    """
    available = len(architecture.blocks)
    if not 0 <= n_layers <= available:
        raise ValueError(f"first_n_layers must be between 0 and {available}, not {n_layers}")
    root = _shallow(hf_model)
    root.config = copy.deepcopy(hf_model.config)
    text_config = root.config.get_text_config(decoder=True)
    count = text_config.num_hidden_layers = architecture.number(n_layers - 1) + 1 if n_layers else 0
    parent, parts = root, architecture.layers.split(".")
    for part in parts[:-1]:
        child = _shallow(getattr(parent, part))
        child.config = text_config if type(child.config) is type(text_config) else root.config
        parent._modules[part] = child
        parent = child
    parent._modules[parts[-1]] = nn.ModuleList(list(hf_model.get_submodule(architecture.layers))[:count])
    return root


def _shallow(module: nn.Module) -> Any:
    """A copy of one module that shares its parameters and children, and can be given others."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    # nnsight's handle is bound to the module that it was installed on.
    for name in ("forward", "__nnsight__"):
        twin.__dict__.pop(name, None)
    return twin


def read_config(hf_model: Any, architecture: Architecture, wish: Wish, location: str) -> HookedTransformerConfig:
    """A HookedTransformerConfig that describes a loaded HF model.

    Raises:
        ValueError: if ``n_ctx`` is not within the model's learned positions.
    """
    prepend = wish.default_prepend_bos
    if prepend is None:
        family = text_family(hf_model.config)
        classes = {architecture.hf_class, *(() if family is None else (family.hf_class,))}
        prepend = classes.isdisjoint(model_names.table()["no_bos_by_default"])
    fields = described(hf_model, architecture)
    limit = fields["n_ctx"]
    if wish.n_ctx is not None:
        fields["n_ctx"] = wish.n_ctx
    if architecture.pos_embed is not None and not 1 <= fields["n_ctx"] <= limit:
        raise ValueError(f"n_ctx must be between 1 and {limit}, the model's learned positions, not {wish.n_ctx}")
    return HookedTransformerConfig(
        **fields,
        model_name=Path(location).name,
        tokenizer_name=location,
        default_prepend_bos=prepend,
        n_devices=wish.n_devices,
    )


def find_tokenizer(
    tokenizer: Any, cfg: HookedTransformerConfig, kwargs: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """A tokenizer from an object, a name, or the model's own place; None, with a warning, if that has none.

    Raises:
        ModelNotFoundError: if a tokenizer was asked for by a name that leads to none.
    """
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    if not (tokenizer or cfg.tokenizer_name):
        return None
    options = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs and name != "revision"}
    name = model_names.resolve(tokenizer or cfg.tokenizer_name or "")
    try:
        found = AutoTokenizer.from_pretrained(name, **options)
        # For a directory with a model but no tokenizer, transformers makes up one that knows no token.
        if found.vocab_size:
            return found
        error: Exception = ValueError(f"there are no tokenizer files in {name!r}")
    except (OSError, ValueError, KeyError) as raised:
        error = raised
    if tokenizer is not None:
        raise ModelNotFoundError(f"cannot load a tokenizer {tokenizer!r}. HuggingFace said: {error}") from error
    logging.warning(
        "no tokenizer at %r: the model takes tokens only. Pass tokenizer=, or call set_tokenizer() later.", name
    )
    return None


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # TransformerLens calls its loading_from_pretrained ``transformer_lens.loading`` too.
        from . import loading_from_pretrained

        if name.startswith("_") or not hasattr(loading_from_pretrained, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(loading_from_pretrained, name)
