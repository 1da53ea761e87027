"""How does one trace come by the places of a plan?

One loop over the plan's sites is the body of one nnsight trace. What is here reads no more than the plan, the request
and the run: it is all that a forward pass on another machine needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from .places import Parts
from .plan import Ends, Plan, Span
from .sites import Run


@dataclass
class Request:
    """One forward pass: HF's keyword arguments, and which part of the model to run.

    Args:
        inputs: keyword arguments for the HF model's forward (``input_ids``, ``attention_mask``, ...).
        span: the part of the model to run.
        residual: the residual stream to start from, ``[batch, pos, d_model]``.
    """

    inputs: dict[str, Any]
    span: Span
    residual: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self._given.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the input is, and the logits will be."""
        return self._given.device

    @property
    def _given(self) -> Tensor:
        return self.residual if self.residual is not None else self.inputs["input_ids"]


def trace_once(view: Parts, run: Run, plan: Plan, request: Request) -> Tensor | None:
    """The one trace of a run."""
    inputs, stops = request.inputs, not request.span.unembeds
    with view.trace(**inputs) as tracer:
        output = nnsight.save(walk(view, run, plan, request))
        if stops:
            tracer.stop()
    return output


def walk(view: Parts, run: Run, plan: Plan, request: Request) -> Tensor | None:
    """Visit the sites in order, then read what the run is for."""
    span, ends = request.span, plan.ends
    assert ends is not None
    if request.residual is not None:
        _start_from(view, ends, run, request.residual)
    if run.listeners or run.visits:
        for site in plan.sites:
            site.visit(run)
    else:
        for site in plan.sites:
            site.record(run)
    if not span.norm:
        return run.stream.read(ends.stop.read(view))
    if not span.unembeds:
        ends.norm.read(view)
        return None
    if ends.logits is None:
        return run.basis.logits(view.nnsight.output.logits)
    if run.logits is not None:
        return run.logits
    return run.basis.logits(ends.logits.read(view), ours=not ends.held)


def _start_from(view: Parts, ends: Ends, run: Run, residual: Tensor) -> None:
    """Let the blocks before the first one pass and put the residual where the next module reads the stream."""
    for path in ends.skipped:
        view[path].skip(residual)
    if ends.overwrites:
        run.overwrite(ends.start, residual)
    else:
        ends.start.write(view, residual)
    run.stream.written(residual)
