"""What do an encoder's parameters look like as TransformerLens weights?

Views of the HF model's parameters in TransformerLens' shapes: an edit of one is an edit of the model. TransformerLens
has a bias wherever there could be one; where HF has none it is zero and read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ReadOnlyWeightError, UnknownPointError, UnsupportedModelError, near_misses
from ..readonly import read_only
from ..shared import SharedWeight
from .layout import placed
from .record import Affine, AttentionAt, Family, NormAt, Row, Table, joined

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Entry:
    """Where a weight lies: a parameter and how it is looked at, or only a shape, if there is no such parameter."""

    path: str
    attribute: str
    view: View | None = None
    shape: tuple[int, ...] | None = None


class EncoderWeights:
    """TransformerLens' view of the parameters of one HF model; names are those of TransformerLens' state dict."""

    def __init__(self, hf_model: Any, family: Family, cfg: Any) -> None:
        self.hf_model = hf_model
        self.cfg = cfg
        self._entries: dict[str, _Entry] = {}
        self._absent: dict[str, str] = {}
        modules = dict(hf_model.named_modules(remove_duplicate=False))
        for prefix, path, row in placed(family, hf_model):
            for name, entry in self._entries_of(path, row, modules):
                if entry.path in modules:
                    self._entries[joined(prefix, name)] = entry
                else:
                    self._absent[joined(prefix, name)] = entry.path

    def _entries_of(self, path: str, row: Row, modules: dict[str, Any]) -> list[tuple[str, _Entry]]:
        if isinstance(row, Table):
            return [(row.weight, _Entry(row.path, "weight"))]
        if isinstance(row, NormAt):
            at = joined(path, row.path)
            bias = [(f"{row.name}.b", _Entry(at, "bias"))] if hasattr(modules.get(at), "bias") else []
            return [(f"{row.name}.w", _Entry(at, "weight")), *bias]
        if isinstance(row, Affine):
            at = joined(path, row.path)
            weight = (row.weight, _Entry(at, "weight", _transposed))
            return [weight, *self._bias(row.bias, at, modules, None)] if row.bias else [weight]
        if isinstance(row, AttentionAt):
            norm = [] if row.norm is None else self._entries_of(path, row.norm, modules)
            return [*norm, *self._attention(path, row, modules)]
        return []

    def _attention(self, path: str, row: AttentionAt, modules: dict[str, Any]) -> list[tuple[str, _Entry]]:
        heads, out = (self.cfg.n_heads, self.cfg.d_head), []
        for letter in "QKV":
            at = joined(path, getattr(row, letter.lower()))
            out.append(
                (f"{row.name}.W_{letter}", _Entry(at, "weight", lambda w: w.unflatten(0, heads).transpose(1, 2)))
            )
            out += self._bias(f"{row.name}.b_{letter}", at, modules, lambda b: b.unflatten(0, heads), heads)
        at = joined(path, row.o)
        out.append((f"{row.name}.W_O", _Entry(at, "weight", lambda w: w.T.unflatten(0, heads))))
        return [*out, *self._bias(f"{row.name}.b_O", at, modules, None)]

    def _bias(
        self, name: str, at: str, modules: dict[str, Any], view: View | None, shape: tuple[int, ...] | None = None
    ) -> list[tuple[str, _Entry]]:
        module = modules.get(at)
        if module is None or module.bias is not None:
            return [(name, _Entry(at, "bias", view))]
        return [(name, _Entry(at, "weight", shape=shape or (module.out_features,)))]

    def names(self) -> list[str]:
        """Every weight of the model."""
        return list(self._entries)

    def below(self, prefix: str) -> set[str]:
        """What the weights right below a component are called in it, those that this HF model lacks included."""
        start = f"{prefix}." if prefix else ""
        own = (name.removeprefix(start) for name in (*self._entries, *self._absent) if name.startswith(start))
        return {name for name in own if "." not in name}

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            if name in self._absent:
                kind = type(self.hf_model).__name__
                raise UnknownPointError(f"{name!r}: a {kind} has no {self._absent[name]!r}, where this weight would be")
            raise UnknownPointError(f"this model has no weight {name!r}.{near_misses(name, self.names())}")
        return entry

    def get(self, name: str) -> Tensor:
        """One weight in TransformerLens' shape, sharing memory (and ``.grad``) with the HF parameter.

        Raises:
            UnknownPointError: if the model has no such weight.
        """
        entry = self._entry(name)
        parameter: Tensor = getattr(self.hf_model.get_submodule(entry.path), entry.attribute)
        if entry.shape is not None:
            zeros = torch.zeros(entry.shape, dtype=parameter.dtype, device=parameter.device)
            return read_only(zeros, f"{name!r} is no parameter of {type(self.hf_model).__name__}")
        return parameter if entry.view is None else entry.view(parameter).as_subclass(SharedWeight)

    def set(self, name: str, value: Tensor) -> None:
        """Overwrite one weight of the model.

        Raises:
            ReadOnlyWeightError, TypeError, ValueError: see `check`.
        """
        self.check(name, value)
        if self._entry(name).shape is None:
            with torch.no_grad():
                self.get(name).copy_(value)

    def check(self, name: str, value: Tensor) -> None:
        """Refuse a value that the model cannot take for one weight.

        Raises:
            ReadOnlyWeightError: another value than zero for a bias that HF does not have.
            TypeError: if the value is no tensor.
            ValueError: if the shape differs.
        """
        there = self.get(name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} is set to a tensor of shape {tuple(there.shape)}, not to {type(value).__name__}")
        if value.shape != there.shape:
            raise ValueError(f"{name!r} has shape {tuple(there.shape)}, got {tuple(value.shape)}")
        if self._entry(name).shape is not None and value.any():
            raise ReadOnlyWeightError(f"{name!r} is no parameter of {type(self.hf_model).__name__}, so it stays zero")

    def check_ties(self, values: Mapping[str, Tensor]) -> None:
        """Refuse different values for weights that are one parameter of the model, as of a head tied to the embedding.

        Raises:
            UnsupportedModelError: (a ValueError) if there are any.
        """
        first: dict[int, tuple[str, Tensor]] = {}
        for name, value in values.items():
            entry = self._entry(name)
            parameter = getattr(self.hf_model.get_submodule(entry.path), entry.attribute)
            if entry.shape is None:
                there = value.T if entry.view is _transposed else value
                other, before = first.setdefault(id(parameter), (name, there))
                if not torch.equal(before.to(there.device), there):
                    raise UnsupportedModelError(
                        f"{name} and {other} are one parameter in this HF model, and the state dict has different "
                        "values for them. BERT can be made with tie_word_embeddings=False."
                    )

    def stack(self, names: list[str]) -> Tensor:
        """Weights of several layers, stacked along a new first axis (read-only: it is a copy)."""
        stacked = torch.stack([self.get(name).as_subclass(Tensor) for name in names])
        return read_only(stacked, f"the stacked {names[0].split('.')[-1]} is a copy of every layer's own")


def _transposed(weight: Tensor) -> Tensor:
    return weight.T
