"""Which nnsight envoys does a run use?

nnsight's own would move all inputs to the device of a module's first parameter, which is none of a model's devices
where accelerate keeps parameters elsewhere (meta tensors), and one of several where layers are spread. A run's inputs
are where they have to be already.
"""

from __future__ import annotations

from typing import Any

from nnsight import Envoy, NNsight
from torch import nn


class PartHandle(Envoy):
    """nnsight's handle on a module, which leaves inputs where they are."""

    @property
    def device(self) -> None:
        """Where nnsight is to move inputs: nowhere."""
        return None


class Handle(PartHandle, NNsight):
    """The same on a whole HF model."""

    def __init__(self, hf_model: nn.Module, **options: Any) -> None:
        super().__init__(hf_model, **{"envoys": PartHandle} | options)
