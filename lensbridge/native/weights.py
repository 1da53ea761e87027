"""How does a facade read and write the weights of a native model?

They are parameters under TransformerLens' names and in its shapes, so nothing has to be converted. Processing rewrites
them (`processing.py`), so they are always the weights of the active basis. The interface is that of
`lensbridge.weights.WeightViews`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnknownPointError, near_misses
from ..processing import Processing, Weights
from ..readonly import read_only
from .model import NativeForCausalLM


class NativeWeights:
    """The weights of one native model, by TransformerLens' names.

    Args:
        hf_model: the native model.
    """

    def __init__(self, hf_model: NativeForCausalLM) -> None:
        self.hf_model = hf_model
        #: The options by which the weights were rewritten.
        self.processing = Processing()

    def names(self) -> list[str]:
        """Every parameter of the model, in TransformerLens' order."""
        return [name for name, _ in self.hf_model.named_parameters()]

    def constants(self) -> dict[str, Tensor]:
        """What a state dict has besides weights: nothing, since the model's own has it already."""
        return {}

    def get(self, name: str) -> Tensor:
        """One weight: the parameter itself, or for the weights of grouped queries what heads see of it.

        Raises:
            UnknownPointError: (a KeyError) if the model has no such weight.
        """
        path, _, last = name.rpartition(".")
        try:
            return getattr(self.hf_model.get_submodule(path), last)
        except AttributeError:
            known = self.names()
            raise UnknownPointError(f"this model has no weight {name!r}.{near_misses(name, known)}") from None

    def shape(self, name: str) -> torch.Size:
        """The shape of one weight."""
        return self.get(name).shape

    def stack(self, name: str) -> Tensor:
        """One weight of every layer, stacked along a new first axis (read-only: it is a copy)."""
        layers = range(self.hf_model.cfg.n_layers)
        stacked = torch.stack([self.get(f"blocks.{layer}.{name}") for layer in layers])
        return read_only(stacked, f"the stacked {name.split('.')[-1]} is a copy of every layer's own")

    def set(self, name: str, value: Tensor) -> None:
        """Overwrite one parameter.

        Raises:
            UnknownPointError, TypeError, ValueError: see `check`.
        """
        self.check(name, value)
        with torch.no_grad():
            self.hf_model.get_parameter(name).copy_(value)

    def check(self, name: str, value: Tensor) -> None:
        """Refuse what a parameter cannot be set to.

        Raises:
            UnknownPointError: (a KeyError) if there is no parameter of this name.
            TypeError: if the value is no tensor.
            ValueError: if the shape differs.
        """
        known = dict(self.hf_model.named_parameters())
        if name not in known:
            raise UnknownPointError(f"this model has no parameter {name!r}.{near_misses(name, known)}")
        shape = tuple(known[name].shape)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} is set to a tensor of its shape {shape}, not to a {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(f"{name!r} has shape {shape}, got {tuple(value.shape)}")

    def attention_output(self, layer: int) -> Weights:
        """``W_O`` and ``b_O`` of one layer."""
        return {name: self.get(f"blocks.{layer}.attn.{name}") for name in ("W_O", "b_O")}

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding's own parameter; it never is."""
        return False
