"""How does a native model run for a facade?

Its own modules are the hook points' places, so there is nothing to plan and nothing to trace: a run calls the parts
that its span asks for, and hooks fire on the way. The interface is that of `lensbridge.engine.Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..engine import Request
from ..engine.sites import Recording
from ..engine.turns import Turns, in_turn, turn
from ..hook_points import HookPoint, ReadOnlyHook
from .model import NativeForCausalLM, entries_of


class NativeEngine:
    """Runs one native model, whole or in part.

    Args:
        hf_model: the native model.
    """

    #: Whether runs are jobs for another machine.
    elsewhere = False

    def __init__(self, hf_model: NativeForCausalLM) -> None:
        self.hf_model = hf_model

    @property
    def turns(self) -> Turns:
        """The turns in which threads run the model, whose hooks are everybody's."""
        return turn(self.hf_model)

    @property
    def comes_in_order(self) -> bool:
        """A run comes by the points in TransformerLens' order."""
        return True

    def eager_attention(self, needed: bool = True) -> AbstractContextManager:
        """Attention is computed in one way only."""
        return nullcontext()

    @in_turn
    def run(
        self, request: Request, listeners: Mapping[str, nn.Module], recording: Recording | None = None
    ) -> Tensor | None:
        """Run the model; returns logits, or the residual stream where the span ends before the norm, or None.

        Args:
            request: the part to run and its inputs: ``input_ids`` (or ``residual``), ``attention_mask``,
                ``past_key_values`` of either kind, ``logits_to_keep``, and ``shortformer_pos_embed`` where it starts
                after the embedding. ``input_ids`` are afterwards what hooks on them have made of them.
            listeners: by name, what takes a point's place in this run. Points themselves are left where they are,
                because their hooks fire by themselves.
            recording: what to keep of the values as they are after their hooks.
        """
        model, span, inputs = self.hf_model, request.span, request.inputs
        mask = inputs.get("attention_mask")
        entries, past = entries_of(inputs.get("past_key_values"))
        with self._keeping(recording), self._standing_in(listeners):
            if span.embeds:
                inputs["input_ids"] = model.hooked_tokens(inputs["input_ids"])
                residual, pos_embed = model.embedded(inputs["input_ids"], past, mask)
            else:
                assert request.residual is not None
                residual, pos_embed = request.residual, inputs.get("shortformer_pos_embed")
            residual = model.through_blocks(residual, span.start, span.stop, pos_embed, entries, mask)
            if not span.norm:
                return residual
            normed = model.normed(residual)
            return model.logits(_kept(normed, inputs.get("logits_to_keep", 0))) if span.unembeds else None

    def run_block(
        self, layer: int, residual: Tensor, listeners: Mapping[str, nn.Module], mask: Tensor | None = None
    ) -> Tensor:
        """One block on the residual stream before it; returns the stream after it."""
        return self.hf_model.blocks[layer](residual, attention_mask=mask)

    @contextmanager
    def _keeping(self, recording: Recording | None) -> Iterator[None]:
        """While open, the points that ``recording`` names hand it their values, after all other hooks."""
        if recording is None:
            yield
            return
        hook = _Keeper(recording)
        points = [self.hf_model.get_submodule(name) for name in recording.names]
        try:
            for point in points:
                assert isinstance(point, HookPoint)
                point.add_hook(hook)
            yield
        finally:
            for point in points:
                hook.leave(point)

    @contextmanager
    def _standing_in(self, listeners: Mapping[str, nn.Module]) -> Iterator[None]:
        """While open, listeners that are not the points of their names are in the points' places."""
        places = []
        for name, listener in listeners.items():
            path, _, last = name.rpartition(".")
            around = self.hf_model.get_submodule(path)._modules
            if around[last] is not listener:
                places.append((around, last, around[last]))
                around[last] = _StandIn(listener)
        try:
            yield
        finally:
            for around, last, point in places:
                around[last] = point


def _kept(normed: Tensor, positions: int | Tensor) -> Tensor:
    """The last positions, as many as a number says (0: all), or those of a tensor."""
    return normed[:, positions] if isinstance(positions, Tensor) else normed[:, -positions:]


class _StandIn(nn.Module):
    """Passes on to what stands for a point; being no hook point itself, it is taken for one that is listened to."""

    def __init__(self, listener: nn.Module) -> None:
        super().__init__()
        self.listener = listener

    def forward(self, x: Tensor) -> Any:
        return self.listener(x)


class _Keeper(ReadOnlyHook):
    """Puts what passes a point into a recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> None:
        self.recording.keep(str(hook.name), tensor)

    def leave(self, point: Any) -> None:
        """Take this hook off a point."""
        for handle in [handle for handle in point.fwd_hooks if handle.user_hook is self]:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)
