"""How does a model run with hooks whose forward, or a part's, was compiled?

Not compiled: hooks do not reach into what torch.compile has made of Python. Its code is put aside for the time of a run
that is watched, left early, or of a part, and is there again behind it. A run that nobody watches is HuggingFace's own,
compiled.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def uncompiled() -> AbstractContextManager[None]:
    """The time in which what was compiled runs as the Python that it was made of (some 7 microseconds)."""
    return torch.compiler.set_stance("force_eager")
