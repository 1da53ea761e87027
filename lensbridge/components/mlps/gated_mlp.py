"""What is the MLP whose neurons are opened by a second projection?"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...hook_points import HookPoint
from .._parameters import Config, bias, weight
from .can_be_used_as_mlp import CanBeUsedAsMLP


class GatedMLP(CanBeUsedAsMLP):
    """``(act(x @ W_gate) * (x @ W_in) + b_in) @ W_out + b_out`` (TransformerLens' GatedMLP).

    ``hook_pre`` is ``x @ W_gate`` and ``hook_pre_linear`` is ``x @ W_in``. With an activation that ends in a norm
    ("solu_ln") there is no product: the norm of ``act(x @ W_gate)`` goes to ``W_out``, as in TransformerLens.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.select_activation_function()
        self.W_in = weight(self.cfg.d_model, self.d_mlp, cfg=self.cfg)
        self.W_out = weight(self.d_mlp, self.cfg.d_model, cfg=self.cfg)
        self.W_gate = weight(self.cfg.d_model, self.d_mlp, cfg=self.cfg)
        self.b_in = bias(self.d_mlp, cfg=self.cfg)
        self.b_out = bias(self.cfg.d_model, cfg=self.cfg)
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        pre = self.hook_pre(F.linear(x, self.W_gate.t()))
        if self.cfg.is_layer_norm_activation():
            post = self.normed_activation(pre)
        else:
            post = self.act_fn(pre) * self.hook_pre_linear(F.linear(x, self.W_in.t())) + self.b_in
        return F.linear(self.hook_post(post), self.W_out.t(), self.b_out)
