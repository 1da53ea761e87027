"""What happens to the choice among experts when the forward pass reaches it?

HuggingFace hands all tokens to one module that holds every expert of a layer, with the experts chosen for each token
and their weights. TransformerLens shows the weights with one column for each expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..architectures.record import Block
from .places import Place
from .sites import Run, Site


class ExpertsSite(Site):
    """mlp.hook_expert_weights and mlp.hook_expert_indices: what the experts are called with."""

    def __init__(self, prefix: str, path: str, block: Block) -> None:
        self.weights, self.indices = (f"{prefix}.mlp.hook_expert_{name}" for name in ("weights", "indices"))
        self.names = (self.weights, self.indices)
        self.path = path
        self.place = Place(path, "input")

    def visit(self, run: Run) -> None:
        call = Call(run.view[self.path].inputs)
        indices, weights = call.indices, call.weights
        n_experts: int = run.cfg.num_experts or run.view.module(self.path).num_experts  # type: ignore[assignment]
        by_expert = torch.zeros(*weights.shape[:-1], n_experts, dtype=weights.dtype, device=weights.device)
        by_expert, reweighted = run.fire(self.weights, by_expert.scatter(-1, indices, weights), live=False)
        indices, rechosen = run.fire(self.indices, indices, live=True)
        if reweighted or rechosen:
            run.view[self.path].inputs = call.changed(indices, by_expert.gather(-1, indices))


class Call:
    """The arguments of the module that holds the experts; which of them is which shows in their types."""

    def __init__(self, inputs: tuple[tuple, dict[str, Any]]) -> None:
        self.args, self.kwargs = inputs
        tensors = {key: value for key, value in self._all() if isinstance(value, Tensor)}
        self._indices = next(key for key, value in tensors.items() if not value.is_floating_point())
        shape = tensors[self._indices].shape
        self._weights = next(
            key for key, value in tensors.items() if value.is_floating_point() and value.shape == shape
        )

    def _all(self) -> list[tuple[int | str, Any]]:
        return [*enumerate(self.args), *self.kwargs.items()]

    @property
    def indices(self) -> Tensor:
        """The experts chosen for each token, ``[batch*pos, chosen]``."""
        return dict(self._all())[self._indices]

    @property
    def weights(self) -> Tensor:
        """Their weights in the token's sum, ``[batch*pos, chosen]``."""
        return dict(self._all())[self._weights]

    def changed(self, indices: Tensor, weights: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another choice."""
        new = {self._indices: indices, self._weights: weights}
        args = tuple(new.get(index, value) for index, value in enumerate(self.args))
        return args, {name: new.get(name, value) for name, value in self.kwargs.items()}
