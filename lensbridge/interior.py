"""What do the parts of a hooked model share?

One plain object that every component holds: the HF model and the views of it. It is no nn.Module, so that the HF model
does not become a submodule of its own facade.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .architectures import Architecture
from .basis import Basis
from .config import HookedTransformerConfig
from .engine import Engine
from .hook_points import HookPoint
from .weights import WeightViews


@dataclass
class Interior:
    """A HuggingFace model with its record, config, weights, basis and engine."""

    hf_model: Any
    architecture: Architecture
    cfg: HookedTransformerConfig
    weights: WeightViews
    basis: Basis
    engine: Engine

    @classmethod
    def of(cls, hf_model: Any, architecture: Architecture, cfg: HookedTransformerConfig) -> Interior:
        """The views of a loaded HF model."""
        weights = WeightViews(hf_model, architecture, cfg)
        basis = Basis(weights)
        return cls(hf_model, architecture, cfg, weights, basis, Engine(hf_model, architecture, basis, cfg))

    def module(self, path: str) -> Any:
        """A module of the HF model."""
        return self.hf_model.get_submodule(path)


def listening(points: Mapping[str, HookPoint]) -> dict[str, nn.Module]:
    """The points among ``points`` that have hooks (PyTorch's own module hooks count)."""
    found: dict[str, nn.Module] = {}
    for name, point in points.items():
        # Every run asks this of every point, and nn.Module's attributes cost three times what a dict's do.
        state = point.__dict__
        if state["fwd_hooks"] or state["bwd_hooks"] or state["_forward_hooks"]:
            found[name] = point
    return found
