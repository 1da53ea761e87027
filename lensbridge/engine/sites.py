"""What happens to a value when the forward pass reaches it?

A site is one or a few hook points bound to a place in the HuggingFace model. Visiting it reads HF's value there,
converts it into TransformerLens' basis, shows it to the points' listeners, and, only if one of them changed it,
converts it back and writes it. Most points are a line of data for one of the small classes here; attention's are in
`attention_sites.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import Basis, Stream
from ..errors import HookError, LensbridgeError
from ..later import Later, Source
from .keeping import Keeping
from .keeping import Recording as Recording
from .passage import Event
from .places import AnyPlace, ArgumentPlace, FirstPlace, Place, SoftmaxPlace


@dataclass
class Run(Keeping):
    """What one forward pass carries from site to site."""

    #: A `View`, or what a pass that is watched has in its stead (`stepping.Passing`).
    view: Any
    basis: Basis
    cfg: Any
    #: The points that somebody listens to, by name.
    listeners: Mapping[str, nn.Module]
    stream: Stream
    batch_size: int
    #: point name -> whether its listeners may change the value or its gradient.
    edited: Mapping[str, bool]
    #: What to keep of the values as they are after their hooks, if anything.
    recording: Recording | None
    #: The places whose tensors the model changes in place later, so that what is read has to be a copy.
    overwritten: Collection[tuple[str, str]] = ()
    #: Whether what is kept may be computed when somebody looks; not where the run starts from the caller's own tensor.
    puts_off: bool = True
    #: Whether values are kept as they are shown to hooks, also where there are none.
    visits: bool = False
    #: (layer, "q" | "k" | "v") -> norm output (HF basis) that this projection has to read instead of its own input.
    inputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    #: prefix of a norm -> what it has to be computed from instead of its own input.
    norm_inputs: dict[str, Tensor] = field(default_factory=dict)
    #: prefix of a norm with several readers -> what one of them, the MLP, has to read instead of its output.
    reader_inputs: dict[str, Tensor] = field(default_factory=dict)
    #: point -> the output of a module that is added to what the point's own place has.
    parts: dict[str, Tensor] = field(default_factory=dict)
    #: layer -> 1 - sum of each row of an edited pattern, [batch, head, query_pos].
    missing_rows: dict[int, Tensor] = field(default_factory=dict)
    #: layer -> what sinks left of each row of the pattern before its scores were edited (`SquareForm.share`).
    shares: dict[int, Tensor] = field(default_factory=dict)
    #: Layers whose scores were edited, so that a softmax row may be NaN.
    edited_scores: set[int] = field(default_factory=set)
    #: layer -> value bias, computed once per run.
    value_biases: dict[int, Tensor | None] = field(default_factory=dict)
    #: TransformerLens' final norm output, kept for ``unembed.hook_in`` where HF's is in another basis.
    final_norm: Tensor | None = None
    #: Place -> what was put there, where that goes to other places, too (`AgainSite`).
    repeated: dict[AnyPlace, Tensor] = field(default_factory=dict)
    #: prefix of a norm -> its edited normalised input, which another norm takes over.
    normalized: dict[str, Tensor] = field(default_factory=dict)
    #: What the final norm reads, in a run that nobody listens to.
    final_input: Tensor | None = None
    #: The unembedding's output after its hooks.
    logits: Tensor | None = None
    #: The sites that may say how what they keep follows from what others keep, and where they see it.
    deriving: Mapping[Site, tuple[AnyPlace, ...]] = field(default_factory=dict)
    awaited: Collection[str] = ()
    sources: dict[str, Source] = field(default_factory=dict)
    #: Where gradients end, in a run that goes back on a machine of somebody else's.
    roots: list[Tensor] = field(default_factory=list)
    _here: AnyPlace | None = None
    _value: Tensor | None = None
    _raw: Tensor | None = None
    _later: tuple[Tensor, Later] | None = None
    _last: tuple[Tensor, Source] | None = None
    _trail: list[tuple[Tensor, Source]] = field(default_factory=list)
    #: What hooks have returned that is not of the activation's shape, dtype and device, in words.
    unlike: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._any_edit = any(self.edited.values())
        self._kept: Collection[str] = () if self.recording is None else self.recording.names

    def read(self, place: AnyPlace) -> Tensor:
        """The live tensor at a place, off the graph where nobody can edit; several sites at one place ask once."""
        if self._here is not place and self._here != place:
            self.arrive(place, place.read(self.view))
        assert self._value is not None
        return self._value

    def arrive(self, place: AnyPlace, raw: Tensor) -> None:
        """The forward pass is at a place, where ``raw`` is."""
        if isinstance(place, Place):
            raw = raw.clone() if self._is_overwritten(place) else raw
            raw = raw.unflatten(0, (self.batch_size, -1)) if place.flat else raw
        if self._any_edit or self.inputs:
            self._value = raw
        elif raw is not self._raw:
            # What one block returns is what the next one is given: the same tensor keeps its reading.
            self._raw, self._value = raw, raw.detach()
        self._here = place

    def let_go(self) -> None:
        """Hold nothing of the place that the forward pass was at."""
        self._here = self._value = self._raw = self._last = None

    def write(self, place: AnyPlace, value: Tensor) -> None:
        """Put ``value`` in the tensor's place."""
        flat = isinstance(place, Place) and place.flat
        # What hooks returned, and was kept, is not to be changed with it.
        given = value.clone() if isinstance(place, Place) and self._is_overwritten(place) else value
        place.write(self.view, given.flatten(0, 1) if flat else given)
        self._here, self._value = place, value
        if isinstance(place, ArgumentPlace | Place | SoftmaxPlace) and place.repeated:
            self.repeated[place] = value

    def _is_overwritten(self, place: Place) -> bool:
        return (place.path, place.side) in self.overwritten

    def overwrite(self, place: Place, value: Tensor) -> None:
        """Put ``value`` into the tensor itself, for all who read it."""
        live = place.read(self.view)
        live.copy_(value.flatten(0, 1) if place.flat else value)
        self._here, self._value = place, live.unflatten(0, (self.batch_size, -1)) if place.flat else live

    def value_bias(self, layer: int) -> Tensor | None:
        """`Basis.value_bias`, once per run."""
        if layer not in self.value_biases:
            # Without an edit it cancels out, and needs no graph.
            with self.graph_if_edited():
                self.value_biases[layer] = self.basis.value_bias(layer)
        return self.value_biases[layer]

    def graph_if_edited(self) -> torch.set_grad_enabled:
        """The time in which something is computed that lies on the graph only where somebody may edit."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self._any_edit)

    def listens(self, name: str) -> bool:
        """Whether a value has to be shown at ``name`` or kept from there."""
        return name in self.listeners or name in self._kept

    def edits(self, name: str) -> bool:
        """Whether somebody listens at ``name`` who could change the value or its gradient."""
        return self.edited.get(name, False)

    def fire(self, name: str, value: Tensor, live: bool) -> tuple[Tensor, bool]:
        """Show ``value`` to the listeners of a point; returns (what they make of it, whether they changed it).

        Args:
            live: whether ``value`` is HF's own tensor (or shares its memory). Listeners that may edit get a copy then,
                so that an edit in place neither breaks autograd nor reaches what was cached before.
        """
        point = self.listeners.get(name)
        if point is None or not self.edited[name]:
            # Caches only: nothing of the user's runs, and nothing comes back.
            if point is not None:
                point.run_forward_hooks(value)  # type: ignore[operator]
            self._record(name, value)
            return value, False
        shown = value.clone() if live else value
        before = None if shown.is_inference() else (shown._version, shown.requires_grad)
        result = self.view.show(point, shown)
        if not isinstance(result, Tensor):
            raise HookError(
                f"a hook at {name!r} returned {type(result).__name__}; return a tensor to replace the activation, "
                "or None to keep it"
            )
        self._note_if_unlike(name, shown, result)
        self._record(name, result)
        return result, result is not shown or before is None or (result._version, result.requires_grad) != before

    def _record(self, name: str, value: Tensor) -> None:
        if name in self._kept:
            self.recording.keep(name, value)  # type: ignore[union-attr]

    def _note_if_unlike(self, name: str, shown: Tensor, result: Tensor) -> None:
        was, now = ((tuple(x.shape), x.dtype, x.device) for x in (shown, result))
        if was != now:
            self.unlike.append(
                f"a hook at {name!r} returned {_described(*now)}, where the activation is {_described(*was)}"
            )

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where the forward pass fails after a hook has put in a tensor of another shape or type, say so.

        Such a tensor is let through first, as in TransformerLens: it may well broadcast.
        """
        try:
            yield
        except (RuntimeError, IndexError) as error:
            if not self.unlike or isinstance(error, LensbridgeError):
                raise
            raise HookError(f"{'; '.join(self.unlike)}. The forward pass then failed: {error}") from error


