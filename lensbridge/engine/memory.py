"""What does a HuggingFace model keep of a text from one step of a generation to the next?

Nearly always a cache that is made before the first step, passed as ``past_key_values`` and filled in place. Some models
call that argument otherwise; some make what they keep themselves, return it, and want it back; and some keep nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .kv import empty_cache

#: What models call the argument, and the entry of their output.
NAMES = ("past_key_values", "cache_params", "state")
#: Those that are of models which look at the mask of the tokens that they run now, and no others.
OF_STATES = ("cache_params", "state")


class Memory:
    """What one model keeps of one text.

    Args:
        hf_model: the model.
        wanted: whether to keep anything.
    """

    def __init__(self, hf_model: Any, wanted: bool = True) -> None:
        self._hf_model = hf_model
        parameters = inspect.signature(hf_model.forward).parameters
        #: The name of the argument; None where nothing is kept, so that each step runs the whole text.
        self.name = next((name for name in NAMES if name in parameters), None) if wanted else None
        self._makes_it_itself = self.name is not None and not _takes_dynamic_cache(hf_model)
        self._value: Any = None if self.name is None or self._makes_it_itself else empty_cache(hf_model)

    def inputs(self) -> dict[str, Any]:
        """The arguments by which the model gets it."""
        if self.name is None:
            return {"use_cache": False}
        return {"use_cache": True} | ({} if self._value is None else {self.name: self._value})

    def sees_mask(self, past: int) -> bool:
        """Whether a step after ``past`` positions is given the mask of the whole text."""
        return not past or self.name not in OF_STATES

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While open, what the model returns is kept, if it makes that itself."""
        if not self._makes_it_itself:
            yield
            return
        handle = self._hf_model.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, module: Any, args: tuple, output: Any) -> None:
        # The run that measures the order of places keeps nothing.
        if self.name in output:
            self._value = output[self.name]


def _takes_dynamic_cache(hf_model: Any) -> bool:
    """Whether HF's own ``generate`` makes the cache of a model's class."""
    supports = getattr(hf_model, "_supports_default_dynamic_cache", None)
    return supports is None or supports()
