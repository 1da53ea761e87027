"""What does ``lensbridge compare`` do between its arguments and its output?

It loads the model and tokenizes the prompts, compares with HuggingFace in this process and with TransformerLens in
another, has time and memory measured, prints, and writes. The exit code is 0 if every promise holds, 1 if one is
broken.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from lensbridge import HookedTransformer, __version__
from lensbridge.architectures import BY_MODEL_TYPE
from lensbridge.comparing.children import Loading
from lensbridge.comparing.costs import costs_of
from lensbridge.comparing.gaps import tolerance_of
from lensbridge.comparing.huggingface import HuggingFaceComparison
from lensbridge.comparing.page import render_page
from lensbridge.comparing.prompts import read_prompts, token_batches
from lensbridge.comparing.reference import ReferenceComparison
from lensbridge.comparing.report import print_report
from lensbridge.comparing.result import PROCESSED, RAW, Basis, Comparison, Setting
from lensbridge.errors import UnsupportedModelError
from lensbridge.loading import DTYPE_FROM_STRING
from lensbridge.model_names import resolve, table
from lensbridge.points import POINTS
from lensbridge.threads import threads_for

DESCRIPTION = """\
Shows how far a model's points and logits are from HuggingFace's own forward and from TransformerLens 3.9.0 on prompts
of yours, and what each takes in time and memory. TransformerLens runs in a process of its own, if it is installed. The
exit code is 0 if every promise holds: logits equal to HuggingFace's bit by bit without processing, log probabilities
and points within the tolerance; 1 if one is broken; 2 if something could not be run at all."""

PACKAGES = ("torch", "transformers", "nnsight", "transformer-lens")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "model", nargs="?", default="toy", help="model name, hub id or directory (default: the bundled toy)"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="run on this text (repeatable)")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="run on the lines of a file")
    bases = parser.add_mutually_exclusive_group()
    bases.add_argument(
        "--processing", action="store_true", help="compare with the default processing only (default: with and without)"
    )
    bases.add_argument("--no-processing", action="store_true", help="compare without processing only")
    parser.add_argument("--dtype", choices=list(DTYPE_FROM_STRING), default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", help="where to run, as cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write one page that needs no network")
    parser.add_argument("--without-reference", action="store_true", help="leave TransformerLens out")
    parser.add_argument(
        "--reference-name", metavar="NAME", help="TransformerLens' name for the model, where MODEL is a directory"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        metavar="N",
        help="rounds of each timed task, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and print the promises only")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if every promise holds, 1 if not."""
    for file in (args.json, args.html):
        if file is not None and not file.absolute().parent.is_dir():
            # Found out before the minutes that the comparison may take.
            raise FileNotFoundError(f"Cannot write {file}: there is no directory {file.absolute().parent}.")
    prompts = args.prompt if args.prompts is None else read_prompts(args.prompts)
    if args.quiet:
        # The bar that transformers shows while it reads weights.
        disable_progress_bar()
    with redirect_stdout(io.StringIO() if args.quiet else sys.stdout):
        model = HookedTransformer.from_pretrained_no_processing(
            args.model, device=args.device, dtype=DTYPE_FROM_STRING[args.dtype]
        )
    if model.interior.__class__.__module__.startswith("lensbridge.native"):
        raise UnsupportedModelError(
            f"{args.model!r} is in TransformerLens' own format: HuggingFace has no model of it to compare with"
        )
    model.hf_model.eval()
    bases: tuple[Basis, ...] = (RAW,) if args.no_processing else (PROCESSED,) if args.processing else (RAW, PROCESSED)
    with threads_for(model):
        comparison = compare(
            model,
            args.model,
            token_batches(model, prompts),
            bases,
            rounds=args.rounds,
            reference=not args.without_reference,
            reference_name=args.reference_name,
            quiet=args.quiet,
        )
    _show(comparison, args)
    return 0 if comparison.holds else 1


