"""What can be done with lensbridge from a shell?

Each command is one row of ``COMMANDS``; its module adds its own arguments and returns an exit code. What a user can put
right (a wrong model name, an unwritable path) is shown as one message with exit code 2; anything else is a defect and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console

from lensbridge import __version__
from lensbridge.checking import command as check
from lensbridge.comparing import command as comparing
from lensbridge.demo import command as demo
from lensbridge.errors import LensbridgeError
from lensbridge.listing import hooks, models
from lensbridge.porting import command as porting
from lensbridge.running import command as running


class Command(NamedTuple):
    """A subcommand: its name, its line in the overview, what adds its arguments and what runs it."""

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: tuple[Command, ...] = (
    Command("demo", "look inside a model: induction, indirect objects, activation patching", demo.configure, demo.run),
    Command("check", "whether a model's hook points keep what they promise", check.configure, check.run),
    Command(
        "compare",
        "how far a model is from HuggingFace and TransformerLens, and what each takes",
        comparing.configure,
        comparing.run,
    ),
    Command("hooks", "the hook points of a model, and where they are", hooks.configure, hooks.run),
    Command("models", "families of models, and the names that they go by", models.configure, models.run),
    Command("run", "run a file or notebook that imports transformer_lens", running.configure, running.run),
    Command("port", "rewrite imports of transformer_lens in files", porting.configure, porting.run),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="lensbridge", description="Look inside language models, and change them as they run."
    )
    parser.add_argument("--version", action="version", version=f"lensbridge {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.summary)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.configure(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code, 2 after an error that the user can put right, 130 after an interruption."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (LensbridgeError, OSError) as error:
        if args.debug:
            raise
        Console(stderr=True).print(
            f"lensbridge {args.command}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
