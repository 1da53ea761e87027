"""Which packages have to be imported before nnsight, so that they can be imported at all?

nnsight gives every object a method ``save``. anyio (which HuggingFace's hub client and Jupyter bring) refuses to define
its sets of attributes when there is a name in them that it does not know. nnsight imports anyio first for that reason;
since anyio 4.16 that no longer imports the modules in which such sets are defined.
"""

from __future__ import annotations

import importlib

try:
    for name in ("anyio.abc._sockets", "anyio.streams.file", "anyio.streams.tls"):
        importlib.import_module(name)
except (ImportError, TypeError):
    # No anyio, or one that has moved them; or nnsight was imported before this package, and it is too late. Nothing
    # else here needs it.
    pass
