"""How are models in TransformerLens' own format read off the hub?

The SoLU, GELU and attention-only models, Redwood's and Othello-GPT are no models of HuggingFace's: their repositories
have a ``config.json`` in words of its own, the trained weights in a file that ends in ``final.pth``, and perhaps
training checkpoints (``checkpoints/..._1000.pth``). Files are cached as HuggingFace caches everything; what is in its
cache, or in a local directory, needs no network.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch

from .. import model_names
from ..checkpoints import Checkpoint, Labels
from ..config import HookedTransformerConfig
from ..errors import ModelNotFoundError, UnknownArgumentError, UnsupportedModelError, near_misses
from ..utilities._hf_retry import call_hf_with_retry
from .model import NativeForCausalLM
from .old_weights import State, converted
from .processing import FOLDED, NORM_WEIGHT, completed

#: Owners of such repositories.
OWNERS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
#: Arguments of huggingface_hub that are passed on.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
#: What such a config says under the names that it has here.
SAME_NAMES = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only")
#: No model was trained for so many steps: larger labels count tokens.
TOO_MANY_STEPS = 1e9


class Files(NamedTuple):
    """The names of a repository's files, in the hub's order."""

    names: list[str]
    #: False where the hub could not be asked, and these are those in the cache.
    complete: bool


class Repository:
    """One repository of the hub, or a directory with the same files.

    Args:
        location: hub id or directory.
        arguments: for huggingface_hub (``revision``, ``cache_dir``, ``token``, ...).

    Raises:
        UnknownArgumentError: (a TypeError) for any other argument; ``trust_remote_code`` is allowed, there is no code.
    """

    def __init__(self, location: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.location = location
        self.arguments = {name: value for name, value in (arguments or {}).items() if name != "trust_remote_code"}
        unknown = [name for name in self.arguments if name not in HUB_ARGUMENTS]
        if unknown:
            hints = "".join(near_misses(name, HUB_ARGUMENTS) for name in unknown)
            raise UnknownArgumentError(
                f"{', '.join(unknown)}: {location!r} is in TransformerLens' own format, which transformers does not "
                f"load. What can be passed on is {', '.join(HUB_ARGUMENTS)}.{hints}"
            )
        self._directory = Path(location) if Path(location).is_dir() else None

    # --- files --------------------------------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        """Where one file lies, after it was downloaded if need be.

        Raises:
            OSError: neither the hub nor its cache has it, or the directory.
        """
        if self._directory is not None:
            return self._directory / name
        download = huggingface_hub.hf_hub_download
        return Path(call_hf_with_retry(download, repo_id=self.location, filename=name, **self.arguments))

    @cached_property
    def files(self) -> Files:
        """The files of the repository.

        Raises:
            OSError: neither the hub nor its cache knows it.
        """
        if self._directory is not None:
            return Files(_below(self._directory), True)
        asked = {name: self.arguments[name] for name in ("revision", "token") if name in self.arguments}
        if not self.arguments.get("local_files_only"):
            try:
                return Files(list(huggingface_hub.HfApi().list_repo_files(self.location, **asked)), True)
            except Exception as error:
                # That there is no connection has many types; the cache is the answer to all of them.
                logging.debug("the hub does not list %s: %s", self.location, error)
        return Files(_below(self.file("config.json").parent), False)

    @cached_property
    def checkpoint_files(self) -> dict[int, str]:
        """Label of a training checkpoint -> its file, in the order of the files."""
        found: dict[int, str] = {}
        for name in self.files.names:
            match = re.fullmatch(r"checkpoints/.*_(\d+)\.pth", name)
            if match is not None:
                found.setdefault(int(match[1]), name)
        return found

    # --- what they say ------------------------------------------------------------------------------------------------

    @cached_property
    def stated(self) -> dict[str, Any]:
        """What ``config.json`` says.

        Raises:
            OSError: there is none.
            ValueError: it is no JSON.
        """
        return json.loads(self.file("config.json").read_text(encoding="utf-8"))

    def fields(self) -> dict[str, Any]:
        """The fields of a HookedTransformerConfig that ``config.json`` states.

        Raises:
            UnsupportedModelError: (a ValueError) it lacks some that every model has.
        """
        stated = self.stated
        norm = "normalization" if "normalization" in stated else "normalization_type"
        missing = [name for name in (*SAME_NAMES, norm) if name not in stated]
        if missing:
            raise UnsupportedModelError(
                f"config.json of {self.location!r} lacks {', '.join(missing)}, so it is none in TransformerLens' format"
            )
        return {name: stated[name] for name in SAME_NAMES} | {
            "tokenizer_name": stated.get("tokenizer_name"),
            "final_rms": stated.get("final_rms", False),
            "original_architecture": stated.get("architecture", "neel-solu-old" if "_old" in self.location else "neel"),
            "normalization_type": stated[norm],
            "positional_embedding_type": "shortformer" if stated.get("shortformer_pos") else "standard",
        }

    def labels(self) -> Labels:
        """The labels of the training checkpoints.

        Raises:
            ValueError: there are none.
        """
        values = list(self.checkpoint_files)
        if not values:
            where = "" if self.files.complete else " in the cache, and the hub cannot be asked"
            raise ValueError(f"Model {self.location} is not checkpointed: there are no files checkpoints/*.pth{where}")
        return Labels(values, "token" if values[-1] > TOO_MANY_STEPS else "step")

    def checkpoint(self, index: int | None, value: int | None) -> Checkpoint | None:
        """The training checkpoint of an index or a label; None for none of both, which is the trained model.

        Raises:
            ValueError, IndexError, AssertionError: see `labels` and `Labels.choose`.
        """
        if index is None and value is None:
            return None
        complete = self.files.complete
        chosen = self.labels().choose(
            repr(self.location) + ("" if complete else " (as far as it is in the cache: the hub cannot be asked)"),
            index,
            value,
        )
        if index is not None and not complete:
            logging.warning(
                "the hub cannot be asked, so checkpoint_index=%d counts the %d checkpoints in the cache: it is %s %d. "
                "checkpoint_value=%d says the same for certain",
                *(index, len(self.checkpoint_files), chosen.kind, chosen.value, chosen.value),
            )
        return chosen

    def _weights_file(self, label: int | None) -> str:
        if label is None:
            wanted = "file *final.pth, which would be the trained model"
            name = next((name for name in self.files.names if name.endswith("final.pth")), None)
        else:
            wanted, name = f"checkpoint {label}", self.checkpoint_files.get(label)
        if name is None:
            where = "" if self.files.complete else " in the cache, and the hub cannot be asked"
            there = ", ".join(self.files.names[:10])
            raise ModelNotFoundError(f"{self.location!r} has no {wanted}{where}. There are: {there}")
        return name

    def weights(self, label: int | None = None, dtype: torch.dtype = torch.float32) -> State:
        """The unprocessed weights, of the trained model or a checkpoint, under today's names.

        Raises:
            ModelNotFoundError: (an OSError) there is no such file, or it holds other things than tensors.
        """
        path = self.file(self._weights_file(label))
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelNotFoundError(
                f"{path} holds other things than tensors, which could run code when they are loaded. If you trust it, "
                f"load it yourself (torch.load(..., weights_only=False)) and give model.load_and_process_state_dict "
                f"what is in it. torch said: {error}"
            ) from error
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        fields = self.fields()
        return converted(state, fields["original_architecture"], fields["n_layers"], fields["n_heads"])


def _below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def is_own_format(location: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """Whether a hub id or directory is in TransformerLens' own format."""
    known = {name: value for name, value in (arguments or {}).items() if name in HUB_ARGUMENTS}
    if not Path(location).is_dir():
        if not location.startswith(OWNERS):
            return False
        if location in model_names.table()["names"]:
            return True
    try:
        stated = Repository(location, known).stated
    except (OSError, ValueError):
        return False
    # Every config of HuggingFace's names its type.
    return "model_type" not in stated and set(SAME_NAMES) <= set(stated)


