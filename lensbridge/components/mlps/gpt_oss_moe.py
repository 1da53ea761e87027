"""How do GPT-OSS's experts differ from Mixtral's?

They have biases, clamp what goes into their activation, and are weighted by a softmax over the chosen ones only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...config import HookedTransformerConfig
from ...hook_points import HookPoint
from .moe import MoE

#: How steep the gate's sigmoid is, and how large gate and values may be.
STEEPNESS, LIMIT = 1.702, 7.0


class GptOssExpert(nn.Module):
    """``W_out((up + 1) * gate * sigmoid(1.702 gate))`` with clamped gate and up (TransformerLens' GptOssExpert)."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        assert cfg.d_mlp is not None
        self.W_gate = nn.Linear(cfg.d_model, cfg.d_mlp, dtype=cfg.dtype)
        self.W_in = nn.Linear(cfg.d_model, cfg.d_mlp, dtype=cfg.dtype)
        self.W_out = nn.Linear(cfg.d_mlp, cfg.d_model, dtype=cfg.dtype)
        self.hook_gate = HookPoint()
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What the expert makes of its tokens."""
        gate = self.hook_gate(self.W_gate(x)).clamp(max=LIMIT)
        up = self.hook_pre(self.W_in(x)).clamp(-LIMIT, LIMIT)
        return self.W_out(self.hook_post((up + 1) * gate * torch.sigmoid(gate * STEEPNESS)))


class GptOssMoE(MoE):
    """GPT-OSS's mixture of experts (TransformerLens' GptOssMoE).

    ``hook_expert_weights`` shows the weights spread over all experts, zero for those not chosen.
    """

    calls_idle_experts = False

    def new_expert(self) -> nn.Module:
        """One expert, with biases."""
        return GptOssExpert(self.cfg)

    def new_router(self) -> nn.Linear:
        """What scores the experts for a token, with biases."""
        return nn.Linear(self.cfg.d_model, self.num_experts, dtype=self.cfg.dtype)

    def route(
        self, scores: Float[Tensor, "tokens num_experts"]
    ) -> tuple[Float[Tensor, "tokens experts_per_token"], Int[Tensor, "tokens experts_per_token"]]:
        """As in the base class, with the softmax after the choice."""
        best, experts = torch.topk(scores, self.experts_per_token, dim=-1)
        weights = torch.zeros_like(scores, dtype=torch.float)
        weights = weights.scatter(1, experts, F.softmax(best, dim=-1, dtype=torch.float))
        weights = self.hook_expert_weights(weights)
        experts = self.hook_expert_indices(experts)
        return weights.gather(1, experts), experts
