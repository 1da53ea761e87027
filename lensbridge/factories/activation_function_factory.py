"""Which activation function does a config name?"""

from __future__ import annotations

from ..components.mlps.can_be_used_as_mlp import pick_activation
from ..config import HookedTransformerConfig
from ..utilities.activation_functions import ActivationFunction


class ActivationFunctionFactory:
    """TransformerLens' name for the choice of an activation function."""

    @staticmethod
    def pick_activation_function(cfg: HookedTransformerConfig) -> ActivationFunction:
        """The function that ``cfg.act_fn`` names; for "xielu" a new module, as that one has parameters.

        Raises:
            ValueError: if there is no such function.
        """
        return pick_activation(cfg)
