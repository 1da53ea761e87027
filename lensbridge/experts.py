"""How does a HuggingFace module hold all experts of a layer?

transformers' modules of experts declare it themselves (``use_experts_implementation``): one parameter with the first
projections of every expert, [in, out] or [out, in], gate and linear part behind each other or taking turns; another
with the output projections; biases or none; and a method that makes one of gate and linear part. So no record says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .whole import itself

#: What a module of experts declares.
DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertForm:
    """How many experts a layer has, how many neurons each (0: they cannot be shown), and whether these have gates."""

    count: int = 0
    width: int = 0
    gated: bool = True

    @property
    def shown(self) -> int:
        """How many experts show their neurons."""
        return self.count if self.width else 0


def form_of(module: Any, router: Any = None) -> ExpertForm:
    """What a module of experts is; no neurons can be shown if it does not declare how it is laid out.

    Nor if ``router`` is given and of another width: then experts read a projection of what it reads.
    """
    hidden = ExpertForm(getattr(module, "num_experts", 0))
    if not all(hasattr(module, name) for name in DECLARED):
        return hidden
    parameters = [getattr(module, name, None) for name in _names(module)]
    if not all(isinstance(p, nn.Parameter) and p.dim() == 3 and p.is_floating_point() for p in parameters):
        return hidden
    count, width, read = module.down_proj.shape if module.is_transposed else module.down_proj.mT.shape
    scores = getattr(router, "weight", None)
    return hidden if scores is not None and scores.shape[-1] != read else ExpertForm(count, width, module.has_gate)


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


class Experts:
    """The experts in one module; weights are views of its parameters, ``[out, in]`` as those of an ``nn.Linear``."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.form = form_of(itself(module))

    def weights(self, expert: int) -> dict[str, Tensor]:
        """The parameters of one expert: ``W_gate.weight``, ``W_in.weight``, ``W_out.weight``, and biases if any."""
        first, out = _names(self.module)
        names = ("W_gate", "W_in") if self.form.gated else ("W_in",)
        parts = dict(zip(names, self._parts(self._matrix(first, expert)), strict=True))
        found = {f"{name}.weight": part for name, part in (parts | {"W_out": self._matrix(out, expert)}).items()}
        if self.module.has_bias:
            first_bias, out_bias = (getattr(self.module, f"{name}_bias")[expert] for name in (first, out))
            parts = dict(zip(names, self._parts(first_bias), strict=True))
            found |= {f"{name}.bias": part for name, part in (parts | {"W_out": out_bias}).items()}
        return found

    def _matrix(self, name: str, expert: int) -> Tensor:
        matrix: Tensor = getattr(self.module, name)[expert]
        return matrix.T if self.module.is_transposed else matrix

    def _parts(self, both: Tensor) -> tuple[Tensor, ...]:
        """Gate and linear part, which are rows of one matrix; the whole of it without gates."""
        if not self.form.gated:
            return (both,)
        return both.chunk(2) if self.module.is_concatenated else (both[::2], both[1::2])

    # --- what an expert computes --------------------------------------------------------------------------------------

    def projected(self, expert: int, part: str, x: Tensor) -> Tensor:
        """``x @ W_gate`` or ``x @ W_in`` with its bias, ``[routed, d_mlp]``; ``part`` is "gate" or "pre"."""
        weights, name = self.weights(expert), {"gate": "W_gate", "pre": "W_in"}[part]
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def activations(self, gate: Tensor | None, pre: Tensor) -> Tensor:
        """What HuggingFace makes of gate and linear part."""
        if gate is None:
            return self.module.act_fn(pre)
        if self.module.is_concatenated:
            return self.module._apply_gate(torch.cat([gate, pre], dim=-1))
        return self.module._apply_gate(torch.stack([gate, pre], dim=-1).flatten(-2))

    def written(self, expert: int, post: Tensor) -> Tensor:
        """What an expert makes of its activations, before it is weighted."""
        weights = self.weights(expert)
        out = linear(post, weights["W_out.weight"], weights.get("W_out.bias"))
        return self.module.post_expert_norm(out) if getattr(self.module, "has_post_expert_norm", False) else out
