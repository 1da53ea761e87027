"""How does one forward pass run, with its hook points?

One run is one pass that nnsight follows, with one loop over the plan's sites beside it (`stepping`). A run that nobody
listens to and that goes to the end is HuggingFace's own forward and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from ..affine import widths
from ..architectures import Architecture
from ..architectures.record import Softmax
from ..basis import Basis, Stream
from ..errors import SourceNotFoundError, UnsupportedModelError
from ..whole import home_of
from . import implementations
from .compiled import states_of, uncompiled
from .forward import Request
from .layout import sites_of
from .norm_sites import Norm, NormSite
from .passage import Event, Passage, measure
from .passes import run_once, watch_once
from .places import Place, View
from .plan import Ends, Listeners, Plan, Span, edits_of, entrance, make_plan, rank_of
from .sites import Recording, Run, Site
from .tensor_parallel import Parts, is_divided_among_processes
from .turns import Turns, in_turn, turn

#: Norms that processing leaves as they are: nothing linear reads what they return.
UNFOLDED_NORMS = dict.fromkeys(("ln1_post", "ln2_post", "q_norm", "k_norm", "neuron_norm"), False)


class Engine:
    """Runs one HF model and shows its values to hook points."""

    #: Whether runs are jobs for a machine that has the model (`remote`).
    elsewhere = False

    def __init__(self, hf_model: Any, architecture: Architecture, basis: Basis, cfg: Any) -> None:
        self.hf_model = hf_model
        self.architecture = architecture
        self.basis = basis
        self.cfg = cfg
        #: How many plans were made so far; a loop over one hook set makes one.
        self.plans_made = 0
        self._plans: dict[tuple, Plan] = {}
        self._views: dict[tuple, View] = {}
        self._running: list[View] = []
        self._passage: Passage | None = None
        self._turns: Turns | None = None

    @property
    def turns(self) -> Turns:
        """The turns in which threads run the model."""
        if self._turns is None:
            self._turns = turn(self.hf_model)
        return self._turns

    @cached_property
    def _sites(self) -> tuple[list[Site], list[list[Site]], list[Site]]:
        """Every site there is: before the blocks, by block, after the blocks."""
        return sites_of(self.architecture, self.cfg, self.norms)

    @property
    def sites(self) -> list[Site]:
        """Every site of the model, in TransformerLens' order."""
        before, blocks, after = self._sites
        return [*before, *(site for block in blocks for site in block), *after]

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """Every norm of the model, by its path in the HF model."""
        arch = self.architecture
        around = ((arch.ln_final, arch.head is None), (arch.embed_norm, False))
        folds = {path: folded for path, folded in around if path}
        for layer, block in enumerate(arch.blocks):
            if block.beside is not None:
                folds[arch.below(layer, block.beside.reads)] = block.folds_ln2
            folds_ln2 = block.folds_ln2 and block.beside is None
            for role, folded in {"ln1": block.folds_ln1, "ln2": folds_ln2, **UNFOLDED_NORMS}.items():
                if getattr(block, role) is not None:
                    folds.setdefault(arch.in_layer(layer, role), folded)
        module = self.hf_model.get_submodule
        return {path: Norm.of(module(path), path, arch, folded) for path, folded in folds.items()}

    @cached_property
    def parts(self) -> Parts | None:
        """The places at which this process has a part of a value, under tensor parallelism."""
        divided = is_divided_among_processes(self.hf_model)
        return Parts(self.hf_model, self.architecture) if divided else None

    # --- planning -----------------------------------------------------------------------------------------------------

    def plan_for(
        self,
        edits: Mapping[str, bool],
        span: Span,
        below: str | None = None,
        given: tuple[str, ...] = (),
        recorded: Collection[str] | None = None,
    ) -> Plan:
        """The plan for these listeners, from memory if the same points were listened to before.

        Args:
            edits: name of a listened-to point -> whether its listeners may change the value.
            below: plan only for places inside this module of the HF model.
            given: points whose value comes from outside, as if a hook had set it.
            recorded: further points whose value is wanted (hashable).
        """
        flags = (self.cfg.use_attn_in, self.cfg.use_split_qkv_input)
        key = (tuple(edits.items()), span, below, given, recorded, self.basis.processing, flags)
        plan = self._plans.get(key)
        if plan is None:
            self.plans_made += 1
            sites = self._sites_in(span)
            if below is not None:
                sites = [site for site in sites if f"{site.place.path}.".startswith(f"{below}.")]
            paths = self._visited(span) if below is None else {below}
            ends = None if below is not None else Ends.of(span, self.architecture, self._skipped(span))
            listened, may_change = {*edits, *(recorded or ())}, {**dict.fromkeys(given, True), **edits}
            order, _, flow = self.passage
            plan = make_plan(sites, listened, may_change, self.basis, order, flow, paths, ends)
            if len(self._plans) > 4096:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _visited(self, span: Span) -> set[str]:
        """The modules at which a run starts and stops, besides the sites'."""
        arch = self.architecture
        # The root's output are the logits where its head's are not.
        ends = {arch.entrance(span.start)[0], arch.entrance(span.stop)[0], arch.unembed}
        return {*ends, *self._skipped(span)} | ({""} if arch.after_unembed else set())

    def _skipped(self, span: Span) -> tuple[str, ...]:
        """The layers that need not run, in order. Not those that return more than the stream: nobody knows what."""
        if span.embeds or self.architecture.rereads is not None:
            return ()
        before = map(self.architecture.layer, range(min(span.start, self.cfg.n_layers)))
        return tuple(layer for layer in before if (layer, "several", 0) not in self.order)

    def _sites_in(self, span: Span) -> list[Site]:
        before, blocks, after = self._sites
        sites = list(before) if span.embeds else []
        for block in blocks[span.start : span.stop]:
            sites += block
        if span.norm:
            sites += after if span.unembeds else [site for site in after if isinstance(site, NormSite)]
        return sites

    @property
    def order(self) -> dict[Event, int]:
        """The measured order of the model's places."""
        return self.passage.order

    @property
    def passage(self) -> Passage:
        """What a forward pass comes by; the first use measures it."""
        if self._passage is None:
            with self.eager_attention():
                self._passage = measure(self.hf_model, self._attention_paths(), self._two_tokens())
        return self._passage

    def _two_tokens(self) -> dict[str, Any]:
        """The shortest text on which everything happens."""
        rows = 1 if self.architecture.rows is None else getattr(self.hf_model.config, self.architecture.rows)
        return {
            "input_ids": torch.zeros(rows, 2, dtype=torch.long, device=home_of(self.hf_model)),
            "use_cache": False,
        }

    @cached_property
    def comes_in_order(self) -> bool:
        """Whether the forward pass comes by the points in TransformerLens' order."""
        before, blocks, after = self._sites
        sites = [*before, *(site for block in blocks for site in block), *after]
        return sorted(sites, key=lambda site: rank_of(site, self.order)) == sites

    def _attention_paths(self) -> list[str]:
        return list(self._softmaxes())

    def _softmaxes(self) -> dict[str, Softmax]:
        blocks = self.architecture.blocks
        # Where not even the call is known, there is nothing to look for.
        why = self.architecture.why_refused
        hidden = [block.softmax.call is None and why(SQUARE.format(l=i)) is not None for i, block in enumerate(blocks)]
        attending = [layer for layer, block in enumerate(blocks) if block.attn is not None and not hidden[layer]]
        return {self.architecture.in_layer(layer, "attn"): blocks[layer].softmax for layer in attending}

    # --- running ------------------------------------------------------------------------------------------------------

    @in_turn
    def run(self, request: Request, listeners: Listeners, recording: Recording | None = None) -> Tensor | None:
        """Run the model; returns logits, or the residual stream where the span ends before the norm, or None.

        Everything comes back in the active basis; what ``recording`` wants is kept as it is after the hooks.

        Raises:
            UnsupportedModelError: an edit in training with gradient checkpointing.
        """
        self.complete(request)
        unseen = not listeners and recording is None and request.residual is None
        if unseen and (request.span.unembeds or not self._embedding_has_mean):
            return self._run_unseen(request)
        edits = edits_of(listeners)
        if any(edits.values()):
            self._refuse_checkpointing()
        plan = self.plan_for(edits, request.span, recorded=None if recording is None else recording.names)
        watches = not listeners and request.residual is None
        with self.wrapped(plan) as view, self._eager_where(plan, request, watches):
            run = self.new_run(view, listeners, edits, request.batch_size, recording)
            run.puts_off = request.residual is None
            with run.explaining():
                output = (watch_once if watches else run_once)(view, run, plan, request)
        # As HuggingFace does where layers are on several devices.
        return output.to(request.device) if output is not None and request.span.unembeds else output

    def complete(self, request: Request) -> None:
        """Add what HF's forward has to be told of a run, whoever asks for it."""
        if self._has_recurrences:
            # Nobody would see the cache that HF makes otherwise; they write into it, which gradients do not survive.
            # With attention alone HF's default stays: without a cache keys lie otherwise in memory, which can show in
            # the last bits.
            request.inputs.setdefault("use_cache", False)
        if request.residual is not None:
            self._stand_in(request, request.residual)

    @cached_property
    def _has_recurrences(self) -> bool:
        """Whether some layer has something else in attention's place."""
        return any(block.attn is None or block.attn_also is not None for block in self.architecture.blocks)

    def _stand_in(self, request: Request, residual: Tensor) -> None:
        """Start from some embeddings: the residual comes in behind them, and some models add to these in place."""
        if "inputs_embeds" in request.inputs:
            width = widths(self.hf_model.get_submodule(self.architecture.embed))[0]
            request.inputs["inputs_embeds"] = residual.new_zeros(*residual.shape[:-1], width)

    @cached_property
    def _states(self) -> list[dict[str, Any]]:
        """The attributes of each module, which are looked through before a run for what was compiled."""
        return states_of(self.hf_model)

    @property
    def _embedding_has_mean(self) -> bool:
        """Whether reading the stream takes knowing the embedding."""
        return self.architecture.embed_norm is not None and self.basis.centres_stream

    def _refuse_checkpointing(self) -> None:
        model = self.hf_model
        if model.training and torch.is_grad_enabled() and model.is_gradient_checkpointing:
            raise UnsupportedModelError(
                "gradient checkpointing runs each block again in the backward pass, without the hooks, so that "
                "gradients would be those of a run without edits: call hf_model.gradient_checkpointing_disable() first"
            )

    def _run_unseen(self, request: Request) -> Tensor | None:
        """A run that nobody listens to: HF's own forward, left by an exception where the span ends."""
        if request.span.unembeds:
            return self.basis.logits(self.hf_model(**request.inputs).logits, ours=True)
        norm, arch = request.span.norm, self.architecture
        place = Place(arch.unembed, "input") if norm else entrance(arch, request.span.stop)
        handle = _Leave(place).register_on(self.hf_model.get_submodule(place.path))
        try:
            with uncompiled(self._states):
                self._outermost(needed=place.path)(**request.inputs)
        except _Reached as reached:
            first = arch.positions_first is not None and place.path.startswith(f"{arch.positions_first}.")
            value = reached.value.transpose(0, 1) if first else reached.value
            return None if norm else Stream(self.basis.centres_stream).read(value)
        finally:
            handle.remove()
        raise AssertionError(f"the forward pass did not reach {place.path!r}")

    def _outermost(self, needed: str) -> Any:
        """What to call for a run that ends at a module: what is around the stack of blocks does nothing before it."""
        model = self.hf_model
        watched = model._forward_pre_hooks or model._forward_hooks or "forward" in model.__dict__
        return model.base_model if needed.startswith(f"{model.base_model_prefix}.") and not watched else model

    def run_block(self, layer: int, residual: Tensor, listeners: Listeners, mask: Tensor | None = None) -> Tensor:
        """One block on the residual stream before it; returns the stream after it.

        Raises:
            UnsupportedModelError: the block reads more than that.
        """
        if self.architecture.rereads is not None:
            raise UnsupportedModelError(
                f"a block does not run by itself here: {self.architecture.rereads}. Run the model with "
                "start_at_layer=, stop_at_layer= and tokens="
            )
        inputs = {"inputs_embeds": residual}
        if mask is not None:
            inputs["attention_mask"] = mask
        span = Span(layer, layer + 1, embeds=False, norm=False, unembeds=False)
        output = self.run(Request(inputs, span, residual), listeners)
        assert output is not None
        return output

    def new_run(
        self,
        view: View,
        listeners: Listeners,
        edits: Mapping[str, bool],
        batch_size: int,
        recording: Recording | None = None,
    ) -> Run:
        """What a run carries along, at its start."""
        stream, overwritten = Stream(self.basis.centres_stream), self.passage.overwritten
        return Run(view, self.basis, self.cfg, listeners, stream, batch_size, edits, recording, overwritten)

    @contextmanager
    def _eager_where(self, plan: Plan, request: Request, watches: bool) -> Iterator[None]:
        """Eager attention where a run needs it: in single layers, if it only fills a cache with their squares."""
        modules = None
        if plan.needs_eager and watches and "past_key_values" not in request.inputs:
            modules = implementations.alone(self.hf_model, plan.sites, self._softmaxes())
        with self.eager_attention(plan.needs_eager and modules is None), implementations.eager(modules or ()):
            yield

    @contextmanager
    def eager_attention(self, needed: bool = True) -> Iterator[None]:
        """Eager attention, and nothing compiled, for the time of the context; what was there comes back in any case."""
        before = self.hf_model.config._attn_implementation
        with uncompiled(self._states):
            if not needed or before == "eager":
                yield
                return
            self.hf_model.set_attn_implementation("eager")
            try:
                yield
            finally:
                self.hf_model.set_attn_implementation(before)

    @contextmanager
    def wrapped(self, plan: Plan) -> Iterator[View]:
        """nnsight's view of the model, for one run of a plan; a run inside another's hook gets a view of its own."""
        # Looking inside a forward makes every call of it dearer, so plans without softmax use a view that does not.
        key = (len(self._running), plan.looks_inside, plan.needs_eager)
        view = self._views.get(key)
        # A run inside another's hook finds that run's handles, which are none of the model's own forwards.
        if view is None or not (self._running or view.fits(plan.paths)):
            softmaxes = self._softmaxes() if plan.looks_inside else None
            first = self.architecture.positions_first
            view = self._views[key] = View(
                self.hf_model, softmaxes, required=plan.needs_eager, positions_first=first, parts=self.parts
            )
        with view.installed(plan.paths):
            self._running.append(view)
            try:
                yield view
            except OutOfOrderError as error:
                self._forget_structure()
                raise SourceNotFoundError(
                    f"the forward pass did not come by where it did when its order was measured ({error}): modules of "
                    "the HF model were replaced or changed since. It will be measured again; run once more."
                ) from error
            finally:
                self._running.pop()

    def _forget_structure(self) -> None:
        self._views.clear()
        self._plans.clear()
        self._passage = None
        self.__dict__.pop("_states", None)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy carries along: no view, because nnsight's handles belong to the modules they were made for."""
        state = {name: value for name, value in self.__dict__.items() if name != "_states"}
        return state | {"_plans": {}, "_views": {}, "_running": [], "_turns": None}


#: The point whose absence says that an attention's softmax was not found.
SQUARE = "blocks.{l}.attn.hook_pattern"


class _Reached(Exception):
    """The forward pass has come to where a run ends."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class _Leave:
    """Hooks that end the run at a module's input or output, once it has been called a number of times."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.calls = place.call

    def register_on(self, module: nn.Module) -> Any:
        """Watch the module; the handle's ``remove`` ends that."""
        if self.place.side == "input":
            return module.register_forward_pre_hook(self.before, with_kwargs=True)
        return module.register_forward_hook(self.behind)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Leave with the first argument."""
        self._leave(next(iter((*args, *kwargs.values()))))

    def behind(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Leave with what the module returns, or the first of it."""
        self._leave(output[0] if isinstance(output, tuple | list) else output)

    def _leave(self, value: Tensor) -> None:
        if self.calls == 0:
            raise _Reached(value)
        self.calls -= 1