def _show(comparison: Comparison, args: argparse.Namespace) -> None:
    console = Console()
    print_report(comparison, console, brief=args.quiet)
    if args.json is not None:
        text = json.dumps(comparison.as_json(), indent=1, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.html is not None:
        args.html.write_text(render_page(comparison, __version__), encoding="utf-8")
    if not args.quiet:
        for title, file in (("Numbers", args.json), ("Page", args.html)):
            if file is not None:
                console.print(f"{title}: {file}", soft_wrap=True, highlight=False)


def compare(
    model: Any,
    name: str,
    batches: Sequence[tuple[str, Tensor]],
    bases: Sequence[Basis] = (RAW, PROCESSED),
    *,
    rounds: int = 9,
    reference: bool = True,
    reference_name: str | None = None,
    quiet: bool = True,
) -> Comparison:
    """Compare a hooked model with HuggingFace's own forward and with TransformerLens.

    Args:
        model: a `HookedTransformer` on a HuggingFace model, without processing, in eval mode.
        name: what it was loaded by: the other processes load it again.
        batches: (what to call it, tokens) of each prompt.
        bases: whether values are compared without processing, with the default processing, or both.
        rounds: how often each task is timed; 0 leaves time and memory out.
        reference: whether TransformerLens is asked.
        reference_name: what TransformerLens calls the model, where ``name`` is a directory.
        quiet: no progress bar.
    """
    tolerance = tolerance_of(model.cfg.dtype)
    loading = _loading(model, name, reference_name) if reference or rounds else None
    total = len(batches) * len(bases) + (len(bases) if reference else 0) + (2 + reference if rounds else 0)
    with tqdm(total=total, disable=quiet, leave=False) as bar, tempfile.TemporaryDirectory() as folder:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        own = HuggingFaceComparison(bases, tolerance)
        for _, tokens in batches:
            own.add(model, tokens, step)
        differences, promises, notes = own.differences(), own.promises(), list[str]()
        if reference and loading is not None:
            theirs = ReferenceComparison(bases, tolerance)
            theirs.run(model, batches, loading, Path(folder), step)
            differences += theirs.differences()
            promises += theirs.promises()
            notes += theirs.remarks()
        costs = []
        if rounds and loading is not None:
            costs = costs_of(
                model,
                batches,
                loading,
                Path(folder),
                processing=PROCESSED in bases,
                rounds=rounds,
                reference=reference,
                step=step,
            )
    setting = _setting(model, name, batches, bases, tolerance, rounds, torch.get_num_threads())
    return Comparison(setting, tuple(differences), tuple(promises), tuple(costs), absent_points(model), tuple(notes))


def _loading(model: Any, name: str, reference_name: str | None) -> Loading:
    """How the other processes load the model."""
    location, hf = resolve(name), model.hf_model
    if Path(location).is_dir():
        directory = location
    else:
        found = cached_file(location, "config.json")
        directory = str(Path(found).parent) if found else location
    model_type = hf.config.model_type
    return Loading(
        location=location,
        directory=directory,
        dtype=str(hf.dtype).removeprefix("torch."),
        device=str(model.cfg.device),
        attention=hf.config._attn_implementation,
        reference_name=reference_name or (location if location in table()["names"] else None),
        threads=torch.get_num_threads(),
        loaded_with=BY_MODEL_TYPE[model_type].loaded_with if model_type in BY_MODEL_TYPE else {},
    )


def _setting(
    model: Any,
    name: str,
    batches: Sequence[tuple[str, Tensor]],
    bases: Sequence[Basis],
    tolerance: float,
    rounds: int,
    threads: int,
) -> Setting:
    hf = model.hf_model
    versions = {"lensbridge": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return Setting(
        model=name,
        hf_class=type(hf).__name__,
        model_type=hf.config.model_type,
        n_layers=model.cfg.n_layers,
        n_parameters=sum(parameter.numel() for parameter in hf.parameters()),
        dtype=str(hf.dtype).removeprefix("torch."),
        device=str(model.cfg.device),
        attention=str(hf.config._attn_implementation),
        prompts=tuple(prompt for prompt, _ in batches),
        lengths=tuple(tokens.shape[1] for _, tokens in batches),
        bases=tuple(bases),
        tolerance=tolerance,
        rounds=rounds,
        threads=threads,
        versions=versions,
    )


def absent_points(model: Any) -> dict[str, tuple[str, ...]]:
    """Kind of point -> why the model lacks it, in some layer or in all."""
    interior, found = model.interior, dict[str, tuple[str, ...]]()
    for kind in dict.fromkeys(point.name for point in POINTS):
        layers = range(model.cfg.n_layers) if "{l}" in kind else (0,)
        names = [kind.replace("{l}", str(layer)).replace("{e}", "0") for layer in layers]
        reasons = [interior.why_absent(name) for name in names if name not in interior.own_points]
        if reasons:
            found[kind] = tuple(dict.fromkeys(reason for reason in reasons if reason))
    return found
