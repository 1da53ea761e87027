"""How does a native model run for a facade?

Its own modules are the hook points' places, so there is nothing to plan and nothing to trace: a run calls the parts
that its span asks for, and hooks fire on the way. The interface is that of `lensbridge.engine.Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..engine import Request
from ..engine.sites import Recording
from ..hook_points import HookPoint, ReadOnlyHook
from .model import NativeForCausalLM, entries_of


class NativeEngine:
    """Runs one native model, whole or in part.

    Args:
        hf_model: the native model.
    """

    def __init__(self, hf_model: NativeForCausalLM) -> None:
        self.hf_model = hf_model

    def run(
        self, request: Request, listeners: Mapping[str, nn.Module], recording: Recording | None = None
    ) -> Tensor | None:
        """Run the model; returns logits, or the residual stream where the span ends before the norm, or None.

        Args:
            request: the part to run and its inputs: ``input_ids`` (or ``residual``), ``attention_mask``,
                ``past_key_values`` of either kind, and ``shortformer_pos_embed`` where it starts after the embedding.
            listeners: not looked at, because hooks fire by themselves.
            recording: what to keep of the values as they are after their hooks.
        """
        model, span, inputs = self.hf_model, request.span, request.inputs
        mask = inputs.get("attention_mask")
        entries, past = entries_of(inputs.get("past_key_values"))
        with self._keeping(recording):
            if span.embeds:
                residual, pos_embed = model.embedded(inputs["input_ids"], past, mask)
            else:
                assert request.residual is not None
                residual, pos_embed = request.residual, inputs.get("shortformer_pos_embed")
            residual = model.through_blocks(residual, span.start, span.stop, pos_embed, entries, mask)
            if not span.norm:
                return residual
            normed = model.normed(residual)
            return model.logits(normed) if span.unembeds else None

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
