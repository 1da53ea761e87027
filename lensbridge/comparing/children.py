"""How is a tool asked about a model, in a process of its own?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

#: The version that is compared with.
VERSION = "3.9.0"
WORKER = Path(__file__).with_name("worker.py")
#: What keeps a process from writing bars and notices.
SILENCE = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Loading:
    """How each process loads the model.

    Args:
        location: hub id or directory.
        directory: where the model's config lies on this machine.
        reference_name: TransformerLens' name for the model, if it has one.
        loaded_with: what HuggingFace's ``from_pretrained`` is given besides.
    """

    location: str
    directory: str
    dtype: str
    device: str
    attention: str
    reference_name: str | None
    threads: int
    loaded_with: Mapping[str, Any]


def ask(loading: Loading, folder: Path, name: str, **request: Any) -> dict[str, Any]:
    """The answer of a new process to a request; what it failed with, if it did, under "problem"."""
    path = folder / f"{name}.json"
    whole = {**asdict(loading), "folder": str(folder), **request}
    path.write_text(json.dumps(whole), encoding="utf-8")
    # lensbridge may be found by this process in a way that the next one does not know.
    here = str(Path(__file__).parent.parent.parent)
    paths = [entry for entry in (os.environ.get("PYTHONPATH"), here) if entry]
    environment = {**os.environ, **SILENCE, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(path)], env=environment, capture_output=True, text=True, check=False
    )
    answer = path.with_suffix(".answer.json")
    if done.returncode or not answer.exists():
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return {"problem": f"its process ended with code {done.returncode}: {last[0]}"}
    return json.loads(answer.read_text(encoding="utf-8"))


def why_no_reference() -> str | None:
    """Why TransformerLens 3.9.0 cannot be asked on this machine; None if it can."""
    try:
        found = metadata.version("transformer-lens")
    except metadata.PackageNotFoundError:
        return f"transformer-lens is not installed (pip install transformer-lens=={VERSION})"
    return None if found == VERSION else f"transformer-lens {found} is installed, which is not {VERSION}"


def rows_of(batches: Sequence[tuple[str, Any]]) -> list[list[list[int]]]:
    """The tokens of prompts as plain lists."""
    return [tokens.tolist() for _, tokens in batches]
