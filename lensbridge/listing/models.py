"""What does ``lensbridge models`` print?

The families with what was found of them (the table of docs/families.md, which the package carries as data), and the
names that TransformerLens 3.9.0 has for models of each.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from rich.console import Console
from rich.text import Text

from lensbridge import __version__
from lensbridge.architectures import BY_CLASS
from lensbridge.architectures.irregular import REFUSED
from lensbridge.checking.families import family_class, refusal
from lensbridge.errors import ModelNotFoundError, near_misses
from lensbridge.model_names import BUNDLED, known_names, table
from lensbridge.tiny import FAMILIES

#: What the format of ``--json`` is called; it changes with the format.
SCHEMA = "lensbridge-models/1"
#: The family of models that HuggingFace has no class for.
OWN_FORMAT = "TransformerLens' own format"
#: HuggingFace classes that TransformerLens' encoders are loaded from, by the class that loads them here.
ENCODERS = {
    "BertForMaskedLM": "HookedEncoder",
    "T5ForConditionalGeneration": "HookedEncoderDecoder",
    "HubertModel": "HookedAudioEncoder",
    "Wav2Vec2Model": "HookedAudioEncoder",
}
DESCRIPTION = """\
Lists the families of models, with what was checked of each on a tiny random model of it (docs/families.md says what the
columns mean), and TransformerLens 3.9.0's names for models. Any other hub id or directory of such a family can be
loaded by its own name. With SEARCH, only what has it in the name of a family, class, hub id or alias."""


@dataclass(frozen=True)
class Name:
    """A model that TransformerLens 3.9.0 knows: its hub id and short names, and whether it can be loaded here."""

    hub_id: str
    aliases: tuple[str, ...]
    family: str
    hf_class: str
    served: bool


@dataclass(frozen=True)
class Family:
    """A family: its HuggingFace class, why it is not served if it is not, and what was found of it, by column."""

    key: str
    hf_class: str
    not_served: str | None
    found: dict[str, str] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        """Whether models of the family can be loaded."""
        return self.not_served is None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("search", nargs="?", metavar="SEARCH", help="part of a family, class, hub id or alias")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if something fits."""
    families, names = found_by(args.search)
    if args.json:
        print(json.dumps(as_json(families, names), indent=1))
    else:
        print_models(families, names, args.search is None, Console())
    return 0


# --- what there is ----------------------------------------------------------------------------------------------------


def _asset(name: str) -> Any:
    return json.loads((resources.files("lensbridge") / "assets" / name).read_text(encoding="utf8"))


@lru_cache(maxsize=1)
def all_families() -> tuple[Family, ...]:
    """Every family that there is a tiny model of, served or not; of one that was never checked nothing is found."""
    rows: dict[str, dict[str, str]] = _asset("families.json")["families"]
    found = []
    for key in FAMILIES:
        row = rows.get(key, {})
        cells = {name: cell for name, cell in row.items() if name not in ("class", "not served")}
        found.append(Family(key, family_class(key), None if cells else _why_not_served(key), cells))
    return tuple(found)


def _why_not_served(key: str) -> str | None:
    """Why models of a family cannot be loaded; None if they can."""
    record = BY_CLASS.get(family_class(key))
    if record is not None:
        return refusal(key) if record.refused else None
    reasons = REFUSED.get(key.partition("@")[0])
    return reasons[1] if reasons else "there is no record of it"


@lru_cache(maxsize=1)
def all_names() -> tuple[Name, ...]:
    """Every model of TransformerLens 3.9.0's table, and the bundled one."""
    by_class: dict[str, list[str]] = _asset("model_architectures.json")["architectures"]
    classes = {hub_id: hf_class for hf_class, ids in by_class.items() for hub_id in ids}
    families = {family.hf_class: family for family in reversed(all_families()) if "@" not in family.key}
    found = [Name(BUNDLED, (), "gpt2", "GPT2LMHeadModel", True)]
    for hub_id, aliases in table()["names"].items():
        hf_class = classes.get(hub_id, "")
        family = families.get(hf_class)
        key = family.key if family else ENCODERS.get(hf_class, OWN_FORMAT if not hf_class else "")
        served = family.served if family else bool(key)
        found.append(Name(hub_id, tuple(aliases), key, hf_class, served))
    return tuple(found)


def found_by(search: str | None) -> tuple[list[Family], list[Name]]:
    """The families and models whose names have a text in them, in any case; everything without one.

    A family that fits brings its models, and a model its family.

    Raises:
        ModelNotFoundError: if nothing fits.
    """
    if search is None:
        return list(all_families()), list(all_names())
    wanted = search.lower()
    own = {each.key for each in all_families() if wanted in each.key.lower() or wanted in each.hf_class.lower()}
    names = [
        each
        for each in all_names()
        if each.family in own or any(wanted in name.lower() for name in (each.hub_id, *each.aliases, each.family))
    ]
    keys = own | {each.family for each in names}
    families = [each for each in all_families() if each.key in keys]
    if not families and not names:
        known = [*(each.key for each in all_families()), *known_names()]
        raise ModelNotFoundError(
            f"nothing here is called {search!r}.{near_misses(search, known)} A model that is not listed can be loaded "
            "by its hub id or directory, if its family is served"
        )
    return families, names


# --- how it is shown --------------------------------------------------------------------------------------------------


def as_json(families: list[Family], names: list[Name]) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "schema": SCHEMA,
        "lensbridge": __version__,
        "families": [{**asdict(family), "served": family.served} for family in families],
        "models": [asdict(name) for name in names],
    }


def print_models(families: list[Family], names: list[Name], brief: bool, console: Console) -> None:
    """A line for each family, and one for each name; if ``brief``, of the names only how many there are."""
    counts = Counter(name.family for name in names)
    lines = [(each.key, each.hf_class, _words(each, counts[each.key])) for each in families]
    _print_columns(lines, [not each.served for each in families], console)
    if brief:
        served = sum(name.served for name in names)
        console.print(
            f"{sum(family.served for family in families)} families are served. TransformerLens 3.9.0 names "
            f"{len(names) - 1} models, of which {served - 1} can be loaded; lensbridge models SEARCH lists them.",
            highlight=False,
            soft_wrap=True,
        )
        return
    if families and names:
        console.print()
    rows = [(each.hub_id, each.family or f"{each.hf_class}, not served", ", ".join(each.aliases)) for each in names]
    _print_columns(rows, [not each.served for each in names], console)


def _words(family: Family, n_names: int) -> str:
    """What is to be said of a family, in a line."""
    if family.not_served is not None:
        return f"not served: {family.not_served}"
    checks = {name: cell for name, cell in family.found.items() if name not in ("vocabulary", "points", "3.9.0")}
    parts = [
        family.found.get("vocabulary", ""),
        "; ".join(f"{name}: {cell}" for name, cell in checks.items() if cell != "all"),
        "compared with 3.9.0" if family.found.get("3.9.0") else "",
        f"{n_names} names in 3.9.0" if n_names else "",
    ]
    return ", ".join(part for part in parts if part) or "served"


def _print_columns(rows: Sequence[tuple[str, str, str]], dim: Sequence[bool], console: Console) -> None:
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    for row, faint in zip(rows, dim, strict=True):
        line = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip()
        console.print(Text(line, style="dim" if faint else ""), soft_wrap=True)
