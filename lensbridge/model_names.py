"""What does a TransformerLens model name stand for?

TransformerLens 3.9.0's names and aliases lie in one data file; any other hub id or local directory stands for itself.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from pathlib import Path

#: The trained model that comes with the package.
BUNDLED = "toy"

#: Training steps for which stanford-crfm's GPT-2 runs and EleutherAI's Pythia suites published checkpoints.
STANFORD_CRFM_CHECKPOINTS = [
    *range(0, 100, 10),
    *range(100, 2000, 50),
    *range(2000, 20000, 100),
    *range(20000, 400001, 1000),
]
PYTHIA_CHECKPOINTS = [0, *(2**power for power in range(10)), *range(1000, 143001, 1000)]
PYTHIA_V0_CHECKPOINTS = [*range(1000, 143001, 1000)]


@lru_cache(maxsize=1)
def table() -> dict:
    """The data file: ``names`` (hub id -> aliases) and ``no_bos_by_default`` (HF classes)."""
    return json.loads((resources.files("lensbridge") / "assets" / "model_names.json").read_text(encoding="utf8"))


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    out: dict[str, str] = {}
    for official, aliases in table()["names"].items():
        out |= {name.lower(): official for name in (official, *aliases)}
    return out


def bundled_path() -> Path:
    """The directory of the bundled model."""
    return Path(str(resources.files("lensbridge") / "assets" / BUNDLED))


def resolve(name: str) -> str:
    """The hub id or directory that a name stands for: a directory as it is, a TransformerLens name or alias (in any
    case), "toy" for the bundled model, anything else as a hub id."""
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name.lower() == BUNDLED:
        return str(bundled_path())
    return _aliases().get(name.lower(), name)


def known_names() -> list[str]:
    """Every TransformerLens name and alias."""
    return [name for official, aliases in table()["names"].items() for name in (official, *aliases)]


def checkpoint_labels(name: str) -> tuple[list[int], str] | None:
    """(training steps with a checkpoint, the prefix of their revisions), or None for a model without checkpoints."""
    if name.startswith("stanford-crfm/"):
        return STANFORD_CRFM_CHECKPOINTS, "checkpoint-"
    if name.startswith("EleutherAI/pythia"):
        return (PYTHIA_V0_CHECKPOINTS if "v0" in name else PYTHIA_CHECKPOINTS), "step"
    return None
