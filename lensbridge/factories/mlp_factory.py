"""Which kind of MLP does a config ask for?"""

from __future__ import annotations

from ..components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP
from ..components.mlps.choice import create_mlp
from ..config import HookedTransformerConfig


class MLPFactory:
    """TransformerLens' name for the choice of an MLP."""

    @staticmethod
    def create_mlp(cfg: HookedTransformerConfig) -> CanBeUsedAsMLP:
        """A new MLP: a mixture of experts, gated, or plain."""
        return create_mlp(cfg)
