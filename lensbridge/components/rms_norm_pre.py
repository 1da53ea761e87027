"""What is left of an RMSNorm whose gain is folded into what reads it?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ._norms import Norm
from ._parameters import Config


class RMSNormPre(Norm):
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension (TransformerLens' RMSNormPre); no parameters."""

    centres = False

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.add_points()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """The normed input; any leading dimensions."""
        return self.normalise(x)
