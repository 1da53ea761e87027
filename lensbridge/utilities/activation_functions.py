"""Which activation functions can a model config name, and what do they compute?

They follow the formulas step by step, so that a model written by hand gets the same bits as in TransformerLens.
``input`` is the MLP's pre-activation ``[batch, pos, d_mlp]``; all but SoLU act on each entry alone and take any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

#: One activation function.
ActivationFunction = Callable[..., torch.Tensor]

#: The value of a softcap setting that means "none".
SOFTCAP_DISABLED: float = -1.0

# sqrt(2 / pi) as written in the models that use gelu_fast; the digits matter for equal bits.
_SQRT_2_OVER_PI_ROUNDED = 0.7978845608


def _half_gated_by_tanh(input: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    return 0.5 * input * (1.0 + torch.tanh(argument))


def gelu_new(input: Float[torch.Tensor, "batch pos d_mlp"]) -> Float[torch.Tensor, "batch pos d_mlp"]:
    """GPT-2's GELU, an approximation by tanh; up to 5e-4 away from the exact one."""
    return _half_gated_by_tanh(input, math.sqrt(2.0 / math.pi) * (input + 0.044715 * torch.pow(input, 3.0)))


def gelu_fast(input: Float[torch.Tensor, "batch pos d_mlp"]) -> Float[torch.Tensor, "batch pos d_mlp"]:
    """The same approximation as :func:`gelu_new`, factored to need fewer multiplications."""
    return _half_gated_by_tanh(input, input * _SQRT_2_OVER_PI_ROUNDED * (1.0 + 0.044715 * input * input))


def gelu_pytorch_tanh(input: torch.Tensor) -> torch.Tensor:
    """torch's own tanh approximation of GELU, fused."""
    return F.gelu(input, approximate="tanh")


def solu(input: Float[torch.Tensor, "batch pos d_mlp"]) -> Float[torch.Tensor, "batch pos d_mlp"]:
    """Softmax linear unit (https://transformer-circuits.pub/2022/solu/index.html), without the norm that follows it."""
    return input * input.softmax(dim=-1)


def relu2(input: Float[torch.Tensor, "batch pos d_mlp"]) -> Float[torch.Tensor, "batch pos d_mlp"]:
    """The square of ReLU (https://arxiv.org/abs/2109.08668)."""
    return F.relu(input).square()


def _xielu(
    input: torch.Tensor,
    alpha_p: float | torch.Tensor,
    alpha_n: float | torch.Tensor,
    beta: float | torch.Tensor,
    eps: float | torch.Tensor,
) -> torch.Tensor:
    """A parabola for positive inputs and a line minus an exponential for the others, both of slope beta at 0."""
    # Keeping expm1's argument below zero keeps its gradient finite on the branch that is not taken.
    curve = torch.where(input > 0, alpha_p * input * input, alpha_n * (torch.expm1(input.clamp(max=eps)) - input))
    return curve + beta * input


def xielu(input: Float[torch.Tensor, "batch pos d_mlp"]) -> Float[torch.Tensor, "batch pos d_mlp"]:
    """xIELU (https://arxiv.org/abs/2411.13010) with fixed parameters: both alphas 0.8, beta 0.5."""
    return _xielu(input, 0.8, 0.8, 0.5, -1e-6)


class XIELU(nn.Module):
    """xIELU with trainable curvatures (https://arxiv.org/abs/2411.13010).

    ``alpha_p`` and ``alpha_n`` are stored through the inverse of softplus, which keeps the curvatures positive and lets
    them be loaded from HuggingFace's ``XIELUActivation``; ``beta`` and ``eps`` are buffers.
    """

    beta: torch.Tensor
    eps: torch.Tensor

    def __init__(
        self, alpha_p_init: float = 0.8, alpha_n_init: float = 0.8, beta_init: float = 0.5, eps: float = -1e-6
    ) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor(alpha_p_init, dtype=torch.float32).expm1().log())
        self.alpha_n = nn.Parameter(torch.tensor(alpha_n_init - beta_init, dtype=torch.float32).expm1().log())
        self.register_buffer("beta", torch.tensor(beta_init, dtype=torch.float32))
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.float32))

    def forward(self, input: Float[torch.Tensor, "batch pos d_mlp"]) -> Float[torch.Tensor, "batch pos d_mlp"]:
        """xIELU of ``input`` with the current curvatures."""
        alpha_n = self.beta + F.softplus(self.alpha_n)
        return _xielu(input, F.softplus(self.alpha_p), alpha_n, self.beta, self.eps)


def softcap_enabled(cap: float | None) -> bool:
    """Whether a softcap setting means one: only a positive number does (not -1, 0 or None)."""
    return cap is not None and cap > 0


def apply_softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(x / cap)``, which keeps values within the cap (Gemma 2); ``x`` itself where the cap is disabled."""
    if cap is None or not softcap_enabled(cap):
        return x
    return cap * torch.tanh(x / cap)


#: Every function that a config's ``act_fn`` can name. ``solu_ln`` is SoLU whose norm belongs to the MLP.
SUPPORTED_ACTIVATIONS: dict[str, ActivationFunction] = {
    "solu": solu,
    "solu_ln": solu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
    "xielu": xielu,
    "relu2": relu2,
}
