"""What is the plain MLP?"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...hook_points import HookPoint
from .._parameters import Config, bias, weight
from .can_be_used_as_mlp import CanBeUsedAsMLP


class MLP(CanBeUsedAsMLP):
    """``act(x @ W_in + b_in) @ W_out + b_out`` (TransformerLens' MLP)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.select_activation_function()
        self.W_in = weight(self.cfg.d_model, self.d_mlp, cfg=self.cfg)
        self.b_in = bias(self.d_mlp, cfg=self.cfg)
        self.W_out = weight(self.d_mlp, self.cfg.d_model, cfg=self.cfg)
        self.b_out = bias(self.cfg.d_model, cfg=self.cfg)
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        pre = self.hook_pre(F.linear(x, self.W_in.t(), self.b_in))
        post = self.normed_activation(pre) if self.cfg.is_layer_norm_activation() else self.act_fn(pre)
        return F.linear(self.hook_post(post), self.W_out.t(), self.b_out)
