"""What are ``model.blocks[3].attn``, ``model.mlm_head``, ``model.encoder[0].ln1`` and the like?

Parts carry the hook points and show the weights below them under TransformerLens' names. One that is a module of the HF
model can be called: that module runs, with the part's hook points firing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.encoders import EncoderEngine
from ..errors import UnknownPointError, UnsupportedModelError
from ..factored_matrix import FactoredMatrix
from ..hook_points import HookPoint
from ..interior import listening
from .layout import placed, point_names
from .record import Family, NormAt, joined
from .weights import EncoderWeights


@dataclass
class Inside:
    """What the parts of an encoder share. No nn.Module, so that the HF model is no submodule of its own facade."""

    hf_model: Any
    family: Family
    cfg: Any
    weights: EncoderWeights
    engine: EncoderEngine


class Part(nn.Module):
    """A part of the model: hook points and other parts as children, weights as attributes.

    Args:
        inside: what all parts share.
        prefix: its name in the model.
        path: the HF module that it is, to be run by itself; None if HF has it in several.
    """

    def __init__(self, inside: Inside, prefix: str, path: str | None) -> None:
        super().__init__()
        self.__dict__.update(inside=inside, prefix=prefix, path=path, weight_names=inside.weights.below(prefix))

    @property
    def cfg(self) -> Any:
        """The model's config."""
        return self.inside.cfg

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["weight_names"]:
            try:
                return self.inside.weights.get(f"{self.prefix}.{name}")
            except UnknownPointError as error:
                raise AttributeError(str(error)) from None
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("weight_names", ()):
            self.inside.weights.set(f"{self.prefix}.{name}", value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.weight_names]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the HF module returns for HF's arguments; of several values the first.

        Raises:
            UnsupportedModelError: if this part is no single module of the HF model.
        """
        if self.path is None:
            raise UnsupportedModelError(
                f"{self.prefix!r} cannot be called by itself: {type(self.inside.hf_model).__name__} has no single "
                "module that computes it"
            )
        own = {
            f"{self.prefix}.{name}": module for name, module in self.named_modules() if isinstance(module, HookPoint)
        }
        output = self.inside.engine.run(self.path, args, kwargs, listening(own))
        return output[0] if isinstance(output, tuple) else output


class AttentionPart(Part):
    """An attention, with its circuits."""

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` per head, [head, d_model, d_model] (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` per head, [head, d_model, d_model], destination on the left (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-1, -2))


def build_parts(root: nn.Module, inside: Inside) -> None:
    """Give a model its parts, down to the hook points, and a list of layers for each stack."""
    alone = _alone(inside)
    lists = {stack.name for stack in inside.family.stacks}
    for name in point_names(inside.family, inside.hf_model):
        at, _, point = name.rpartition(".")
        _part(root, at, inside, alone, lists).add_module(point, HookPoint())
    for name in inside.weights.names():
        _part(root, name.rpartition(".")[0], inside, alone, lists)


def _part(root: nn.Module, name: str, inside: Inside, alone: dict[str, str], lists: Iterable[str]) -> nn.Module:
    """The part of this name, made with those above it where they are not there yet."""
    found, prefix = root, ""
    for step in name.split(".") if name else ():
        prefix = joined(prefix, step)
        if step not in found._modules:
            if prefix in lists:
                found.add_module(step, nn.ModuleList())
            else:
                kind = AttentionPart if "W_Q" in inside.weights.below(prefix) else Part
                found.add_module(step, kind(inside, prefix, alone.get(prefix)))
        found = found._modules[step]  # type: ignore[assignment]
    return found


def _alone(inside: Inside) -> dict[str, str]:
    """Part -> HF module, for those parts that are one."""
    there = {name for name, _ in inside.hf_model.named_modules(remove_duplicate=False)}
    found = {
        joined(prefix, row.name): joined(path, row.path)
        for prefix, path, row in placed(inside.family, inside.hf_model)
        if isinstance(row, NormAt)
    }
    layers = max((len(inside.hf_model.get_submodule(stack.path)) for stack in inside.family.stacks), default=0)
    for part, path in inside.family.alone.items():
        for layer in range(layers if "{l}" in part else 1):
            found[part.replace("{l}", str(layer))] = path.replace("{l}", str(layer))
    return {part: path for part, path in found.items() if path in there}
