"""How does one pass of an encoder, or of a part of it, run with its hook points?

As in `run.py`, a run is one nnsight trace with one loop over the sites that somebody listens to. What differs: there is
no processing and so no basis, a pass may start at any module, and what it returns is whatever that module returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures.record import Softmax
from ..basis import Stream
from ..errors import SourceNotFoundError, UnsupportedModelError
from .passage import Event, measure
from .places import SoftmaxPlace, View
from .plan import Listeners, edits_of
from .sites import Run, Site
from .turns import turn


@dataclass
class EncoderRun(Run):
    """What one pass carries from site to site."""

    #: Path of a projection -> what it has to read instead of its own input, with or without a head axis.
    pending: dict[str, Tensor] = field(default_factory=dict)
    #: Names of the scores that were edited, so that a softmax row may be NaN.
    scores: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Plan:
    sites: tuple[Site, ...]
    paths: frozenset[str]
    needs_eager: bool


class EncoderEngine:
    """Runs a HF model, or a module of it, and shows its values to hook points.

    Args:
        hf_model: the model.
        cfg: its config in TransformerLens' words, for the flags that sites ask for.
        sites: where its points are, those at one place in the order in which they fire.
        attentions: paths of the modules with a softmax in their forward.
        sample: arguments of a small forward pass, on which the order of the places is measured.
    """

    def __init__(
        self, hf_model: Any, cfg: Any, sites: Sequence[Site], attentions: Sequence[str], sample: Mapping[str, Any]
    ) -> None:
        self.hf_model = hf_model
        self.cfg = cfg
        self.sites = sites
        self.attentions = list(attentions)
        self.sample = sample
        self._plans: dict[tuple, _Plan] = {}
        self._views: dict[tuple[int, bool], View] = {}
        self._running: list[View] = []
        self._order: dict[Event, int] | None = None

    def run(self, path: str, args: tuple, kwargs: Mapping[str, Any], listeners: Listeners) -> Any:
        """What the module at ``path`` (empty for the whole model) returns for these arguments.

        Raises:
            UnsupportedModelError: in training, hooks where layers are dropped at random, or edits with checkpointing.
        """
        with turn(self.hf_model):
            if not listeners:
                return self.hf_model.get_submodule(path)(*args, **kwargs)
            return self._run_seen(path, args, kwargs, listeners)

    def _run_seen(self, path: str, args: tuple, kwargs: Mapping[str, Any], listeners: Listeners) -> Any:
        edits = edits_of(listeners)
        if self.hf_model.training:
            self._refuse_in_training(any(edits.values()))
        plan = self._plan(path, edits)
        rows = next((value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), 1)
        with self._wrapped(plan) as view, self._eager_attention(plan.needs_eager):
            basis: Any = None
            run = EncoderRun(view, basis, self.cfg, listeners, Stream(False), rows, edits, None)
            with run.explaining():
                return _trace(view[path], args, kwargs, run, plan)

    def _plan(self, path: str, edits: Mapping[str, bool]) -> _Plan:
        """The sites below ``path`` that are listened to or made necessary by an edit, in the measured order."""
        key = (path, tuple(edits.items()))
        if key not in self._plans:
            below = f"{path}." if path else ""
            wanted = [site for site in self.sites if f"{site.place.path}.".startswith(below) and _needed(site, edits)]
            order = self._measured()
            wanted.sort(key=lambda site: _rank(site, order))
            paths = frozenset({path, *(p for site in wanted for p in (site.place.path, *site.writes_at))})
            if len(self._plans) > 4096:
                self._plans.clear()
            looks_inside = any(isinstance(site.place, SoftmaxPlace) for site in wanted)
            self._plans[key] = _Plan(tuple(wanted), paths, looks_inside)
        return self._plans[key]

    def _measured(self) -> dict[Event, int]:
        if self._order is None:
            device = next(self.hf_model.parameters()).device
            inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.sample.items()}
            # In training mode a layer may be dropped.
            modes = [(module, module.training) for module in self.hf_model.modules()]
            self.hf_model.eval()
            try:
                with self._eager_attention(True):
                    self._order = measure(self.hf_model, self.attentions, inputs).order
            finally:
                for module, mode in modes:
                    module.training = mode
        return self._order

    @contextmanager
    def _eager_attention(self, needed: bool) -> Iterator[None]:
        """Eager attention for the time of the context, if needed; what was there comes back whatever happens."""
        # Not every version of transformers hands the choice on to a stack with a config of its own (T5's have that).
        models = {id(m.config): m for m in self.hf_model.modules() if isinstance(m, PreTrainedModel)} if needed else {}
        before = [(model, model.config._attn_implementation) for model in models.values()]
        if all(implementation == "eager" for _, implementation in before):
            yield
            return
        for model, _ in before:
            model.set_attn_implementation("eager")
        try:
            yield
        finally:
            for model, implementation in before:
                model.set_attn_implementation(implementation)

    @contextmanager
    def _wrapped(self, plan: _Plan) -> Iterator[View]:
        """nnsight's view of the model for one run; a run inside another's hook gets a view of its own."""
        key = (len(self._running), plan.needs_eager)
        view = self._views.get(key)
        if view is None or not (self._running or view.fits(plan.paths)):
            softmaxes = dict.fromkeys(self.attentions, Softmax()) if plan.needs_eager else None
            view = self._views[key] = View(self.hf_model, softmaxes)
        with view.installed(plan.paths):
            self._running.append(view)
            try:
                yield view
            except OutOfOrderError as error:
                self._views.clear()
                self._plans.clear()
                self._order = None
                raise SourceNotFoundError(
                    f"the forward pass did not come by where it did when its order was measured ({error}): modules of "
                    "the HF model were replaced or changed since. It will be measured again; run once more."
                ) from error
            finally:
                self._running.pop()

    def _refuse_in_training(self, edits: bool) -> None:
        model = self.hf_model
        if getattr(model.config, "layerdrop", 0):
            raise UnsupportedModelError(
                "in training mode this model leaves out layers at random, and a hook there would not fire: call "
                "hf_model.eval(), or set hf_model.config.layerdrop = 0"
            )
        if edits and torch.is_grad_enabled() and model.is_gradient_checkpointing:
            raise UnsupportedModelError(
                "gradient checkpointing runs each block again in the backward pass, without the hooks, so that "
                "gradients would be those of a run without edits: call hf_model.gradient_checkpointing_disable() first"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy carries along: no view, because nnsight's handles belong to the modules they were made for."""
        return self.__dict__ | {"_views": {}, "_running": []}


def _needed(site: Site, edits: Mapping[str, bool]) -> bool:
    return any(name in edits for name in site.names) or any(edits.get(name) for name in site.after_edits_of)


def _rank(site: Site, order: Mapping[Event, int]) -> tuple[int, int]:
    place = site.place
    if isinstance(place, SoftmaxPlace):
        return order[(place.path, "softmax", 0)], int(place.side == "output")
    return order[(place.path, place.side, 0)], 0  # type: ignore[union-attr]


def _trace(part: Any, args: tuple, kwargs: Mapping[str, Any], run: Run, plan: _Plan) -> Any:
    """The one trace of a run."""
    with part.trace(*args, **kwargs):
        output = nnsight.save(_walk(part, run, plan))
    return output


def _walk(part: Any, run: Run, plan: _Plan) -> Any:
    for site in plan.sites:
        site.visit(run)
    return part.output
