"""What do running, generating and sweeping come to when the model is elsewhere?

One job each: the loop and everything that makes a result small (the loss, a metric, the positions and points that were
asked for) run where the model is, so that only what was asked for travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .decoding import Decoding, Ending, Sampling
from .engine import Request
from .engine.remote.client import Job, RemoteEngine
from .engine.remote.job import Machine, Step
from .errors import HookError, UnsupportedModelError
from .utilities.lm_utils import lm_cross_entropy_loss


def forward(model: Any, call: Any, return_type: str | None, per_token: bool, stops: bool, gradients: bool) -> Any:
    """`HookedTransformer.forward` on a prepared call.

    Args:
        stops: whether the result is a residual stream.
        gradients: whether to go back from the loss, for the backward hooks.
    """
    engine: RemoteEngine = model.interior.engine
    if call.past_kv_cache is not None:
        raise UnsupportedModelError(
            "past_kv_cache stays where the model is: for a text that grows use generate(), which is one job"
        )
    job, listeners = Job(engine), model._listeners()
    if not gradients and any(getattr(point, "bwd_hooks", ()) for point in listeners.values()):
        raise HookError(
            "nothing that comes back from a server has a graph, so backward hooks would never be called: use "
            "run_with_cache(..., incl_bwd=True, return_type='loss'), in which they are, inside of "
            "`with model.hooks(bwd_hooks=...)` for your own"
        )
    step = job.step(call.request, listeners, model._recording, gradients)
    tokens = call.request.inputs.get("input_ids", call.tokens)
    kind = "stream" if stops else return_type
    if kind in ("loss", "both") and tokens is None:
        raise AssertionError("the loss needs the tokens: pass tokens= when starting at a layer")
    program: Callable[[Machine], Any] = partial(_once, step=step, nothing=kind is None)
    if kind in ("loss", "both"):
        facts = {"tokens": tokens, "mask": call.attention_mask, "per_token": per_token, "gradients": gradients}
        program = partial(_with_loss, step=step, both=kind == "both", **facts)
    elif gradients:
        raise RuntimeError("incl_bwd goes back from a number: it takes return_type='loss'")
    result, values = engine.do(program, job)
    job.fill(model._recording, values)
    return result


def _once(machine: Machine, step: Step, nothing: bool) -> Any:
    output = step.on(machine)
    return None if nothing else output, {} if step.kept is None else step.kept.values


def _with_loss(
    machine: Machine, step: Step, both: bool, tokens: Tensor, mask: Tensor | None, per_token: bool, gradients: bool
) -> Any:
    logits = step.on(machine, gradients)
    assert logits is not None
    with torch.set_grad_enabled(gradients):
        mask = None if mask is None else mask.to(logits.device)
        loss = lm_cross_entropy_loss(logits, tokens.to(logits.device), mask, per_token)
    if gradients:
        torch.autograd.backward(loss, inputs=machine.sources)
    return (logits, loss) if both else loss, {} if step.kept is None else step.kept.values


# --- generation -------------------------------------------------------------------------------------------------------


def generate(
    model: Any,
    decoding: Decoding,
    sampling: Sampling,
    ending: Ending | None,
    max_new_tokens: int,
    with_logits: bool,
) -> list[Tensor | None]:
    """Make a text longer, as one job; returns the logits of each step, if they are wanted.

    What is drawn at random is drawn there, from a seed that is drawn here.
    """
    engine: RemoteEngine = model.interior.engine
    if decoding.prompt.tokens is None:
        raise UnsupportedModelError("embeddings cannot be gone on from on a server: give text or tokens")
    job, listeners, recording = Job(engine), model._listeners(), decoding.recording
    names = None if recording is None else recording.names
    first = job.step(Request({"input_ids": decoding.text}, decoding._span), listeners)
    plan = job.planned(first.request, first.edits, names)
    seed = int(torch.randint(2**31, ()).item())
    facts = {
        "key_value_cache": model.interior.key_value_cache,
        "counts_from": model.interior.counts_from,
        "n_positions": model.interior.n_positions,
    }
    template = Step(first.request, plan, first.edits, first.points, None)
    far = Far(model.cfg, facts, template, seed)
    work = partial(_generate, far=far, decoding=decoding, sampling=sampling, ending=ending, steps=max_new_tokens)
    before = decoding.model
    decoding.model = far
    try:
        new, logits, pieces = engine.do(partial(work, with_logits=with_logits), job)
    finally:
        decoding.model = before
    job.fill(None, {})
    for token in new:
        decoding.append(token[:, 0])
    if recording is not None:
        recording._pieces = {name: dict(steps) for name, steps in pieces.items()}
    return list(logits) if with_logits else [None] * len(new)


class Far:
    """What a `Decoding` asks of its model, where the model is."""

    generation_step: int | None = None
    generation_positions: range | None = None

    def __init__(self, cfg: Any, facts: dict[str, Any], step: Step, seed: int) -> None:
        self.cfg = cfg
        self.step = step
        self.seed = seed
        #: `Interior`'s, of which this has the few that are asked for.
        self.interior = self
        self.engine = self
        self.key_value_cache = facts["key_value_cache"]
        self.counts_from = facts["counts_from"]
        self.n_positions = facts["n_positions"]
        self.machine: Any = None

    def _turn(self) -> Any:
        return torch.no_grad()

    def _listeners(self) -> dict[str, Any]:
        return self.step.points

    def run(self, request: Request, listeners: Any, recording: Any = None) -> Any:
        """One forward pass."""
        return self.machine.run(request, self.step.plan, self.step.edits, self.step.points, recording)


def _generate(
    machine: Machine,
    far: Far,
    decoding: Decoding,
    sampling: Sampling,
    ending: Ending | None,
    steps: int,
    with_logits: bool,
) -> Any:
    far.machine, logits = machine, []
    device = next(machine.hf_model.parameters()).device
    decoding.to(device)
    if ending is not None:
        ending.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(far.seed)
        for _ in range(steps):
            found = decoding.next_logits()
            new = sampling.draw(found, decoding.text)
            decoding.append(new if ending is None else ending.fill(new))
            if with_logits:
                logits.append(found.clone())
            if ending is not None and ending.reached:
                break
    recording = decoding.recording
    pieces = {} if recording is None else {name: list(each.items()) for name, each in recording._pieces.items()}
    return decoding.new, logits, pieces


# --- sweeps -----------------------------------------------------------------------------------------------------------


class Rows:
    """Stands for a hook point in a run whose rows belong to several interventions.

    Args:
        point: the hooks that the model has there anyway, if any.
        hooks: number of the block of rows -> its own hooks.
        blocks: how many blocks there are.
    """

    def __init__(self, point: Any, hooks: Mapping[int, Sequence[Callable]], blocks: int) -> None:
        self.point = point
        self.hooks = hooks
        self.blocks = blocks

    def __call__(self, x: Tensor) -> Tensor:
        return self.run_forward_hooks(x)

    def run_forward_hooks(self, x: Tensor) -> Tensor:
        """Show each block to those who listen to it; returns ``x`` with what they make of it."""
        size = x.shape[0] // self.blocks
        for block in range(self.blocks):
            rows = x[block * size : (block + 1) * size]
            result = self.point.run_forward_hooks(rows)
            for hook in self.hooks.get(block, ()):
                changed = hook(result, hook=self.point)
                result = result if changed is None else changed
            if result is not rows:
                if result.shape != rows.shape:
                    raise HookError(
                        f"a hook at {self.point.name!r} returned {list(result.shape)}, where the activation is "
                        f"{list(rows.shape)}: interventions that share a run cannot change that"
                    )
                rows.copy_(result.clone())
        return x


class Share:
    """One run of a sweep: where it starts, its interventions' hooks, and the results' numbers."""

    def __init__(self, start: int, below: Any, numbers: list[int], step: Step, wanted: bool) -> None:
        self.start = start
        #: (request, plan) of the run without hooks up to where this one starts.
        self.below = below
        self.numbers = numbers
        self.step = step
        #: Whether the run gives the wanted logits only.
        self.wanted = wanted


def sweep(base: Any, groups: list[Any], metric: Callable[[Tensor], Any] | None) -> dict[int, Any]:
    """All interventions of a sweep as one job; number of an intervention -> its logits, or metric."""
    model = base.model
    engine: RemoteEngine = model.interior.engine
    job, shares = Job(engine), []
    heard = model._listeners()
    for together in groups:
        if together[0].alone:
            raise HookError("an intervention at a module of your own does not travel: remote sweeps take functions")
        names: dict[str, dict[int, list[Callable]]] = {name: {} for name in heard}
        for block, intervention in enumerate(together):
            for name, own in intervention.hooks.items():
                names.setdefault(name, {})[block] = [job.hook(name, hook) for hook in own]
        points = {name: Rows(job.point(name, model.mod_dict[name]), own, len(together)) for name, own in names.items()}
        start = base.start_of(list(points))
        below, above, wanted = base.requests(start, len(together), points)
        edits = dict.fromkeys(points, True)
        step = Step(above, job.planned(above, edits, None), edits, points, None)
        plan = None if below is None else job.planned(below, {}, None)
        known = None if below is None else (below, plan)
        shares.append(Share(start, known, [i.index for i in together], step, wanted))
    if metric is not None:
        job.states.reached_by(metric, "the metric")
    keep = base.logits_to_keep
    rows, width = base.tokens.shape[0], model.hf_model.get_submodule(engine.architecture.embed).weight.shape[1]
    found = engine.do(partial(_sweep, shares=shares, metric=metric, keep=keep, rows=rows, width=width), job)
    job.fill(None, {})
    return dict(found)


def _sweep(machine: Machine, shares: list[Share], metric: Callable | None, keep: Any, rows: int, width: int) -> Any:
    results: list[tuple[int, Any]] = []
    streams: dict[tuple[int, bool], Any] = {}
    for share in shares:
        request, eager = share.step.request, share.step.plan.needs_eager
        if share.below is not None:
            if (share.start, eager) not in streams:
                below, plan = share.below
                streams[share.start, eager] = machine.run(below, plan, {}, {})
            stream = streams[share.start, eager].repeat(len(share.numbers), 1, 1)
            request.residual = stream
            # As `Engine.complete` has it.
            request.inputs["inputs_embeds"] = stream.new_zeros(*stream.shape[:-1], width)
        logits = share.step.on(machine)
        assert logits is not None
        if not share.wanted:
            logits = logits[:, keep] if isinstance(keep, Tensor) else logits[:, -keep:]
        for number, own in zip(share.numbers, logits.split(rows), strict=True):
            results.append((number, own.clone() if metric is None else metric(own)))
    return results
