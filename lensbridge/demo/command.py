"""What does ``lensbridge demo`` do between its arguments and its output?

Load, measure, print, write: everything that is computed lies in the analyses, everything that is drawn in the report
and the page.
"""

from __future__ import annotations

import argparse
import json
import webbrowser
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from lensbridge import HookedTransformer, __version__
from lensbridge.demo.analyses import DemoResult, run_demo
from lensbridge.demo.heads import Head
from lensbridge.demo.page import render_page
from lensbridge.demo.report import print_report
from lensbridge.demo.words import all_words
from lensbridge.threads import threads_for

DEFAULT_PAGE = Path("lensbridge-demo.html")

DESCRIPTION = """\
Looks inside a model in three ways: induction heads on repeated random tokens, direct logit attribution on
indirect-object prompts, and activation patching. Prints what it finds and writes one page that needs no network."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "model", nargs="?", default="toy", help="model name or local directory (default: the bundled toy)"
    )
    parser.add_argument(
        "--html", type=Path, default=DEFAULT_PAGE, metavar="PATH", help="page to write (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every number as JSON")
    parser.add_argument("--device", help="where to run, as cpu, cuda or mps (default: the best there is)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of tokens, prompts and random heads (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="measure on fewer inputs")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.add_argument("--open", action="store_true", help="open the page in a browser afterwards")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 on success."""
    console = Console()
    for path in filter(None, (args.html, args.json)):
        # Found out before the minutes that the analyses may take.
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"Cannot write {path}: there is no directory {path.absolute().parent}.")
    if args.no_progress:
        # The bar that transformers shows while it reads weights.
        disable_progress_bar()
    model = HookedTransformer.from_pretrained(args.model, device=args.device)
    with threads_for(model):
        result = run_demo(model, args.model, seed=args.seed, quick=args.quick, progress=not args.no_progress)
    print_report(result, console)
    args.html.write_text(render_page(result, __version__), encoding="utf-8")
    console.print(f"Page: {args.html}", soft_wrap=True, highlight=False)
    if args.json is not None:
        text = json.dumps(as_json(result, __version__), indent=1, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")
        console.print(f"Numbers: {args.json}", soft_wrap=True, highlight=False)
    if args.open:
        webbrowser.open(args.html.absolute().as_uri())
    return 0


def as_json(result: DemoResult, version: str) -> dict[str, Any]:
    """Every number of the result, and the words for them; ``version`` is that of lensbridge."""
    words = {name: _plain(part) for name, part in all_words(result).items()}
    return {"lensbridge": version, **_plain(result), "words": words}


def _plain(value: Any) -> Any:
    """A result as plain lists, dicts and numbers; heads as ``"L2H1"`` and what was not measured as null."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if value != value else value