def config_of(repository: Repository, checkpoint: Checkpoint | None = None, **changes: Any) -> HookedTransformerConfig:
    """The config of a repository's model, with what records a checkpoint, and with changed fields."""
    fields = repository.fields() | (checkpoint.fields() if checkpoint else {})
    fields |= {"model_name": Path(repository.location).name, "init_weights": False}
    return HookedTransformerConfig.from_dict(fields | changes)


def load(repository: Repository, checkpoint: Checkpoint | None, dtype: torch.dtype) -> NativeForCausalLM:
    """The model of a repository on the CPU, with its weights as they are.

    Raises:
        OSError: a file is missing.
        ValueError: the file lacks a weight matrix of the model.
    """
    state = repository.weights(checkpoint.value if checkpoint else None, dtype)
    cfg = config_of(repository, checkpoint, dtype=dtype, device="cpu")
    if any(NORM_WEIGHT.search(name) for name in state):
        # Gains that are there are part of the model, whatever its config says.
        with_gain: dict[str | None, str | None] = {folded: norm for norm, folded in FOLDED.items()}
        cfg.normalization_type = with_gain.get(cfg.normalization_type, cfg.normalization_type)
    model = NativeForCausalLM.from_cfg(cfg).eval()
    missing = [name for name in model.state_dict() if "W_" in name and name not in state]
    if missing:
        raise ValueError(f"the weights of {repository.location!r} lack {', '.join(missing)}")
    model.load_state_dict(completed(state, model.state_dict()))
    return model
