"""What does ``lensbridge models`` print?

The families with what was found of them (the table of docs/families.md, which the package carries as data), and the names
that TransformerLens 3.9.0 has for models of each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lensbridge import __version__
from lensbridge.errors import ModelNotFoundError, near_misses
from lensbridge.model_names import BUNDLED, table

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
columns mean), and TransformerLens 3.9.0's names for models. Any other hub id or directory of such a family can be loaded
by its own name. With SEARCH, only what has it in the name of a family, class, hub id or alias."""


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
    """Every family, served or not."""
    rows: dict[str, dict[str, str]] = _asset("families.json")["families"]
    return tuple(
        Family(
            key,
            row["class"],
            row.get("not served"),
            {name: cell for name, cell in row.items() if name not in ("class", "not served")},
        )
        for key, row in rows.items()
    )


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
        known = [*(each.key for each in all_families()), *(name.hub_id for name in all_names())]
        raise ModelNotFoundError(
            f"nothing here is called {search!r}.{near_misses(search, known)} A model that is not listed can be loaded by "
            "its hub id or directory, if its family is"
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
    """A table of families and one of names; if ``brief``, of the names only how many there are."""
    if families:
        _print_families(families, names, console)
    if brief:
        served = sum(name.served for name in names)
        console.print(
            f"{sum(family.served for family in families)} families are served. TransformerLens 3.9.0 names "
            f"{len(names) - 1} models, of which {served - 1} can be loaded; lensbridge models SEARCH lists them.",
            highlight=False,
        )
    elif names:
        _print_names(names, console)
    for family in [] if brief else families:
        if family.not_served:
            console.print(f"{family.key} is not served: {family.not_served}", markup=False, highlight=False)


def _print_families(families: list[Family], names: list[Name], console: Console) -> None:
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("family", "class", "points inside", "as HuggingFace", "next to 3.9.0"):
        grid.add_column(column, overflow="fold")
    grid.add_column("3.9.0's names", justify="right")
    for family in families:
        own = sum(name.family == family.key for name in names)
        cells = (
            ("not served", "", "")
            if family.not_served
            else (
                family.found.get("vocabulary", ""),
                _all_of(family),
                "compared" if family.found.get("3.9.0") else "",
            )
        )
        style = "dim" if family.not_served else ""
        grid.add_row(escape(family.key), family.hf_class, *cells, str(own) if own else "", style=style)
    console.print(grid)


def _all_of(family: Family) -> str:
    """In a word, what was found of everything that is checked."""
    others = {name: cell for name, cell in family.found.items() if name not in ("vocabulary", "points", "3.9.0")}
    short = [f"{name}: {cell}" for name, cell in others.items() if cell != "all"]
    return "; ".join(short) or "all checks"


def _print_names(names: list[Name], console: Console) -> None:
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("hub id", "3.9.0's short names", "family"):
        grid.add_column(column, overflow="fold")
    for name in names:
        family = name.family if name.served else f"{name.hf_class}, not served"
        grid.add_row(escape(name.hub_id), ", ".join(name.aliases), family, style="" if name.served else "dim")
    console.print(grid)
