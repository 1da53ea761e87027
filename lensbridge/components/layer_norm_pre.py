"""What is left of a LayerNorm whose gain and bias are folded into what reads it?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ._norms import Norm
from ._parameters import Config


class LayerNormPre(Norm):
    """``(x - mean) / sqrt(var + eps)`` over the last dimension (TransformerLens' LayerNormPre); no parameters."""

    centres = True

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.add_points()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """The normed input; any leading dimensions (a head dimension too)."""
        return self.layer_norm(x)
