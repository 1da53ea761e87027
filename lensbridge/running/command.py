"""What does ``lensbridge run FILE`` do?

A file ending in .ipynb is run as a notebook, anything else as ``python FILE`` would run it, both with
``transformer_lens`` as an alias of lensbridge. What follows FILE belongs to the program, but for a notebook, whose
options may follow it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lensbridge import shim
from lensbridge.running import python
from lensbridge.running.notebook import elapsed, open_notebook

DESCRIPTION = """\
Runs a Python file or a notebook that imports transformer_lens, unchanged, on lensbridge. Of a notebook, a copy with the
cells' output is written. The exit code is the program's; for a notebook, 1 if a cell failed."""


def _notebook_options() -> argparse.ArgumentParser:
    """Options that only a notebook takes, before or after its name."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = options.add_argument_group("for notebooks")
    # Left out where they are not given, so that a second reading keeps what the first one found.
    group.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="where the executed copy goes (default: NAME.out.ipynb beside the notebook)",
    )
    group.add_argument(
        "--keep-going",
        action="store_true",
        default=argparse.SUPPRESS,
        help="run the cells after one that failed, too",
    )
    group.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        default=argparse.SUPPRESS,
        help="the most that one cell may take (default: no limit)",
    )
    return options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    for group in _notebook_options()._action_groups[2:]:
        copied = parser.add_argument_group(group.title)
        for action in group._group_actions:
            copied._add_action(action)
    parser.add_argument("file", type=Path, metavar="FILE", help="a notebook (.ipynb) or a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program finds in sys.argv")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is the program's."""
    if not args.file.is_file():
        raise FileNotFoundError(f"There is no file {args.file}.")
    if args.file.suffix != ".ipynb":
        shim.install()
        return python.run_file(args.file, args.arguments)
    args, arguments = _notebook_options().parse_known_args(args.arguments, args)
    output = getattr(args, "output", args.file.with_suffix(".out.ipynb"))
    if not output.absolute().parent.is_dir():
        # Found out before the minutes that the cells may take.
        raise FileNotFoundError(f"Cannot write {output}: there is no directory {output.absolute().parent}.")
    return run_notebook(
        args.file, output, arguments, getattr(args, "keep_going", False), getattr(args, "timeout", None)
    )


def run_notebook(
    path: Path, output: Path, arguments: list[str], keep_going: bool = False, timeout: float | None = None
) -> int:
    """Run a notebook's cells and show how far it is; 1 if a cell failed."""
    console = Console()
    failed, began = 0, time.perf_counter()
    with open_notebook(path, output, arguments, timeout) as notebook:
        total = len(notebook.cells)
        for cell in notebook.cells:
            label, since = f"[{cell.number:>{len(str(total))}}/{total}] {cell.title}", time.perf_counter()
            with console.status(Text(label)):
                failure = notebook.execute(cell)
            mark = Text("failed ", "bold red") if failure else Text("ok     ", "green")
            console.print(Text.assemble(mark, Text(f"{elapsed(since):>8}  ", "dim"), label), soft_wrap=True)
            if failure is not None:
                failed += 1
                console.print(Text.from_ansi(failure.traceback), soft_wrap=True)
                if failure.is_final or not keep_going:
                    left = total - cell.number
                    console.print(f"{left} cells were not run." if left else "It was the last cell.", style="bold")
                    break
    verdict = f"{failed} of {total} cells failed" if failed else f"all {total} cells ran"
    console.print(f"{verdict}, in {elapsed(began)}. Output: {output}", highlight=False, soft_wrap=True)
    return 1 if failed else 0
