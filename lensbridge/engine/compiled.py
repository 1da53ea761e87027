"""How does a model run with hooks whose forward, or a part's, was compiled?

Not compiled: hooks do not reach into what torch.compile has made of Python. Its code is put aside for the time of a run
that is watched, left early, or of a part, and is there again behind it. A run that nobody watches is HuggingFace's own,
compiled. Where no module of the model is compiled nothing is put aside: functions that a module calls may be, and those
round as they do in HuggingFace's run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def states_of(hf_model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of each module of a model, among which torch.compile leaves its results."""
    return [module.__dict__ for module in hf_model.modules()]


def uncompiled(states: Sequence[dict[str, Any]]) -> AbstractContextManager[None]:
    """The time in which a model runs as the Python that it was compiled from.

    Args:
        states: see `states_of`.
    """
    for state in states:
        if "_compiled_call_impl" in state:
            return torch.compiler.set_stance("force_eager")
        if "forward" in state and hasattr(state["forward"], "_torchdynamo_orig_callable"):
            return torch.compiler.set_stance("force_eager")
    return nullcontext()
