"""What does everything have that can stand in the place of an MLP?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ...config import HookedTransformerConfig
from ...errors import UnsupportedModelError
from ...hook_points import HookPoint
from ...utilities.activation_functions import SUPPORTED_ACTIVATIONS, XIELU, ActivationFunction
from .._parameters import Config
from ..layer_norm import LayerNorm
from ..layer_norm_pre import LayerNormPre


def pick_activation(cfg: HookedTransformerConfig) -> ActivationFunction:
    """The function that ``cfg.act_fn`` names; xIELU comes as a module, because its curvatures are trained.

    Raises:
        ValueError: there is no such function.
    """
    if cfg.act_fn == "xielu":
        return XIELU()
    if cfg.act_fn not in SUPPORTED_ACTIVATIONS:
        raise ValueError(f"act_fn={cfg.act_fn!r} is not an activation function: one of {sorted(SUPPORTED_ACTIVATIONS)}")
    return SUPPORTED_ACTIVATIONS[cfg.act_fn]


class CanBeUsedAsMLP(nn.Module):
    """Base of the MLPs: their config, width and activation (TransformerLens' CanBeUsedAsMLP).

    Raises:
        ValueError: the config has no ``d_mlp``.
        UnsupportedModelError: (a ValueError) 4-bit weights.
    """

    act_fn: ActivationFunction
    d_mlp: int
    hook_mid: HookPoint
    ln: nn.Module

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        if self.cfg.d_mlp is None:
            raise ValueError("an MLP needs cfg.d_mlp")
        if self.cfg.load_in_4bit:
            raise UnsupportedModelError("load_in_4bit: components have no quantized weights")
        self.d_mlp = self.cfg.d_mlp

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP makes of the normed stream; here, nothing."""
        return x

    def select_activation_function(self) -> None:
        """Set ``act_fn``; for activations that end in a norm ("solu_ln") also ``hook_mid`` and the norm ``ln``."""
        self.act_fn = pick_activation(self.cfg)
        if self.cfg.is_layer_norm_activation():
            self.hook_mid = HookPoint()
            self.select_activation_norm()

    def select_activation_norm(self) -> None:
        """Set ``ln``, the norm that ends such an activation; it has a gain where the config's norms are layer norms."""
        has_gain = self.cfg.normalization_type == "LN"
        self.ln = LayerNorm(self.cfg, self.d_mlp) if has_gain else LayerNormPre(self.cfg)

    def normed_activation(self, pre: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_mlp"]:
        """The activations, past ``hook_mid`` and through the norm, for activations that end in one."""
        return self.ln(self.hook_mid(self.act_fn(pre)))
