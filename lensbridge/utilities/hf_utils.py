"""What is fetched from the HuggingFace Hub besides models: files, small data sets, settings.

``datasets`` is an optional package, imported where a data set is asked for.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE

from lensbridge.errors import UnknownArgumentError, near_misses

from ._hf_compat import (
    autoconfig_with_remote_post_init_compat,
    autotokenizer_with_special_token_compat,
    enable_hf_numeric_tower,
    make_post_init_kwarg_tolerant,
)
from ._hf_retry import T, call_hf_with_retry, enable_hf_retry

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = [
    "CACHE_DIR",
    "T",
    "autoconfig_with_remote_post_init_compat",
    "autotokenizer_with_special_token_compat",
    "call_hf_with_retry",
    "clear_huggingface_cache",
    "download_file_from_hf",
    "enable_hf_numeric_tower",
    "enable_hf_retry",
    "get_dataset",
    "get_hf_token",
    "get_rotary_pct_from_config",
    "keep_single_column",
    "make_post_init_kwarg_tolerant",
    "select_compatible_kwargs",
]

#: Where the Hub's files are kept on this machine.
CACHE_DIR: str = HF_HUB_CACHE

#: Short names of data sets with a "text" column and 10,000 texts (20,000 for the mixed one).
_SMALL_DATASETS = {
    "openwebtext": "stas/openwebtext-10k",
    "owt": "stas/openwebtext-10k",
    "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k",
    "code": "NeelNanda/code-10k",
    "python": "NeelNanda/code-10k",
    "c4_code": "NeelNanda/c4-code-20k",
    "c4-code": "NeelNanda/c4-code-20k",
    "wiki": "NeelNanda/wiki-10k",
}


def get_hf_token() -> str | None:
    """The access token in the environment variable ``HF_TOKEN``; None if it is unset or empty."""
    return os.environ.get("HF_TOKEN") or None


def get_rotary_pct_from_config(config: Any) -> float:
    """The share of each head's dimensions that are rotated, by a HuggingFace config; 1 where it says nothing.

    transformers 4 wrote ``rotary_pct``, transformers 5 writes ``rope_parameters["partial_rotary_factor"]``. Where
    layers differ, the share most layers have (of equally frequent ones, the first layer's).
    """
    if config is None:
        return 1.0
    layers = [config]
    # Such a config raises when it is asked for a value that its layers do not share.
    if getattr(config, "is_heterogeneous", False):
        layers = [config.per_layer_config[i] for i in range(len(config.per_layer_config))]
    shares = [_rotary_share(layer) for layer in layers]
    return max(shares, key=shares.count, default=1.0)


def _rotary_share(config: Any) -> float:
    if hasattr(config, "rotary_pct"):
        return config.rotary_pct
    rope = getattr(config, "rope_parameters", None)
    return rope.get("partial_rotary_factor", 1.0) if isinstance(rope, dict) else 1.0


def select_compatible_kwargs(kwargs_dict: dict[str, Any], callable: Callable[..., Any]) -> dict[str, Any]:
    """Those entries whose name is a named parameter of ``callable``."""
    named = inspect.signature(callable).parameters
    passable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: value for key, value in kwargs_dict.items() if key in named and named[key].kind in passable}


def download_file_from_hf(
    repo_name: str,
    file_name: str,
    subfolder: str = ".",
    cache_dir: str = CACHE_DIR,
    force_is_torch: bool = False,
    **kwargs: Any,
) -> Any:
    """Download one file of a Hub repository and load it, if it is JSON or torch (``.pth``, or by ``force_is_torch``).

    Of any other file the path is returned. ``kwargs`` go to ``huggingface_hub.hf_hub_download`` (``revision=...``). A
    torch file is unpickled, which runs code that the file names: load only files whose author you trust, or pass
    ``weights_only=True``.

    Raises:
        UnknownArgumentError: ``hf_hub_download`` has no such argument.
    """
    weights_only = kwargs.pop("weights_only", False)
    unknown = kwargs.keys() - select_compatible_kwargs(kwargs, hf_hub_download).keys()
    if unknown:
        known = inspect.signature(hf_hub_download).parameters
        hints = "".join(near_misses(name, known) for name in sorted(unknown))
        raise UnknownArgumentError(f"hf_hub_download takes no argument {', '.join(sorted(unknown))}.{hints}")
    path = call_hf_with_retry(
        hf_hub_download, repo_id=repo_name, filename=file_name, subfolder=subfolder, cache_dir=cache_dir, **kwargs
    )
    if force_is_torch or path.endswith(".pth"):
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    if path.endswith(".json"):
        return json.loads(Path(path).read_text(encoding="utf-8"))
    print("File type not supported:", path.rpartition(".")[2])
    return path


def _delete_protected(path: str) -> None:
    """Second try to delete what could not be deleted: take off a write protection first (Windows needs that)."""
    if not os.path.lexists(path):
        return
    if not os.path.islink(path):
        os.chmod(path, stat.S_IRWXU)
    delete = os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink
    delete(path)


def clear_huggingface_cache() -> None:
    """Delete the Hub's cache on this machine: every model and data set, which will be downloaded again when needed.

    Another process may delete at the same time. What cannot be deleted is named in the output.
    """
    print("Deleting Hugging Face cache directory and all its contents.")

    def try_again(_function: Any, path: str, _error: Any) -> None:
        try:
            _delete_protected(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            print(f"Warning: could not be deleted: {error}")

    on_error: dict[str, Any] = {"onexc" if sys.version_info >= (3, 12) else "onerror": try_again}
    shutil.rmtree(CACHE_DIR, **on_error)


def keep_single_column(dataset: Dataset | IterableDataset, col_name: str) -> Any:
    """A HuggingFace data set with one of its columns only, so that different ones can be mixed.

    Raises:
        ValueError: there is no such column.
    """
    return dataset.select_columns([col_name])


def get_dataset(dataset_name: str, **kwargs: Any) -> Dataset:
    """Download a small data set of texts (column ``"text"``), enough to try things out.

    Names: ``openwebtext`` or ``owt`` (close to GPT-2's training data), ``pile``, ``c4``, ``code`` or ``python``,
    ``c4_code`` (both), ``wiki``. ``kwargs`` go to ``datasets.load_dataset``.

    Raises:
        ValueError: the name is none of those.
        ImportError: datasets, an optional package, is not installed.
    """
    if dataset_name not in _SMALL_DATASETS:
        raise ValueError(
            f"Dataset {dataset_name} not supported. There are {', '.join(_SMALL_DATASETS)}; load any other with "
            "datasets.load_dataset."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "get_dataset needs HuggingFace's datasets; install it with `pip install datasets`."
        ) from error
    return load_dataset(_SMALL_DATASETS[dataset_name], split="train", **kwargs)
