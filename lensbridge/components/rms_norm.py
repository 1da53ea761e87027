"""What is an RMSNorm with gain?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._norms import Norm
from ._parameters import Config

#: What can be normed: a residual stream, or queries and keys that were flattened.
RMSNormInput = Float[Tensor, "batch pos length"] | Float[Tensor, "batch_pos length"]


class RMSNorm(Norm):
    """``x / sqrt(mean(x^2) + eps) * w`` over the last dimension (TransformerLens' RMSNorm).

    ``length`` is the size of that dimension; None for ``d_model``.
    """

    centres = False

    def __init__(self, cfg: Config, length: int | None = None) -> None:
        super().__init__(cfg)
        self.length = self.cfg.d_model if length is None else length
        self.w = torch.nn.Parameter(torch.ones(self.length, dtype=self.cfg.dtype))
        self.add_points()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """The normed input; any leading dimensions."""
        return self.normalise(x) * self.w
