"""What went wrong in a job, in the terms of who wrote the hook?

A server sends the text of a traceback. Its last line says what was raised, and its frames say where: those of the
user's own files, which keep their names and lines on the way there, are what the error is about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nnsight.intervention.backends.remote import RemoteError

from ... import errors
from ...errors import LensbridgeError, RemoteRunError
from .shipping import PACKAGE

_FRAME = re.compile(r'File "(?:\[[^\]]*\] )?(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n?(?P<code>[^\n]*)')
_RAISED = re.compile(r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Warning|Exit))(?:: (?P<text>.*))?$", re.M)
#: Whose frames are none of the user's.
_LIBRARIES = ("site-packages", "dist-packages", "<frozen", "/lib/python", "nnsight", f"{PACKAGE}/", f"/{PACKAGE}/")


@contextmanager
def explained() -> Iterator[None]:
    """Turn the text that a server sends into an error.

    Raises:
        RemoteRunError: the job has failed; or the error of ours that was raised in it.
    """
    try:
        yield
    except RemoteError as error:
        raise _error(str(error)) from None


def _error(text: str) -> LensbridgeError:
    raised = list(_RAISED.finditer(text))
    what = raised[-1] if raised else None
    name = "" if what is None else what["type"].rpartition(".")[2]
    message = text.strip() if what is None else text[what.start() :].strip()
    frames = [f for f in _FRAME.finditer(text) if not any(word in f["file"] for word in _LIBRARIES)]
    where = "" if not frames else f"\n  in {frames[-1]['name']}, {frames[-1]['file']}:{frames[-1]['line']}"
    code = frames[-1]["code"].strip() if frames else ""
    where += f"\n    {code}" if code and not code.startswith("File ") else ""
    own = getattr(errors, name, None)
    missing = re.search(r"No module named '([\w.]+)'", message)
    advice = (
        f"\nThe server has no package {missing[1]!r}: what a hook uses there has to be torch, numpy and Python's own."
        if missing
        else ""
    )
    if isinstance(own, type) and issubclass(own, LensbridgeError) and what is not None:
        found = own(f"{what['text'] or ''}{where}")
    else:
        found = RemoteRunError(f"the job failed on the server: {message}{where}{advice}")
    found.remote_traceback = text
    return found
