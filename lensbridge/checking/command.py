"""What does ``lensbridge check`` do between its arguments and its output?

It gets a hooked model, from a checkpoint or as a tiny random copy of a family, lets `check_model` run it, and prints
what came out.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from lensbridge import HookedTransformer
from lensbridge.checking.hooking import hooked
from lensbridge.checking.known import KNOWN
from lensbridge.checking.outcome import Known
from lensbridge.checking.report import GROUPS, Report, check_model
from lensbridge.errors import ModelNotFoundError
from lensbridge.loading import explaining_where
from lensbridge.measuring import write_record
from lensbridge.model_names import known_names, resolve
from lensbridge.tiny import FAMILIES, tiny_config, tiny_family, tiny_model

#: Parameters up to which the check in another dtype is made, on a copy of the model.
COPIED = 50_000_000

DESCRIPTION = """\
Runs a model on a few random tokens and looks whether its hook points keep what they promise: HuggingFace's own logits
bit by bit, the identities between points, the effects of edits, gradients, padding, generation. A name of a family
(gemma2) or of a HuggingFace class (Gemma2ForCausalLM) is checked on a tiny random copy; --tiny does so for the config
of a checkpoint. A class of one's own is named as package.module:Class. Where a class has no record, one is measured,
and --write puts it into a file as a family's would be. The exit code is 0 if everything holds that is not known not
to."""

STYLES = {"holds": "green", "known": "yellow", "absent": "dim", "fails": "red"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument("model", help="model name, local directory, class or model type")
    parser.add_argument("--tiny", action="store_true", help="check a tiny random copy, made from the model's config")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="check this group only (repeatable)")
    parser.add_argument("--device", help="where to run, as cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--verbose", action="store_true", help="show every check, not only what does not hold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every outcome as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the record that the model is read by")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if everything holds, 1 if not."""
    for file in (args.json, args.write):
        if file is not None and not file.absolute().parent.is_dir():
            # Found out before the checks are made.
            raise FileNotFoundError(f"Cannot write {file}: there is no directory {file.absolute().parent}.")
    model, known = model_of(args.model, args.tiny, args.device)
    groups = args.group
    if groups is None and sum(parameter.numel() for parameter in model.hf_model.parameters()) > COPIED:
        groups = [group for group in GROUPS if group != "bfloat16"]
    report = check_model(model, known, groups)
    print_report(report, Console(), verbose=args.verbose)
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    if args.write is not None:
        args.write.write_text(write_record(model.interior.architecture), encoding="utf-8")
    return 0 if report.holds else 1


def model_of(name: str, tiny: bool = False, device: str | None = None) -> tuple[Any, Known]:
    """The hooked model that a name stands for, without processing, and what is known not to hold on its family.

    Args:
        name: of a checkpoint, or of a family or class, of which a tiny copy is built; where it could be
            either, it is the checkpoint's.
        tiny: build a tiny copy in any case.
        device: where the model goes.

    Raises:
        ModelNotFoundError, UnsupportedModelError: see `HookedTransformer.from_pretrained`.
    """
    if tiny or (is_family(name) and name not in known_names() and not Path(name).is_dir()):
        hf = tiny_copy(name)
        if device is not None:
            hf = hf.to(device)
        model = hooked(hf, name)
    else:
        model = HookedTransformer.from_pretrained_no_processing(name, device=device)
        model.hf_model.eval()
    model_type = model.hf_model.config.model_type
    return model, KNOWN.get(name if name in FAMILIES else model_type, {})


def is_family(name: str) -> bool:
    """Whether a name is that of a family, or of a HuggingFace class."""
    return name in FAMILIES or _class_of(name) is not None


def _class_of(name: str) -> Any:
    """The class that a name stands for, transformers' or in a module of the user's; None if it stands for none."""
    path, colon, attribute = name.rpartition(":")
    if colon and all(map(str.isidentifier, (*path.split("."), attribute))):
        try:
            found = getattr(import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise ModelNotFoundError(f"there is no class {attribute!r} in a module {path!r}: {error}") from error
    else:
        found = getattr(transformers, name, None)
    return found if isinstance(found, type) else None


def tiny_copy(name: str) -> Any:
    """A tiny random model of a family or class, or of a checkpoint's config."""
    if name in FAMILIES:
        return tiny_family(name)
    cls = _class_of(name)
    if cls is not None:
        return tiny_model(tiny_config(cls), model_class=cls)
    location = resolve(name)
    with explaining_where(name, location, OSError, ValueError):
        config = AutoConfig.from_pretrained(location)
    return tiny_model(tiny_config(config))


def print_report(report: Report, console: Console, verbose: bool = False) -> None:
    """A table with a row for each group, then what does not hold."""
    table = Table(title=f"{report.model_class} ({report.model_type})", title_justify="left")
    for column in ("", "holds", "known", "absent", "fails", "largest difference"):
        table.add_column(column, justify="left" if not column else "right")
    for group in report.groups:
        counts = report.counts(group)
        differences = [o.difference for o in report.of(group) if o.difference is not None and o.status == "holds"]
        cells = [f"[{STYLES[s]}]{counts[s]}[/]" if counts[s] else "" for s in ("holds", "known", "absent", "fails")]
        table.add_row(group, *cells, f"{max(differences):.1e}" if differences else "")
    console.print(table)
    shown = report.outcomes if verbose else [o for o in report.outcomes if o.status in ("known", "fails")]
    for outcome in shown:
        line = f"[{STYLES[outcome.status]}]{outcome.status}[/] {outcome.group}: "
        console.print(line, end="", highlight=False)
        detail = f": {outcome.detail}" if outcome.detail else ""
        console.print(f"{outcome.check}{detail}", markup=False, highlight=False, soft_wrap=True)
    console.print("Everything holds." if report.holds else f"{len(report.failures)} checks fail.", highlight=False)
