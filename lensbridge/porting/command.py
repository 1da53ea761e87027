"""What does ``lensbridge port FILE...`` do?

It shows the changes, and makes them with ``--write``. The exit code is 1 if something is left to look at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lensbridge.porting.files import port_file

DESCRIPTION = """\
Rewrites the imports of transformer_lens in Python files and notebooks to lensbridge's, and lists what has no
counterpart. Shows the changes, and makes none without --write. The exit code is 1 if something is left to look at."""

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a Python file (.py) or a notebook (.ipynb)"
    )
    parser.add_argument("--write", action="store_true", help="change the files")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 if something could not be mapped."""
    console = Console(highlight=False)
    # All are read before any is written.
    ports = [port_file(path) for path in args.files]
    remarks = 0
    for port in ports:
        for line in port.diff():
            console.print(Text(line, COLOURS.get(line[:1], "")), soft_wrap=True)
        if port.is_changed and args.write:
            port.write()
        remarks += len(port.remarks)
    if remarks:
        console.print("Left as it is, to look at:", style="bold")
    for port in ports:
        for remark in port.remarks:
            console.print(Text(f"  {remark}"), soft_wrap=True)
    changed = sum(port.is_changed for port in ports)
    verb = "changed" if args.write else "to change (--write does it)"
    console.print(f"{changed} of {len(ports)} files {verb}, {remarks} places to look at.", soft_wrap=True)
    return 1 if remarks else 0
