"""How does a run become a job for a model that is elsewhere, and its result what a run here would give?

Everything up to the plan is made here, on the model without its weights; the plan travels with the hooks, and what
comes back goes into the caches and objects that it is meant for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...architectures import Architecture
from ...basis import Basis
from ...errors import UnsupportedModelError
from ...hooked_root_module import CachingHook
from ..forward import Request
from ..passage import Passage, measure
from ..places import Place
from ..plan import Listeners, Plan, edits_of, rank_of
from ..run import Engine
from ..sites import Recording
from ..turns import in_turn
from .hooks import States, hooks_of, put_back, source_of
from .job import (
    JobPoint,
    JobPointBack,
    Kept,
    Machine,
    Setting,
    SourceSite,
    Step,
    Weights,
    WholeWeights,
    watch,
    watch_calls,
)
from .service import Service
from .weights import Fetched

#: What only some runs call of the weights, by what asks for it.
_OF_RESULTS = frozenset(("attention_output",))
_OF_WEIGHTS = frozenset(("parameters", "value_bias", "_heads"))
#: Sizes of heads travel, and jobs are written on a machine that knows where layers are.
#: What is kept travels, so that nothing of it is put off.
_NEVER = frozenset(
    "_measured_heads bring device_of record keep_later keep_stream keep_branch derives_from depth waiting".split()
)
_OF_SINKS = frozenset(("_sink", "share", "own_scores", "unshifted"))
_OF_WHOLE_BRANCHES = frozenset(("branch", "raw_branch", "_branch", "shapes", "_refactoring_maps"))


class RemoteEngine(Engine):
    """Runs a model that a service has."""

    elsewhere = True

    def __init__(self, hf_model: Any, architecture: Architecture, basis: Basis, cfg: Any, service: Service) -> None:
        super().__init__(hf_model, architecture, basis, cfg)
        self.service = service

    @property
    def passage(self) -> Passage:
        """What a forward pass comes by: measured without weights, or, where that cannot be, by a job."""
        if self._passage is None:
            inputs = self._two_tokens()
            if not inputs["input_ids"].is_meta:
                return super().passage
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            try:
                with self.eager_attention(), torch.device("meta"):
                    self._passage = measure(self.hf_model, self._attention_paths(), inputs)
            except (RuntimeError, NotImplementedError):
                # A mixture of experts, say, asks which token goes where.
                self._passage = self._measured_there(inputs)
        return self._passage

    def _measured_there(self, inputs: dict[str, Any]) -> Passage:
        rows, length = inputs["input_ids"].shape
        program = partial(_measure, paths=self._attention_paths(), rows=rows, length=length)
        order, overwritten = self.do(program, Job(self), eager=True)
        return Passage(dict(order), frozenset(overwritten), {})

    def lend_weights(self) -> None:
        """Let weights that are read come from where the model is."""
        Fetched(self)

    @in_turn
    def run(self, request: Request, listeners: Listeners, recording: Recording | None = None) -> Tensor | None:
        """`Engine.run`, as a job of its own."""
        job = Job(self)
        step = job.step(request, listeners, recording)
        output, values = self.do(partial(_once, step=step), job)
        job.fill(recording, values)
        return output

    def do(self, program: Callable[[Machine], Any], job: Job, eager: bool | None = None) -> Any:
        """Run a program on the model; returns what it returns, and gives the user's objects what it has put in them."""
        eager = job.needs_eager if eager is None else eager
        result, changes = self.service.run(program, job.setting(), job.states.found, eager, job.left_out)
        put_back(job.states.found, changes)
        return result


