"""What is an MLP made of experts, of which each token is sent to a few?

The router scores the experts for each token; the best ``experts_per_token`` compute, and their outputs are added,
weighted. An expert sees its tokens as one flat batch, ``[tokens, d_model]``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...config import HookedTransformerConfig
from ...hook_points import HookPoint
from .._parameters import Config
from .can_be_used_as_mlp import CanBeUsedAsMLP, pick_activation


class MoEGatedMLP(nn.Module):
    """One expert: ``W_out(act(W_gate(x)) * W_in(x))``, with ``nn.Linear`` weights (TransformerLens' MoEGatedMLP).

    Raises:
        ValueError: the config has no ``d_mlp``.
    """

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.d_mlp is None:
            raise ValueError("an expert needs cfg.d_mlp")
        self.d_mlp = cfg.d_mlp
        self.W_in = nn.Linear(cfg.d_model, self.d_mlp, bias=False, dtype=cfg.dtype)
        self.W_out = nn.Linear(self.d_mlp, cfg.d_model, bias=False, dtype=cfg.dtype)
        self.W_gate = nn.Linear(cfg.d_model, self.d_mlp, bias=False, dtype=cfg.dtype)
        self.hook_gate = HookPoint()
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()
        self.act_fn = pick_activation(cfg)

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What the expert makes of its tokens."""
        gate = self.hook_gate(self.W_gate(x))
        return self.W_out(self.hook_post(self.act_fn(gate) * self.hook_pre(self.W_in(x))))


class MoE(CanBeUsedAsMLP):
    """Mixtral's mixture of experts (TransformerLens' MoE).

    ``hook_expert_weights`` shows the softmax over all experts ``[batch * pos, num_experts]``, ``hook_expert_indices``
    the chosen ones ``[batch * pos, experts_per_token]``.

    Raises:
        AssertionError: ``num_experts`` or ``experts_per_token`` is missing, or the second is larger.
    """

    #: Whether the hook points of an expert that has no token fire, with empty tensors.
    calls_idle_experts: ClassVar[bool] = True

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        n_experts, chosen = self.cfg.num_experts, self.cfg.experts_per_token
        if n_experts is None or not chosen or chosen > n_experts:
            raise AssertionError(
                f"a mixture of experts needs num_experts and experts_per_token, at most as many, not {n_experts!r} and "
                f"{chosen!r}"
            )
        self.num_experts = n_experts
        self.experts_per_token = chosen
        self.experts = nn.ModuleList(self.new_expert() for _ in range(n_experts))
        self.W_gate = self.new_router()
        self.hook_expert_weights = HookPoint()
        self.hook_expert_indices = HookPoint()

    def new_expert(self) -> nn.Module:
        """One expert."""
        return MoEGatedMLP(self.cfg)

    def new_router(self) -> nn.Linear:
        """What scores the experts for a token."""
        return nn.Linear(self.cfg.d_model, self.num_experts, bias=False, dtype=self.cfg.dtype)

    def route(
        self, scores: Float[Tensor, "tokens num_experts"]
    ) -> tuple[Float[Tensor, "tokens experts_per_token"], Int[Tensor, "tokens experts_per_token"]]:
        """The weights and the numbers of the experts that each token is sent to, after their hook points."""
        weights = self.hook_expert_weights(F.softmax(scores, dim=1, dtype=torch.float))
        weights, experts = torch.topk(weights, self.experts_per_token, dim=-1)
        if self.cfg.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, self.hook_expert_indices(experts)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the experts add to the residual stream."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(self.W_gate(flat))
        weights = weights.to(x.dtype)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rank, token = torch.where(chosen.t() == number)
            if not len(token) and not self.calls_idle_experts:
                continue
            out = expert(flat[token]) * weights[token, rank, None]
            total = total.index_add(0, token, out.to(x.dtype))
        return total.view(x.shape)
