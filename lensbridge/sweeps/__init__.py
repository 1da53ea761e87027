"""How are many interventions on one input run fast?

Side by side in the batch of one forward pass, which starts at the first layer that they touch: below it they are all
the run without interventions. To a hook nothing of this shows, and the results come in the order that was asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..engine import Request
from ..errors import UnsupportedModelError
from ..hooked_root_module import NamedHook
from ..inputs import Call, prepare, span_of
from ..interior import Interior
from ..native.interior import NativeInterior
from ..tokens import PaddingSide
from ..utilities.defaults_utils import USE_DEFAULT_VALUE, LocallyOverridenDefaults
from .interventions import SQUARES, Intervention, layer_of, resolve
from .shared_points import shared_points
from .sharing import batches, busy_tokens, most_at_once

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]


class SweepMethods:
    """`run_sweep`, as a method of a model."""

    cfg: Any
    interior: Interior | NativeInterior
    hf_model: Any

    def run_sweep(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        interventions: Iterable[Sequence[NamedHook]],
        metric: Metric | None = None,
        *,
        batch_size: int | None = None,
        logits_to_keep: int | Int[Tensor, "kept"] = 0,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        progress: bool = False,
        remote: bool | str | None = None,
    ) -> Iterator[Any]:
        """Run the model once per intervention, several at a time; yields the results in order.

        The results are those of a loop of ``metric(model.run_with_hooks(input, fwd_hooks=intervention))`` up to
        rounding. Each hook is called as in that loop, with tensors ``[batch, pos, ...]`` of its own run; only the calls
        for different interventions alternate, so they must not depend on each other. Hooks that are on the model anyway
        act in each run. Nothing is tracked for gradients, except where interventions cannot share a run and are run one
        by one: with backward hooks on the model, with dropout, and at modules put in a hook point's place.

        Args:
            input: a text, a list of texts, or tokens, for all interventions.
            interventions: each a list of (name or predicate on names, hook), as ``fwd_hooks`` of `run_with_hooks`.
            metric: called with the logits of one intervention; they are the result if it is None. With a metric,
                interventions that start at the same layer share runs wherever they stand; without, only neighbours do,
                and no more logits are held than one run's.
            batch_size: how many interventions share a run; by default as many as keep the device busy and fit into its
                free memory.
            logits_to_keep: compute logits at the last so many positions only, or at these positions, which keep their
                axis: ``logits[:, -1]`` is the last position still. 0 is all. The unembedding is a large part of a run.
            prepend_bos, padding_side, attention_mask: as for ``forward``.
            progress: show a progress bar.
            remote: as for ``forward``; a sweep is one job, and with a metric only its results travel.

        A hook that raises ends the whole run that it shares, before its results come (``batch_size=1`` shares none).
        Weights that change while the results are being taken make them a mixture: start a new sweep then.

        Raises:
            ValueError: for a ``batch_size`` below 1, or a negative ``logits_to_keep``.
            UnknownPointError, DisabledPointError: for a point that does not exist or is off, before anything is run.
            HookError: while running, if a hook returns a tensor of another shape or type than it was given.
        """
        if metric is not None and not callable(metric):
            raise TypeError(f"metric is a function of logits, not a {type(metric).__name__}")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size is the number of interventions per run, at least 1, not {batch_size!r}")
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(
                f"logits_to_keep={logits_to_keep}: give how many of the last positions to keep (0: all), or a tensor "
                "of positions"
            )
        options = {"prepend_bos": prepend_bos, "padding_side": padding_side}
        with LocallyOverridenDefaults(self, **options):
            span = span_of(self.cfg.n_layers, None, None, "logits")
            call = prepare(self, self.interior.basis, input, span, prepend_bos, None, attention_mask, None)
        if call.tokens is None or not call.tokens.numel():
            raise ValueError("the input of a sweep has no token")
        base = _Base(self, call, {"input": input, "attention_mask": attention_mask, **options}, logits_to_keep)
        items = resolve(self, interventions, padded=call.attention_mask is not None)
        return _results(base, items, metric, batch_size, progress, remote)


def _results(
    base: _Base, items: list[Intervention], metric: Metric | None, batch_size: int | None, progress: bool, remote: Any
) -> Iterator[Any]:
    limit = base.most_at_once() if batch_size is None else batch_size
    enough = -(-busy_tokens(base.tokens.device) // (2 * base.tokens.numel()))
    done: dict[int, Any] = {}
    with base.model.interior.running(remote) as engine:
        elsewhere = engine.elsewhere
        if elsewhere:
            from ..jobs import sweep

            done = sweep(base, list(batches(items, limit, enough, in_order=metric is None)), metric)
    if elsewhere:
        yield from (done[index] for index in range(len(items)))
        return
    following = 0
    # TQDM_DISABLE in the environment silences a bar that is not told either way.
    with tqdm(total=len(items), **({} if progress else {"disable": True})) as bar:
        for together in batches(items, limit, enough, in_order=metric is None):
            for intervention, logits in zip(together, base.run(together), strict=True):
                # A view would keep the logits of all interventions of the run.
                done[intervention.index] = logits.clone() if metric is None else metric(logits)
                del logits
            bar.update(len(together))
            while following in done:
                yield done.pop(following)
                following += 1


@dataclass
class _Base:
    """The input of a sweep, and the run without interventions as far as it is known."""

    model: Any
    call: Call
    arguments: dict[str, Any]
    logits_to_keep: int | Tensor
    #: (whether attention is eager, layer) -> the residual stream that enters the layer. Implementations of attention
    #: agree up to rounding, but not at padding.
    streams: dict[tuple[bool, int], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        assert self.call.tokens is not None
        return self.call.tokens

    def most_at_once(self) -> int:
        """How many interventions share a run if nobody says."""
        batch, length = self.tokens.shape
        keep = self.logits_to_keep
        kept = len(keep) if isinstance(keep, Tensor) else min(keep, length) or length
        return most_at_once(self.model.cfg, batch, length, kept, self.tokens.device)

    def run(self, together: Sequence[Intervention]) -> Iterable[Tensor]:
        """The logits of each intervention."""
        if together[0].alone or self._must_run_alone():
            return (self._kept(self.model.run_with_hooks(fwd_hooks=i.pairs, **self.arguments)) for i in together)
        with self.model._turn(), torch.no_grad():
            points = shared_points(self.model, together)
            request, kept = self._request(self.start_of(points), len(together), points)
            logits = self.model.interior.engine.run(request, points)
            return (logits if kept else self._kept(logits)).split(self.tokens.shape[0])

    def _must_run_alone(self) -> bool:
        model = self.model
        # A shortformer has its positions beside the stream, so that the stream alone is no place to start from.
        if model.cfg.positional_embedding_type == "shortformer":
            return True
        return any(point.bwd_hooks for point in model.hook_points()) or any(
            isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in model.hf_model.modules()
        )

    def start_of(self, names: Iterable[str]) -> int:
        """The layer at which a run can start that is listened to at these points."""
        return min((layer_of(name, self.model.cfg.n_layers) for name in names), default=self.model.cfg.n_layers)

    def requests(self, start: int, times: int, points: Iterable[str]) -> tuple[Request | None, Request, bool]:
        """For a run whose residual stream is known only where it runs: (how to get that, the run, as `_request`)."""
        if self._must_run_alone():
            raise UnsupportedModelError("a sweep of this model cannot share runs, so it is no job: use run_with_hooks")
        n_layers = self.model.cfg.n_layers
        above, skips = self._asked(start, self._inputs(times, None), points)
        if not start:
            return None, above, skips
        del above.inputs["input_ids"]
        below = Request(self._inputs(1, None), span_of(n_layers, None, start, "logits"))
        return below, above, skips

    def _request(self, start: int, times: int, points: Iterable[str]) -> tuple[Request, bool]:
        """A run from a layer on, with the input's rows this many times; whether it gives the wanted logits only."""
        eager = any(name.endswith(SQUARES) for name in points)
        stream = self._stream(start, eager).repeat(times, 1, 1) if start > 0 else None
        request, skips = self._asked(start, self._inputs(times, stream), points)
        request.residual = stream
        return request, skips

    def _asked(self, start: int, inputs: dict[str, Any], points: Iterable[str]) -> tuple[Request, bool]:
        skips = (
            not (isinstance(self.logits_to_keep, int) and self.logits_to_keep == 0)
            and not any(name.startswith("unembed") for name in points)
            and "logits_to_keep" in inspect.signature(self.model.hf_model.forward).parameters
        )
        if skips:
            inputs["logits_to_keep"] = self.logits_to_keep
        span = span_of(self.model.cfg.n_layers, start or None, None, "logits")
        return Request(inputs, span), skips

    def _stream(self, layer: int, eager: bool) -> Tensor:
        """The residual stream before a layer, in the run without hooks."""
        known = self.streams.get((eager, layer))
        if known is None:
            engine = self.model.interior.engine
            below = max((at for with_eager, at in self.streams if with_eager == eager and at < layer), default=0)
            stream = self.streams.get((eager, below))
            span = span_of(self.model.cfg.n_layers, below or None, layer, "logits")
            with engine.eager_attention(eager):
                known = engine.run(Request(self._inputs(1, stream), span, stream), {})
            self.streams[eager, layer] = known
        return known

    def _inputs(self, times: int, stream: Tensor | None) -> dict[str, Any]:
        """What HF's forward takes, for the input's rows this many times, from the tokens or from a residual stream."""
        inputs = {name: value.repeat(times, 1) for name, value in self.call.request.inputs.items()}
        if stream is not None:
            del inputs["input_ids"]
            inputs["inputs_embeds"] = stream
        return inputs

    def _kept(self, logits: Tensor) -> Tensor:
        keep = self.logits_to_keep
        return logits[:, keep] if isinstance(keep, Tensor) else logits[:, -keep:]
