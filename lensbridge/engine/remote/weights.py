"""How does a weight of a model that is elsewhere come here? When somebody reads it, once, and to be read only."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .job import Machine

if TYPE_CHECKING:
    from .client import RemoteEngine


class Fetched:
    """The parameters (and buffers) of one model that have been asked for so far.

    Each tensor of the model without weights has this as its attribute ``fetched``, and its name as ``fetched_as``.
    """

    def __init__(self, engine: RemoteEngine) -> None:
        self.engine = engine
        self._here: dict[str, Tensor] = {}
        for named in (engine.hf_model.named_parameters(), engine.hf_model.named_buffers()):
            for name, tensor in named:
                if tensor.is_meta:
                    tensor.fetched, tensor.fetched_as = self, name

    def get(self, tensor: Any) -> Tensor:
        """The values of one tensor."""
        self.bring([tensor])
        return self._here[tensor.fetched_as]

    def bring(self, tensors: Iterable[Any]) -> None:
        """Fetch, as one job, those that are not here."""
        names = {tensor.fetched_as: None for tensor in tensors if getattr(tensor, "fetched", None) is self}
        missing = [name for name in names if name not in self._here]
        if missing:
            from .client import Job

            self._here.update(self.engine.do(partial(_read, names=missing), Job(self.engine)))


def _read(machine: Machine, names: list[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        path, _, last = name.rpartition(".")
        value = getattr(machine.hf_model.get_submodule(path), last)
        # Where several processes hold it together, each has a part.
        found[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found
