"""How does one forward pass run, with its hook points?

One run is one nnsight trace whose body is one loop over the plan's sites. A run that nobody listens to and that goes to
the end is HuggingFace's own forward and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nnsight
from torch import Tensor, nn

from ..architectures import Architecture
from ..basis import Basis, Stream
from ..hook_points import HookPoint
from .places import Place, View, measure_order
from .plan import Plan, Span, make_plan, sites_of
from .sites import Run, Site


Listeners = Mapping[str, nn.Module]


@dataclass
class Request:
    """One forward pass: HF's keyword arguments, and which part of the model to run.

    Args:
        inputs: keyword arguments for the HF model's forward (``input_ids``, ``attention_mask``, ...).
        span: the part of the model to run.
        residual: the residual stream to start from, ``[batch, pos, d_model]``, instead of ``input_ids``.
    """

    inputs: dict[str, Any]
    span: Span
    residual: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return (self.residual if self.residual is not None else self.inputs["input_ids"]).shape[0]


class Engine:
    """Runs one HF model and shows its values to hook points."""

    def __init__(self, hf_model: Any, architecture: Architecture, basis: Basis, cfg: Any) -> None:
        self.hf_model = hf_model
        self.architecture = architecture
        self.basis = basis
        self.cfg = cfg
        #: How many plans were made so far; a loop over one hook set makes one.
        self.plans_made = 0
        self._plans: dict[tuple, Plan] = {}
        self._views: list[View] = []
        self._running: list[View] = []
        self._order: dict[tuple[str, str], int] | None = None
        eps = {path: _eps(hf_model.get_submodule(path)) for path in self._norm_paths()}
        self._before, self._blocks, self._after = sites_of(architecture, cfg, eps)

    def _norm_paths(self) -> list[str]:
        layers = range(self.cfg.n_layers)
        block = [self.architecture.in_layer(layer, role) for layer in layers for role in ("ln1", "ln2")]
        return [*block, self.architecture.ln_final]

    # --- planning --------------------------------------------------------------------------------------------------------

    def plan_for(
        self, listeners: Listeners, span: Span, below: str | None = None, edited: tuple[str, ...] = ()
    ) -> Plan:
        """The plan for these listeners, from memory if the same points were listened to before.

        Args:
            below: plan only for places inside this module of the HF model.
            edited: points whose value is given from outside, as if a hook had set it.
        """
        edits = {name: not (isinstance(point, HookPoint) and point.only_reads) for name, point in listeners.items()}
        flags = (self.cfg.use_attn_in, self.cfg.use_split_qkv_input)
        key = (tuple(edits.items()), span, below, edited, self.basis.processing, flags)
        plan = self._plans.get(key)
        if plan is None:
            self.plans_made += 1
            sites = self._sites_in(span)
            if below is not None:
                sites = [site for site in sites if f"{site.place.path}.".startswith(f"{below}.")]
            plan = make_plan(sites, edits, dict.fromkeys(edited, True) | edits, self.basis, self.order)
            if len(self._plans) > 4096:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _sites_in(self, span: Span) -> list[Site]:
        sites = list(self._before) if span.embeds else []
        for block in self._blocks[span.start : span.stop]:
            sites += block
        if span.norm:
            sites += self._after if span.unembeds else self._after[:1]
        return sites

    @property
    def order(self) -> dict[tuple[str, str], int]:
        """The measured order of the model's places; the first use measures it."""
        if self._order is None:
            with self.eager_attention(), self.undisturbed():
                self._order = measure_order(self.hf_model, self._attention_paths())
        return self._order

    def _attention_paths(self) -> list[str]:
        return [self.architecture.in_layer(layer, "attn") for layer in range(self.cfg.n_layers)]

    # --- running ---------------------------------------------------------------------------------------------------------

    def run(self, request: Request, listeners: Listeners) -> Tensor | None:
        """Run the model; returns logits, or the residual stream where the span ends before the norm, or None.

        Everything comes back in the active basis.
        """
        if not listeners and request.residual is None and request.span.unembeds:
            with self.undisturbed():
                return self.basis.logits(self.hf_model(**request.inputs).logits)
        plan = self.plan_for(listeners, request.span)
        with self.wrapped() as view, self.eager_attention(plan.needs_eager):
            run = self.new_run(view, listeners, request.batch_size)
            return _trace(view, self.architecture, run, plan, request)

    def run_block(self, layer: int, residual: Tensor, listeners: Listeners, mask: Tensor | None = None) -> Tensor:
        """One block on the residual stream before it; returns the stream after it."""
        inputs = {"inputs_embeds": residual}
        if mask is not None:
            inputs["attention_mask"] = mask
        span = Span(layer, layer + 1, embeds=False, norm=False, unembeds=False)
        output = self.run(Request(inputs, span, residual), listeners)
        assert output is not None
        return output

    def new_run(self, view: View, listeners: Listeners, batch_size: int) -> Run:
        """What a run carries along, at its start."""
        return Run(view, self.basis, self.cfg, listeners, Stream(self.basis.centres_stream), batch_size)

    @contextmanager
    def eager_attention(self, needed: bool = True) -> Iterator[None]:
        """Eager attention for the time of the context; the model's own implementation comes back whatever happens."""
        before = self.hf_model.config._attn_implementation
        if not needed or before == "eager":
            yield
            return
        self.hf_model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.hf_model.set_attn_implementation(before)

    @contextmanager
    def wrapped(self) -> Iterator[View]:
        """nnsight's view of the model, for one run; a run inside another's hook gets a view of its own."""
        depth = len(self._running)
        if depth == len(self._views):
            self._views.append(View(self.hf_model, self._attention_paths()))
        view = self._views[depth]
        # Handles of a run inside another's hook lie on the outer run's.
        with self.undisturbed(), view.installed():
            self._running.append(view)
            try:
                yield view
            finally:
                self._running.pop()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Keep the run that is under way (if this happens inside one of its hooks) from seeing what runs now."""
        outer = self._running[-1].nnsight.interleaver if self._running else None
        if outer is None:
            yield
            return
        before, outer.interleaving = outer.interleaving, False
        try:
            yield
        finally:
            outer.interleaving = before


def _eps(norm: nn.Module) -> float:
    return float(norm.eps)  # type: ignore[arg-type]


def _trace(view: View, architecture: Architecture, run: Run, plan: Plan, request: Request) -> Tensor | None:
    """The one trace of a run. Its body must stay free of ``self``: what a body reads is what travels."""
    model, inputs, stops = view.nnsight, request.inputs, not request.span.unembeds
    with model.trace(**inputs) as tracer:
        output = nnsight.save(_walk(view, architecture, run, plan, request))
        if stops:
            tracer.stop()
    return output


def _walk(view: View, architecture: Architecture, run: Run, plan: Plan, request: Request) -> Tensor | None:
    """Visit the sites in order, then read what the run is for."""
    span, n_layers = request.span, run.cfg.n_layers
    if request.residual is not None:
        _start_from(view, architecture, run, request.residual, span.start)
    for site in plan.sites:
        site.visit(run)
    if not span.norm:
        end = architecture.ln_final if span.stop >= n_layers else architecture.layer(span.stop)
        return run.stream.read(Place(end, "input").read(view))
    if not span.unembeds:
        Place(architecture.ln_final, "output").read(view)
        return None
    if run.logits is not None:
        return run.logits
    return run.basis.logits(Place(architecture.unembed, "output").read(view))


def _start_from(view: View, architecture: Architecture, run: Run, residual: Tensor, start: int) -> None:
    """Let the blocks before ``start`` pass and put ``residual`` where the next module reads the stream."""
    for layer in range(min(start, run.cfg.n_layers)):
        view[architecture.layer(layer)].skip(residual)
    here = architecture.layer(start) if start < run.cfg.n_layers else architecture.ln_final
    Place(here, "input").write(view, residual)
    run.stream.written(residual)
