"""Which MLP does a config ask for?"""

from __future__ import annotations

from ...config import HookedTransformerConfig
from .can_be_used_as_mlp import CanBeUsedAsMLP
from .gated_mlp import GatedMLP
from .gpt_oss_moe import GptOssMoE
from .mlp import MLP
from .moe import MoE


def create_mlp(cfg: HookedTransformerConfig) -> CanBeUsedAsMLP:
    """A new MLP: a mixture of experts, gated, or plain."""
    if cfg.num_experts:
        return GptOssMoE(cfg) if cfg.original_architecture == "GptOssForCausalLM" else MoE(cfg)
    return GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
