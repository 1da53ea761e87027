"""How is a notebook run on lensbridge, cell by cell?

In a Jupyter kernel of its own, which is this Python started under the alias (``python -m lensbridge.shim -m
ipykernel_launcher``), in the notebook's directory: no kernel has to be registered, and the notebook is not changed.
What the cells put out goes into a copy, which is written whatever happens.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lensbridge.errors import MissingPackageError

#: Cells with this tag, of Jupyter's own, are expected to fail.
MAY_FAIL = "raises-exception"
#: Seconds that a kernel may take to start: it imports lensbridge, from a cold disk maybe.
STARTUP = 300


@dataclass(frozen=True)
class Cell:
    """A cell with code: its place in the file, its number among those with code, and its text."""

    index: int
    number: int
    source: str

    @property
    def title(self) -> str:
        """The first line that is not empty."""
        return next(line.strip() for line in self.source.splitlines() if line.strip())


@dataclass(frozen=True)
class Failure:
    """What stopped a cell: the traceback, with colours as the terminal takes them."""

    traceback: str
    #: The kernel is gone or busy, so that no other cell can follow.
    is_final: bool = False


class NotebookRun:
    """A notebook whose kernel is running; `open_notebook` makes one."""

    def __init__(self, client: Any, cells: list[Cell]) -> None:
        self.client = client
        self.cells = cells

    def execute(self, cell: Cell) -> Failure | None:
        """Run a cell and keep what it put out; what stopped it, if something did and the cell does not expect it."""
        from nbclient.exceptions import CellTimeoutError, DeadKernelError

        node = self.client.nb.cells[cell.index]
        try:
            self.client.execute_cell(node, cell.index)
        except CellTimeoutError:
            return Failure(f"no answer after {self.client.timeout} seconds (--timeout)", is_final=True)
        except DeadKernelError:
            return Failure("the kernel died (out of memory, or a crash in compiled code)", is_final=True)
        errors = [output for output in node.outputs if output.output_type == "error"]
        if not errors or MAY_FAIL in node.metadata.get("tags", ()):
            return None
        return Failure("\n".join(errors[0].traceback) or f"{errors[0].ename}: {errors[0].evalue}")


@contextmanager
def open_notebook(
    path: Path, output: Path, arguments: Sequence[str] = (), timeout: float | None = None
) -> Iterator[NotebookRun]:
    """Read a notebook and start its kernel; at the end, end the kernel and write the copy.

    Args:
        path: the notebook.
        output: where the copy goes.
        arguments: ``sys.argv[1:]`` in the kernel.
        timeout: seconds that a cell may take.

    Raises:
        MissingPackageError: without the packages of the extra ``notebook``.
        OSError: there is no such file, it is no notebook, or the kernel does not start.
    """
    nbformat, client_class, new_manager = _jupyter()
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise OSError(f"{path} is not a notebook: {error}") from error
    language = notebook.metadata.get("kernelspec", {}).get("language", "python")
    if language != "python":
        raise OSError(f"{path} is a notebook for {language}, not for Python.")
    cells = _code_cells(notebook)
    with TemporaryDirectory(prefix="lensbridge-") as sockets:
        client = client_class(
            notebook,
            km=new_manager(**_transport(sockets)),
            timeout=timeout,
            startup_timeout=STARTUP,
            allow_errors=True,
            resources={"metadata": {"path": str(path.resolve().parent)}},
        )
        try:
            with ExitStack() as kernel:
                try:
                    kernel.enter_context(client.setup_kernel(cleanup_kc=True))
                except RuntimeError as error:
                    raise OSError(f"the kernel for {path} did not start (see above): {error}") from error
                client.kc.execute(f"import sys; sys.argv = {[path.name, *arguments]!r}; del sys", silent=True)
                yield NotebookRun(client, cells)
        finally:
            nbformat.write(notebook, output)


def _transport(folder: str) -> dict[str, str]:
    """Where the kernel listens: sockets in a folder that only this user can read; Windows has none."""
    return {} if os.name == "nt" else {"transport": "ipc", "ip": str(Path(folder) / "kernel")}


def _code_cells(notebook: Any) -> list[Cell]:
    """The cells that have something to run; what they put out earlier is forgotten."""
    cells: list[Cell] = []
    for index, node in enumerate(notebook.cells):
        if node.cell_type == "code":
            node.outputs, node.execution_count = [], None
            if node.source.strip():
                cells.append(Cell(index, len(cells) + 1, node.source))
    return cells


def _jupyter() -> tuple[Any, Any, Any]:
    """nbformat, the class of nbclient's client, and what makes a manager for a kernel: this Python, under the alias."""
    try:
        import ipykernel  # noqa: F401
        import nbformat
        from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
    except ImportError as error:
        raise MissingPackageError(
            f"running a notebook needs Jupyter's kernel and client ({error.name} is missing): "
            "pip install 'lensbridge[notebook]'"
        ) from error
    command = [sys.executable, "-m", "lensbridge.shim", "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class OneKernel(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> Any:
            return KernelSpec(argv=command, display_name="Python on lensbridge", language="python")

    def new_manager(**options: Any) -> Any:
        return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=OneKernel(), **options)

    return nbformat, NotebookClient, new_manager


def elapsed(since: float) -> str:
    """The time since a reading of ``time.perf_counter``, for people."""
    return f"{time.perf_counter() - since:.1f} s"