def _described(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"


class Site:
    """One visit of the forward pass. ``names`` are the points it serves; its place decides when it comes."""

    names: tuple[str, ...]
    place: AnyPlace
    #: Modules other than the place's that it writes at.
    writes_at: tuple[str, ...] = ()
    #: Whether it is necessary wherever the stream's mean matters.
    always: bool = False
    #: Points whose editing makes this site necessary although nobody listens to it.
    after_edits_of: tuple[str, ...] = ()
    #: Points whose values its own may follow from (`derives_from`).
    follows: tuple[str, ...] = ()
    #: Earlier places that `record` reads besides its own.
    also_reads: tuple[AnyPlace, ...] = ()
    #: Whether it takes the model's weights to read or write its values.
    reads_weights = True

    def visit(self, run: Run) -> None:
        """Read, show, and write back if changed."""
        raise TypeError(f"{type(self).__name__} does not say what to do when it is reached")

    def record(self, run: Run) -> None:
        """Keep what the values are made of, in a run that nobody listens to."""
        self.visit(run)

    def derives_from(self, wanted: Collection[str], flow: Mapping[Event, int]) -> tuple[AnyPlace, ...]:
        """The places by which a run that keeps the points in ``wanted`` can see that this value follows from theirs."""
        return ()

    def needed_for_edit(self, basis: Basis) -> bool:
        """Whether an edit of ``after_edits_of`` makes this site necessary in the active basis."""
        return True


class PlainSite(Site):
    """A value that reads the same in both bases: MLP activations."""

    place: Place
    reads_weights = False

    def __init__(self, name: str, place: Place) -> None:
        self.names = (name,)
        self.place = place

    def visit(self, run: Run) -> None:
        value, changed = run.fire(self.names[0], run.read(self.place), live=True)
        if changed:
            run.write(self.place, value)

    def record(self, run: Run) -> None:
        run.keep_later(self.names[0], run.read(self.place))


class StreamSite(Site):
    """The residual stream: resid_pre, resid_mid, resid_post."""

    reads_weights = False
    place: Place

    def __init__(self, name: str, place: Place, in_place: bool = False) -> None:
        self.names = (name,)
        self.place = place
        #: Whether the tensor read here is also the skip connection's, so that it must be edited and not replaced.
        self.in_place = in_place

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        value, changed = run.fire(self.names[0], run.stream.read(x), live=not run.stream.centred)
        if not changed:
            return
        if self.in_place:
            run.overwrite(self.place, value)
        else:
            run.write(self.place, value)
        run.stream.written(value)

    def record(self, run: Run) -> None:
        run.keep_stream(self.names[0], run.read(self.place))


class BranchSite(Site):
    """Something that is added to the residual stream: embeddings, attn_out, mlp_out.

    Args:
        with_next: whether it is added together with the branch that comes next.
    """

    reads_weights = False

    def __init__(self, name: str, place: Place, after_edits_of: tuple[str, ...] = (), with_next: bool = False) -> None:
        self.names = (name,)
        self.place = place
        self.after_edits_of = after_edits_of
        self.with_next = with_next

    def needed_for_edit(self, basis: Basis) -> bool:
        return basis.centres_stream

    def visit(self, run: Run) -> None:
        self._show(run)
        run.stream.add_branch(self.with_next)

    def _show(self, run: Run) -> None:
        name = self.names[0]
        if run.listens(name):
            value = run.stream.read_branch(self._read(run))
            value, changed = run.fire(name, value, live=not run.stream.centred)
            if changed:
                self._write(run, value)
                run.stream.branch_written(value)

    def record(self, run: Run) -> None:
        run.keep_branch(self.names[0], self._read(run))

    def _read(self, run: Run) -> Tensor:
        return run.read(self.place)

    def _write(self, run: Run, value: Tensor) -> None:
        run.write(self.place, value)


class OutputSite(BranchSite):
    """What a component returns, before that is shown as a branch."""

    def visit(self, run: Run) -> None:
        if run.listens(self.names[0]):
            self._show(run)

    def record(self, run: Run) -> None:
        run.keep_later(self.names[0], self._read(run), run.stream.read_branch if run.stream.centred else None)


class AgainSite(Site):
    """A place to which goes what was put in at another before: a later call of an attention, say."""

    names = ()

    def __init__(self, first: AnyPlace, place: AnyPlace, after_edits_of: tuple[str, ...]) -> None:
        self.first = first
        self.place = place
        self.after_edits_of = after_edits_of

    def visit(self, run: Run) -> None:
        if self.first in run.repeated:
            run.write(self.place, run.repeated[self.first])


class PartSite(Site):
    """The output of a module that is added to a branch's: kept until the branch itself is reached."""

    def __init__(self, name: str, place: Place) -> None:
        self.names = (name,)
        self.place = place

    def visit(self, run: Run) -> None:
        run.parts[self.names[0]] = run.read(self.place)


class SumSite(BranchSite):
    """A branch that is the sum of what two modules return; an edit goes in at the one that is called last."""

    def _read(self, run: Run) -> Tensor:
        return run.read(self.place) + run.parts[self.names[0]]

    def _write(self, run: Run, value: Tensor) -> None:
        run.write(self.place, value - run.parts[self.names[0]])


class UncentredEmbedSite(Site):
    """What a norm behind the embeddings returns: no weight writes it, so its mean stays in the stream.

    It is ``hook_embed`` where only the token embedding is normed.
    """

    always = True

    def __init__(self, place: Place, *names: str) -> None:
        self.names = names
        self.place = place

    def visit(self, run: Run) -> None:
        value = run.read(self.place)
        for name in self.names:
            value, changed = run.fire(name, value, live=True)
            if changed:
                run.write(self.place, value)
        run.stream.written(value)


class PositionSite(BranchSite):
    """``hook_pos_embed``: HF may compute one row for the whole batch, TransformerLens shows one per batch entry."""

    def visit(self, run: Run) -> None:
        x = run.read(self.place)
        value = run.stream.read_branch(x).expand(run.batch_size, *x.shape[-2:])
        value, changed = run.fire(self.names[0], value, live=True)
        if changed:
            run.write(self.place, value)
            run.stream.branch_written(value)
        run.stream.add_branch()

    def record(self, run: Run) -> None:
        self.visit(run)


class GateUpSite(Site):
    """``mlp.hook_pre`` and ``mlp.hook_pre_linear``: the halves of one projection."""

    def __init__(self, names: tuple[str, str], place: Place) -> None:
        self.names = names
        self.place = place

    def visit(self, run: Run) -> None:
        halves = list(run.read(self.place).chunk(2, dim=-1))
        edited = False
        for index, name in enumerate(self.names):
            halves[index], changed = run.fire(name, halves[index], live=True)
            edited |= changed
        if edited:
            run.write(self.place, torch.cat(halves, dim=-1))

    def record(self, run: Run) -> None:
        alone = not all(run.keeps(name) for name in self.names)
        for name, half in zip(self.names, run.read(self.place).chunk(2, dim=-1), strict=True):
            run.keep(name, half.clone() if alone and run.keeps(name) else half)


class UnembedOutSite(Site):
    """``unembed.hook_out``: the logits."""

    def __init__(self, name: str, place: Place) -> None:
        self.names = (name,)
        self.place = place

    def visit(self, run: Run) -> None:
        # The run returns these, so they stay on the graph.
        x = self.place.read(run.view)
        value = run.basis.logits(x)
        value, changed = run.fire(self.names[0], value, live=value is x)
        if changed:
            run.write(self.place, value)
        run.logits = value

    def record(self, run: Run) -> None:
        x = self.place.read(run.view)
        # What is kept is what the run returns, and nobody else has it.
        run.logits = run.basis.logits(x, ours=run.puts_off and not isinstance(self.place, FirstPlace))
        run.keep(self.names[0], run.logits)
