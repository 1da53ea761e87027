"""What describes a model whose family has no record?

A record that is measured on the model, or on a tiny copy where the model is too large for that or not in single
precision, checked, and kept for the next time.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..architectures.record import Architecture
from ..errors import UnsupportedModelError
from ..tiny import tiny_config, tiny_model
from . import store
from .checked import checked
from .derive import derive
from .facts import measure

#: Parameters up to which a model on an accelerator is measured itself.
SMALL = 50_000_000
#: Fields of TransformerLens' config that are not the same in models of other sizes.
SIZES = {"n_heads", "d_head", "attn_scale"}
#: What was read or measured before in this process, and the classes that the user was told of.
_KNOWN: dict[Path, Architecture] = {}
_TOLD: set[str] = set()


def measured_record(hf_model: Any) -> Architecture:
    """The record of a model of a class without one: kept from before, or measured now.

    Raises:
        UnsupportedModelError: if the model is not built in a way that a record can describe.
    """
    path = store.path_of(type(hf_model), hf_model.config)
    record = _KNOWN.get(path) or store.read(path)
    if record is None or not fits(record, hf_model):
        record = measured(hf_model)
        if _is_general(record):
            store.write(path, record)
    if _is_general(record):
        _KNOWN[path] = record
    _tell(record)
    return record.for_model(hf_model)


def refuse_unmeasurable(config: Any) -> None:
    """Refuse a config without a record before its weights are read, if no record of a tiny copy can be measured.

    Raises:
        UnsupportedModelError: see `measured_record`.
    """
    try:
        copy = tiny_model(tiny_config(config))
    except Exception as error:
        # What cannot be built small may do in its own size.
        logging.info("no tiny copy of %s: %s", config.model_type, error)
        return
    measured_record(copy)


def measured(hf_model: Any) -> Architecture:
    """A record measured now.

    Raises:
        UnsupportedModelError: see `measured_record`.
    """
    if not can_run(hf_model):
        copy = _copy(hf_model)
        record = None if copy is None else _measured_on(copy)
        if record is not None and _is_general(record):
            return record
        if any(parameter.device.type == "meta" for parameter in hf_model.parameters()):
            raise UnsupportedModelError(
                f"{type(hf_model).__name__} has no record, and one can only be measured on a model whose weights are "
                "loaded, because what a tiny copy shows would not do for it"
            )
    return _measured_on(hf_model)


def _measured_on(hf_model: Any) -> Architecture:
    # In half precision, identities hold too roughly to tell what is wrong.
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in hf_model.parameters())
    try:
        record = derive(measure(hf_model), hf_model.config)
        return checked(hf_model, record) if exact else record
    except UnsupportedModelError:
        raise
    except Exception as error:
        # Other people's classes raise what they like.
        name = type(hf_model).__name__
        raise UnsupportedModelError(
            f"{name} has no record, and measuring one failed ({type(error).__name__}: {error}). A record can be "
            "written by hand and passed as architecture= (see CONTRIBUTING.md)."
        ) from error


def can_run(hf_model: Any) -> bool:
    """Whether a model is measured itself: in single precision, and on the CPU or small."""
    parameters = list(hf_model.parameters())
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in parameters)
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    there = all(parameter.device.type != "meta" for parameter in parameters)
    return exact and there and (on_cpu or sum(parameter.numel() for parameter in parameters) <= SMALL)


def _copy(hf_model: Any) -> Any:
    """A tiny random model of the same class; None if none can be built and run."""
    try:
        copy: Any = tiny_model(tiny_config(hf_model.config), model_class=type(hf_model))
        copy(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:
        # Other people's classes raise what they like.
        logging.info("no tiny copy of %s: %s", type(hf_model).__name__, error)
        return None
    return copy


def _is_general(record: Architecture) -> bool:
    """Whether a record is one of models of any size: it does not hold one model's layers or numbers."""
    return not record.blocks and not SIZES & set(record.constants)


def fits(record: Architecture, hf_model: Any) -> bool:
    """Whether the roles of a record are modules of a model, and its layers are those that it was measured on."""
    paths = {name for name, _ in hf_model.named_modules()}
    if record.layers not in paths:
        return False
    resolved = record.for_model(hf_model)
    return not missing_roles(resolved, paths)


#: The roles of a block that are modules.
ROLES = tuple(
    "ln1 attn q k v qkv q_norm k_norm o z_norm ln1_post ln2 mlp gate mlp_in mlp_out neuron_norm act experts router "
    "ln2_post attn_branch mlp_branch attn_also mlp_also middle".split()
)


def missing_roles(record: Architecture, paths: set[str]) -> list[str]:
    """``role: path`` of what a record, with its layers, names that is no module of a model."""
    around = {
        name: getattr(record, name) for name in ("embed", "pos_embed", "embed_norm", "layers", "ln_final", "unembed")
    }
    found = [f"{name}: {path}" for name, path in around.items() if path is not None and path not in paths]
    for index, block in enumerate(record.blocks):
        fused = ("q", "k", "v") if block.qkv is not None else ()
        for role in ROLES:
            path = getattr(block, role)
            unused = path is None or role in fused or (block.attn is None and role in ("q", "k", "v", "o"))
            if not unused and record.below(index, path) not in paths:
                found.append(f"{role}: {record.below(index, path)}")
    return found


def given_record(record: Any, hf_model: Any) -> Architecture:
    """A record that a user passed, with the layers of a model.

    Raises:
        TypeError: if it is no `Architecture`.
        UnsupportedModelError: if it names modules that the model does not have, or refuses its config.
    """
    if not isinstance(record, Architecture):
        raise TypeError(f"architecture must be a lensbridge.architectures.Architecture, not {record!r}")
    paths = {name for name, _ in hf_model.named_modules()}
    if record.layers not in paths:
        raise UnsupportedModelError(f"the record says that the layers are {record.layers!r}, which is no module")
    resolved = record.for_model(hf_model)
    missing = missing_roles(resolved, paths)
    if missing:
        raise UnsupportedModelError(
            f"the record does not fit {type(hf_model).__name__}, which has no such modules: {', '.join(missing[:6])}"
            f"{' and others' if len(missing) > 6 else ''}"
        )
    return resolved


def _tell(record: Architecture) -> None:
    """Say once that a record was measured."""
    if record.hf_class in _TOLD:
        return
    _TOLD.add(record.hf_class)
    logging.warning(
        "%s has no record, so that one was measured. Where its points do not exist, asking for them says why; "
        "`lensbridge check` shows what holds, and can write the record to a file.",
        record.hf_class,
    )