class Job:
    """What travels for some runs, as far as it is known before.

    Args:
        engine: plans the runs.
    """

    def __init__(self, engine: RemoteEngine) -> None:
        self.engine = engine
        self.states = States()
        self.plans: list[Plan] = []
        self.kept: Kept | None = None
        #: The hooks that fill caches of their own, and what they keep in a job.
        self._caches: list[tuple[CachingHook, Kept]] = []
        self._results = False

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(
        self, request: Request, listeners: Listeners, recording: Recording | None = None, gradients: bool = False
    ) -> Step:
        """A forward pass, after which there may be one back.

        Raises:
            HookError: a hook cannot travel, or a key-value cache that would have to come back.
        """
        engine = self.engine
        engine.complete(request)
        if "past_key_values" in request.inputs:
            raise UnsupportedModelError(
                "a key-value cache stays where the model is: for a text that grows use generate(), which is one job"
            )
        edits = edits_of(listeners)
        plan = self.planned(request, edits, None if recording is None else recording.names)
        plan = self._with_sources(plan) if gradients and request.span.embeds else plan
        points = {name: self.point(name, point) for name, point in listeners.items()}
        self.kept = None if recording is None else Kept(recording.names, _cut_of(recording))
        return Step(request, plan, edits, points, self.kept)

    def planned(self, request: Request, edits: dict[str, bool], recorded: Any) -> Plan:
        """The plan of a run, which the job is prepared for."""
        plan = self.engine.plan_for(edits, request.span, recorded=recorded)
        self.plans.append(plan)
        self._results |= any(name.endswith("attn.hook_result") for name in (*edits, *(recorded or ())))
        return plan

    def _with_sources(self, plan: Plan) -> Plan:
        """A plan by which gradients go no further back than to the embeddings."""
        paths, order = (self.engine.architecture.embed, self.engine.architecture.pos_embed), self.engine.order
        sources = [SourceSite(Place(path, "output")) for path in paths if path is not None]
        # The sort is stable: at one place, the source comes first.
        sites = sorted([*sources, *plan.sites], key=lambda site: rank_of(site, order))
        return replace(plan, sites=tuple(sites))

    def point(self, name: str, point: Any) -> JobPoint:
        """What stands for a hook point in the job."""
        forward, backward = ([self.hook(name, h) for h in hooks_of(point, side)] for side in ("fwd", "bwd"))
        self.states.add(point.ctx)
        if backward:
            return JobPointBack(name, point.ctx, forward, backward)
        return JobPoint(name, point.ctx, forward)

    def hook(self, name: str, hook: Callable) -> Callable:
        """A hook as it travels."""
        if isinstance(hook, CachingHook):
            kept = next((kept for known, kept in self._caches if known is hook), None)
            if kept is None:
                kept = Kept((), hook.cut, hook.suffix)
                self._caches.append((hook, kept))
                # What it puts away comes back as the contents of a dict.
                self.states.add(kept.values)
            return kept
        self.states.reached_by(hook, f"the hook {source_of(hook)} at {name!r}")
        return hook

    def fill(self, recording: Recording | None, values: dict[str, Tensor]) -> None:
        """Put what has come back into the caches that it is for."""
        if recording is not None:
            put = getattr(recording, "put", recording.keep)
            for name, value in values.items():
                put(name, value)
        for hook, kept in self._caches:
            for name, value in kept.values.items():
                hook.put(name, value)

    # --- what the runs have in common ---------------------------------------------------------------------------------

    @property
    def needs_eager(self) -> bool:
        """Whether a run sees the softmax."""
        return any(plan.needs_eager for plan in self.plans)

    def setting(self) -> Setting:
        """How to read the model."""
        engine = self.engine
        inside = any(plan.looks_inside for plan in self.plans)
        paths = {site.place.path for plan in self.plans for site in plan.sites}
        softmaxes = {path: each for path, each in engine._softmaxes().items() if inside and path in paths}
        overwritten = engine._passage.overwritten if engine._passage is not None else frozenset()
        first = engine.architecture.positions_first
        looks = (watch if self.needs_eager else watch_calls) if softmaxes else None
        basis = _travelling(engine.basis, whole=not self.left_out >= _OF_WHOLE_BRANCHES)
        return Setting(basis, engine.cfg, softmaxes, looks, overwritten, first)

    @property
    def left_out(self) -> frozenset[str]:
        """Methods that no run of the job calls."""
        processing = self.engine.basis.processing
        out = _NEVER if self._results else _NEVER | _OF_RESULTS
        if not (self._results or processing.refactor_factored_attn_matrices):
            out |= _OF_WHOLE_BRANCHES
        sites = [site for plan in self.plans for site in plan.sites]
        if not any(block.sinks or block.softmax.shifted for block in self.engine.architecture.blocks):
            out |= _OF_SINKS
        return out if any(site.reads_weights for site in sites) else out | _OF_WEIGHTS


def _travelling(basis: Basis, whole: bool) -> Basis:
    """The basis without what it has computed; ``whole`` if branches of weights are to be made with it."""
    parameters = copy.copy(basis.weights.parameters)
    blocks = parameters.architecture.blocks
    heads = {layer: parameters.heads(layer) for layer, block in enumerate(blocks) if block.attn is not None}
    parameters._heads = heads
    assert parameters._head_norms is not None
    kind: Any = WholeWeights if whole else Weights
    return Basis(kind(basis.hf_model, parameters.architecture, parameters, basis.processing))


def _cut_of(recording: Any) -> Callable[[str, Tensor], Tensor]:
    cut = getattr(recording, "cut", None)
    return _whole if cut is None else cut


def _whole(name: str, value: Tensor) -> Tensor:
    return value


# --- programs ---------------------------------------------------------------------------------------------------------


def _once(machine: Machine, step: Step) -> Any:
    output = step.on(machine)
    return output, {} if step.kept is None else step.kept.values


def _measure(machine: Machine, paths: list[str], rows: int, length: int) -> Any:
    device = next(machine.hf_model.parameters()).device
    tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
    found = measure(machine.hf_model, paths, {"input_ids": tokens, "use_cache": False})
    return list(found.order.items()), list(found.overwritten)
