"""How does one pass of a run go, on a model that is here?

With hooks the walk past the sites is a worker beside the pass; a run that only fills a cache is watched (`stepping`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .forward import Request, walk
from .places import View
from .plan import Plan
from .sites import Run
from .stepping import Route, in_step, watched


def run_once(view: View, run: Run, plan: Plan, request: Request) -> Tensor | None:
    """One pass of a run, on the model here."""
    return in_step(view, partial(walk, view, run, plan, request), request.inputs, stops=not request.span.unembeds)


def watch_once(view: View, run: Run, plan: Plan, request: Request) -> Tensor | None:
    """One pass of a run that only fills a cache, on the model here."""
    span, ends = request.span, plan.ends
    assert ends is not None
    route = plan.routes.get(view)
    if route is None:
        end = ends.stop if not span.norm else ends.logits if span.unembeds else ends.norm
        route = plan.routes[view] = Route.of(view, plan.sites, plan.also, end)
    # What is computed under autocast comes out otherwise later.
    if not torch._C._is_any_autocast_enabled():
        run.deriving, run.awaited = plan.also, plan.awaited
    output, value = watched(view, run, route, request.inputs, stops=not span.unembeds)
    if not span.norm:
        return run.stream.read(value)
    if not span.unembeds:
        return None
    if ends.logits is None:
        return run.basis.logits(output.logits)
    return run.logits if run.logits is not None else run.basis.logits(value, ours=not ends.held)
