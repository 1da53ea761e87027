"""Which model names does TransformerLens 3.9.0 know?

The lists under TransformerLens' names, read from the project's own data file (`model_names`). Loading takes more than
these: any hub id and any directory whose architecture is known.
"""

from __future__ import annotations

from .model_names import table

#: Every hub id of the table.
OFFICIAL_MODEL_NAMES: list[str] = list(table()["names"])

#: Hub id -> the short names that also mean it; without those that have none.
MODEL_ALIASES: dict[str, list[str]] = {name: list(short) for name, short in table()["names"].items() if short}

#: One name for each hub id: its first short name, or itself.
DEFAULT_MODEL_ALIASES: list[str] = [MODEL_ALIASES.get(name, [name])[0] for name in OFFICIAL_MODEL_NAMES]
