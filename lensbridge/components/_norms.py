"""What do the four norms have in common?

Each shows the root mean square of its input at ``hook_scale`` and the input divided by it at ``hook_normalized``; they
differ in whether the mean is taken out first and in what multiplies the result. In half precision both points see
float32, and what leaves the norm has the model's dtype again.

PyTorch has layer norm as one operation, which is several times faster than the steps. It gives the output whenever
nobody has put another value on the way, so that looking at a point does not change a bit of the result.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import HookedTransformerConfig
from ..hook_points import HookPoint
from ._parameters import Config


class Shown(NamedTuple):
    """A value that has passed its hook points, and whether it has to be used: it was edited, or may get a gradient."""

    value: Tensor
    counts: bool


class Norm(nn.Module):
    """Base of the norms: statistics, hook points and dtypes."""

    #: Whether the mean over the last dimension is taken out.
    centres: ClassVar[bool]

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.eps = self.cfg.eps

    def add_points(self) -> None:
        """Give the norm its hook points; in this order they are listed."""
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def normalise(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """``x`` (centred) over its root mean square, as ``hook_normalized`` lets it through, in the model's dtype."""
        return self.show(x).value.to(self.cfg.dtype)

    def show(self, x: Float[Tensor, "*batch length"]) -> Shown:
        """The same step by step, in float32 for models in half precision."""
        if self.cfg.dtype not in (torch.float32, torch.float64):
            x = x.to(torch.float32)
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        scale, of_scale = _show(self.hook_scale, (x.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized, of_normalized = _show(self.hook_normalized, x / scale)
        return Shown(normalized, of_scale or of_normalized)

    def layer_norm(
        self, x: Float[Tensor, "*batch length"], weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Float[Tensor, "*batch length"]:
        """The centred norm, as one operation unless what hook points see has to count."""
        exact = x.dtype == self.cfg.dtype and x.dtype in (torch.float32, torch.float64)
        shown = self.show(x) if self.is_watched or not exact else None
        if exact and (shown is None or not shown.counts):
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        assert shown is not None
        normed = shown.value.to(self.cfg.dtype)
        return normed if weight is None or bias is None else torch.addcmul(bias, normed, weight)

    @property
    def is_watched(self) -> bool:
        """Whether somebody listens at the norm or its points, so that it matters how often the norm is called."""
        scale, normalized = self._modules["hook_scale"], self._modules["hook_normalized"]
        return _has_hooks(self) or _listens(scale) or _listens(normalized)


def _show(point: nn.Module, value: Tensor) -> Shown:
    if getattr(point, "only_reads", False):
        return Shown(point(value), False)
    # Where versions are not counted or a gradient may be asked for, any listener may matter.
    before = None if value.requires_grad or value.is_inference() else value._version
    after = point(value)
    return Shown(after, before is None or after is not value or after._version != before)


def _listens(point: nn.Module | None) -> bool:
    """Whether a hook point has hooks; anything else in its place counts as a listener."""
    return not isinstance(point, HookPoint) or bool(point.fwd_hooks or point.bwd_hooks) or _has_hooks(point)


def _has_hooks(module: nn.Module) -> bool:
    """Whether PyTorch's own hooks are on a module."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)
