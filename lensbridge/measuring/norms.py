"""Which formula does a norm compute?

A norm is a small function, so it is asked: on inputs of our own, large ones that show its gain and bias and small ones
that show its epsilon. Only what agrees with LayerNorm's or RMSNorm's formula is one, whatever its class is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

#: What norms call their epsilon, the first being nn.LayerNorm's.
EPSILONS = ("eps", "variance_epsilon", "epsilon")
#: Epsilons that are written into code.
USUAL = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-7, 0.0)
#: How far a norm may be from its formula, relative to its largest output; half precision is that coarse.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class NormFact:
    """The formula of a norm: whether it takes the mean out, what it adds to its gain, and where epsilon is."""

    kind: Literal["LN", "RMS"]
    eps: float
    #: The attribute that holds epsilon; None where it is written in the code.
    eps_attribute: str | None
    #: What the gain is, apart from the stored weight: 0, or 1 where the weight is the difference to 1.
    offset: float
    #: Whether there is a weight, and what is in the way of reading gain and bias as ``weight`` and ``bias``.
    has_gain: bool
    obstacle: str | None = None


def could_be_norm(module: nn.Module) -> bool:
    """Whether a module is small enough to be a norm: no parts, at most a gain and a bias."""
    parameters = list(module.parameters(recurse=False))
    if next(module.children(), None) is not None or len(parameters) > 2:
        return False
    # A norm of heads may have a gain for each head.
    return all(parameter.dim() <= 2 for parameter in parameters) and not isinstance(module, (nn.Linear, nn.Embedding))


def formula(module: Any, like: Tensor) -> NormFact | None:
    """The formula by which a module norms inputs ``like`` this one; None if it does not, or by another.

    Args:
        like: an input that the model gave to it.
    """
    if not could_be_norm(module) or not like.is_floating_point():
        return None
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    try:
        large, small = (_ask(module, x * scale, like) for scale in (1.0, 1e-3))
    except Exception:
        # Whatever it raises on one argument, it is no norm.
        return None
    if large is None or small is None:
        return None
    tolerance = CLOSE.get(like.dtype, 1e-4)
    for eps, attribute in _epsilons(module):
        for kind in ("LN", "RMS"):
            plain = _normalised(_as(x, like), kind, eps)
            gain, bias = _affine(plain, large, getattr(getattr(module, "weight", None), "ndim", 1))
            again = _normalised(_as(x * 1e-3, like), kind, eps) * gain + bias
            if _close(plain * gain + bias, large, tolerance) and _close(again, small, tolerance):
                return _fact(module, kind, eps, attribute, gain, bias, tolerance)
    return None


def _ask(module: Any, x: Tensor, like: Tensor) -> Tensor | None:
    with torch.no_grad():
        y = module(x.to(like))
    return y.double().cpu() if isinstance(y, Tensor) and y.shape == x.shape else None


def _as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as the module got it, rounded to its dtype."""
    return x.to(like.dtype).double()


def _epsilons(module: nn.Module) -> list[tuple[float, str | None]]:
    """(epsilon, the attribute that holds it), the likeliest first."""
    named = [(name, getattr(module, name, None)) for name in EPSILONS]
    found: list[tuple[float, str | None]] = [(float(eps), name) for name, eps in named if isinstance(eps, float)]
    return found + [(eps, None) for eps in USUAL]


def _normalised(x: Tensor, kind: str, eps: float) -> Tensor:
    if kind == "LN":
        x = x - x.mean(-1, keepdim=True)
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def _affine(plain: Tensor, y: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """The gain and bias, on so many last axes, that bring ``plain`` closest to ``y``."""
    plain, y = (x.flatten(0, -axes - 1) if axes < x.dim() else x[None] for x in (plain, y))
    mean, target = plain.mean(0), y.mean(0)
    spread = plain - mean
    gain = (spread * (y - target)).sum(0) / spread.pow(2).sum(0).clamp_min(1e-30)
    return gain, target - gain * mean


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * (1 + other.abs().max()))


def _fact(
    module: Any, kind: Any, eps: float, attribute: str | None, gain: Tensor, bias: Tensor, tolerance: float
) -> NormFact | None:
    weight, stored_bias = getattr(module, "weight", None), getattr(module, "bias", None)
    tolerance *= 10
    offset, obstacle = 0.0, None
    if isinstance(weight, Tensor) and weight.shape == gain.shape:
        by = (gain - weight.detach().double().cpu()).mean().item()
        offset = float(round(by))
        if not _close(weight.detach().double().cpu() + offset, gain, tolerance):
            obstacle = "its gain is not its weight, or its weight and a whole number"
    elif not _close(gain, torch.ones_like(gain), tolerance):
        names = ", ".join(name for name, _ in module.named_parameters()) or "no parameter"
        obstacle = f"its gain is not kept as 'weight' (it has {names})"
    given = stored_bias.detach().double().cpu() if isinstance(stored_bias, Tensor) else torch.zeros_like(bias)
    if obstacle is None and not (given.shape == bias.shape and _close(given, bias, tolerance)):
        obstacle = "it adds something that is not kept as 'bias'"
    return NormFact(kind, eps, attribute, offset, isinstance(weight, Tensor), obstacle)
