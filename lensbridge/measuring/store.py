"""Where are measured records kept?

In files, one per class of model, version of transformers and way in which the class may be built: a change of the
class's source, or of an option of the config that is no size, is another file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..architectures.record import Architecture, Block, Layout, Refusal, Softmax
from ..experts import ExpertForm

#: What a record is made of, by name.
PARTS = {cls.__name__: cls for cls in (Architecture, Block, ExpertForm, Layout, Refusal, Softmax)}
#: Entries of a config that say nothing of how the model computes.
SILENT = re.compile(
    r"_.*|transformers_version|architectures|(torch_)?dtype|.*token_(id|index)|id2label|label2id|.*_name"
)
#: To be raised when what a record says changes its meaning.
FORMAT = 1


def directory() -> Path:
    """The directory of measured records: below ``LENSBRIDGE_CACHE``, or the user's cache."""
    root = os.environ.get("LENSBRIDGE_CACHE")
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "lensbridge" / "records"
    return Path(root) / "records"


def path_of(cls: type, hf_config: Any) -> Path:
    """The file for models of a class with a config like this."""
    version = importlib.metadata.version("transformers")
    told = json.dumps([FORMAT, _source(cls), _options(hf_config.to_dict())], sort_keys=True)
    return directory() / f"{cls.__name__}-{version}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"


def _source(cls: type) -> str:
    """The code of the module that defines a class; its name where there is none to be had."""
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError, KeyError):
        return f"{cls.__module__}.{cls.__qualname__}"


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says besides sizes: of a number only whether it is 0, 1 or another."""
    return {key: _kind(value) for key, value in config.items() if isinstance(key, str) and not SILENT.fullmatch(key)}


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _options(value)
    if isinstance(value, list | tuple):
        return sorted({json.dumps(_kind(each), sort_keys=True) for each in value})
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    return value if value in (0, 1) else "number"


def read(path: Path) -> Architecture | None:
    """The record in a file; None if there is no file, or, with a warning, one that cannot be read."""
    try:
        found = from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logging.warning("the measured record in %s is ignored, because it cannot be read: %s", path, error)
        return None
    return found if isinstance(found, Architecture) else None


def write(path: Path, record: Architecture) -> None:
    """Keep a record; where that is not possible, with a warning, it is measured again the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever reads at the same time sees the whole file or none.
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False, suffix=".part") as file:
            json.dump(to_json(record), file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logging.warning("the measured record cannot be kept in %s: %s", path, error)


def to_json(part: Any) -> Any:
    """A record, or a part of one, as JSON has it; only what differs from the defaults."""
    if is_dataclass(part) and not isinstance(part, type):
        return {"is": type(part).__name__} | {name: to_json(value) for name, value in said(part).items()}
    if isinstance(part, Mapping):
        return {"map": [[key, to_json(value)] for key, value in part.items()]}
    if isinstance(part, tuple | list):
        return [to_json(each) for each in part]
    return part


def from_json(data: Any) -> Any:
    """The reverse of `to_json`.

    Raises:
        KeyError, TypeError: if the data is of another version.
    """
    if isinstance(data, list):
        return tuple(map(from_json, data))
    if not isinstance(data, dict):
        return data
    if "map" in data:
        return {key: from_json(value) for key, value in data["map"]}
    return PARTS[data["is"]](**{name: from_json(value) for name, value in data.items() if name != "is"})


def said(part: Any) -> dict[str, Any]:
    """The fields of a part of a record that are not as by default."""
    found = {}
    for each in fields(part):
        value = getattr(part, each.name)
        empty = isinstance(value, Mapping) and not value
        if not empty and value != each.default:
            found[each.name] = value
    return found
