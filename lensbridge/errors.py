"""What can go wrong, as one tree of exceptions.

Each class also inherits the type that TransformerLens 3.9.0 raises in the same place, so code that catches the old type
goes on working, and ``except LensbridgeError`` catches everything raised on purpose here.

    LensbridgeError
    ├── UnknownPointError (KeyError)          no such hook point, or no such weight, on this model
    ├── DisabledPointError (KeyError, AssertionError)   the point exists but its flag is off
    ├── HookError (TypeError, RuntimeError)   a hook returned something that cannot take the activation's place
    ├── ReadOnlyWeightError (RuntimeError)    a write to a weight that is derived, not stored
    ├── UnsupportedModelError (ValueError)    this model, or this option on it, has no exact translation
    ├── ModelNotFoundError (OSError, ValueError)        a name or path that leads to no checkpoint
    ├── DatasetNotFoundError (ConnectionError, FileNotFoundError, ValueError)   a data set that the hub did not give
    ├── SourceNotFoundError (RuntimeError)    the operation that holds a value is not where it should be in HF's code
    ├── UnknownArgumentError (TypeError)      an argument that nobody would read
    ├── TraceError (RuntimeError)             a point's value was asked for outside of a trace, or out of order
    ├── AliasError (ImportError)              ``transformer_lens`` cannot lead here: the real one was imported already
    ├── RemoteRunError (RuntimeError)         a job has failed on the server that has the model
    └── MissingPackageError (ImportError)     a command needs a package that is installed by an extra
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LensbridgeError(Exception):
    """Base class of everything that lensbridge raises on purpose."""

    #: What a server has sent, where it was raised there.
    remote_traceback: str | None = None

    def __str__(self) -> str:
        # KeyError would show the message as a quoted repr.
        return str(self.args[0]) if self.args else ""


class UnknownPointError(LensbridgeError, KeyError):
    """A hook point (or weight) was asked for by a name that this model does not have."""


class DisabledPointError(LensbridgeError, KeyError, AssertionError):
    """A hook point was asked for that exists, but whose config flag (``use_attn_result``, ...) is off."""


class HookError(LensbridgeError, TypeError, RuntimeError):
    """A hook returned a value that cannot take the place of the activation (type, shape or device)."""


class ReadOnlyWeightError(LensbridgeError, RuntimeError):
    """A write was aimed at a weight view that is computed from the model's parameters and cannot carry it back."""


class UnsupportedModelError(LensbridgeError, ValueError):
    """The model, or an option on it, has no exact translation; the message says which part."""


EMBEDDINGS_ALONE = (
    "in this model more goes into the residual stream than embeddings of tokens and positions, so it cannot be put "
    "together from these. What comes of all of it is hook_resid_pre of the first layer: run with stop_at_layer=0"
)


class ModelNotFoundError(LensbridgeError, OSError, ValueError):
    """A model name or path leads to no checkpoint; the message says where it was looked for."""


class DatasetNotFoundError(LensbridgeError, ConnectionError, FileNotFoundError, ValueError):
    """A data set could not be had from the hub or its cache; the message says what to do."""


class SourceNotFoundError(LensbridgeError, RuntimeError):
    """An operation inside HuggingFace's forward (the softmax, say) is not where this version should have it."""


class UnknownArgumentError(LensbridgeError, TypeError):
    """An argument was given that nothing would read."""


class TraceError(LensbridgeError, RuntimeError):
    """The ``value`` of a hook point was used outside of a trace, or after the forward pass had come past it."""


class AliasError(LensbridgeError, ImportError):
    """``transformer_lens`` cannot become an alias of lensbridge, because the real package was imported already."""


class RemoteRunError(LensbridgeError, RuntimeError):
    """A job has failed where the model is; the message has the line of the user's own, and ``remote_traceback`` all."""


class MissingPackageError(LensbridgeError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def near_misses(name: str, known: Iterable[str], limit: int = 4) -> str:
    """A ready phrase naming the closest known names, or an empty string.

    Names are compared without their layer number too, so that a right name with a wrong layer is found.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if not close:
        close = [other for other in names if name and name in other][:limit]
    return f" Closest: {', '.join(close)}." if close else ""
