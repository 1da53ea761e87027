"""What is a LayerNorm with gain and bias?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._norms import Norm
from ._parameters import Config, bias


class LayerNorm(Norm):
    """``(x - mean) / sqrt(var + eps) * w + b`` over the last dimension (TransformerLens' LayerNorm).

    ``length`` is the size of that dimension; None for ``d_model``.
    """

    centres = True

    def __init__(self, cfg: Config, length: int | None = None) -> None:
        super().__init__(cfg)
        self.length = self.cfg.d_model if length is None else length
        self.w = torch.nn.Parameter(torch.ones(self.length, dtype=self.cfg.dtype))
        self.b = bias(self.length, cfg=self.cfg)
        self.add_points()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """The normed input; any leading dimensions (a head dimension too)."""
        return self.layer_norm(x, self.w, self.b)
