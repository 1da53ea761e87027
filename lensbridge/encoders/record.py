"""What has to be known of a family of encoders to serve TransformerLens' points and weights on it?

A family is a list of rows in the order in which values come by; a row binds one or a few points, and the weights that
go with them, to a module of the HuggingFace model. Rows of a layer have paths below the layer. Nothing here runs a
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class At:
    """A point that shows a module's input or output as it is.

    Args:
        point: the point's name.
        path: the module.
        side: which of its values.
        flag: the field of the config that turns the point on.
        per_row: whether HF may compute one row for the whole batch where TransformerLens shows one for each input.
    """

    point: str
    path: str
    side: Literal["input", "output"] = "output"
    flag: str | None = None
    per_row: bool = False


@dataclass(frozen=True)
class NormAt:
    """A norm, with ``hook_scale`` and ``hook_normalized`` inside it, and its weights ``w`` and ``b``."""

    name: str
    path: str


@dataclass(frozen=True)
class AttentionAt:
    """An attention: queries, keys, values, scores, pattern, z and result, and what the projections read.

    Args:
        name: TransformerLens' name of it.
        path: the module in whose forward the softmax is.
        q, k, v, o: its projections.
        reads: the module whose input its projections read; None for cross attention, which has no points for that.
        norm: the norm between that input and the projections, which TransformerLens fires once for each of them.
        together: whether there is a ``hook_attn_in`` besides ``hook_q_input`` and its like.
        infinite: whether TransformerLens shows masked scores as -inf, or, as HF does, as the smallest finite number.
    """

    name: str
    path: str
    q: str
    k: str
    v: str
    o: str
    reads: str | None = None
    norm: NormAt | None = None
    together: bool = False
    infinite: bool = True


@dataclass(frozen=True)
class Affine:
    """The weight of an affine map, ``[in, out]``, and its bias if TransformerLens has one (zeros where HF has none)."""

    weight: str
    path: str
    bias: str | None = None


@dataclass(frozen=True)
class Table:
    """The weight of an embedding, as it is."""

    weight: str
    path: str


Row = At | NormAt | AttentionAt | Affine | Table


@dataclass(frozen=True)
class Stack:
    """Layers of one kind: TransformerLens' name, the path of HF's list of them, and the rows of each."""

    name: str
    path: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Family:
    """One family of encoders.

    Args:
        architecture: what TransformerLens calls it in ``cfg.original_architecture``; None for the HF class.
        parts: its rows and stacks, in the order in which values come by.
        points: every point, in the order of TransformerLens' components; ``{l}`` for a layer.
        norm: the formula of its norms: LayerNorm, or RMSNorm, which does not take the mean out.
        norm_epsilon: what HF's norm calls its epsilon.
        config: config field -> attribute of the HF config.
        constants: config field -> value that the whole family has, or has where HF's config does not say.
        sample: arguments of a small forward pass, from the HF config.
        alone: TransformerLens' component -> the HF module that it is, where there is one, to run it by itself.
        silent: points that exist in TransformerLens and never fire, and why.
    """

    architecture: str | None
    parts: tuple[Row | Stack, ...]
    points: tuple[str, ...]
    norm: Literal["LN", "RMS"]
    norm_epsilon: str
    config: Mapping[str, str]
    constants: Mapping[str, Any]
    sample: Callable[[Any], dict[str, Any]]
    alone: Mapping[str, str] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its stacks of layers."""
        return tuple(part for part in self.parts if isinstance(part, Stack))


def joined(*parts: str) -> str:
    """Parts of a dotted path, empty ones left out."""
    return ".".join(part for part in parts if part)
