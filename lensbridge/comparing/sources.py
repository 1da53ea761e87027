"""What does HuggingFace's own forward have where a hook point is?

A run of the plain model with PyTorch's own hooks (`checking.capture`) keeps what every module was given and gave back.
Where a point is, or is at once made from, one of these tensors, it is compared with that. What no module shows (scores,
the output of single heads, whatever lies between two modules) is compared with its equation, whose terms are the
model's weights and points that are compared themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checking.baseline import call_of_norm, has_heads_first
from ..checking.identities import Identity, identities_of
from ..checking.subject import Look, Subject
from ..engine.activation_sites import ActivationSite
from ..engine.attention_sites import PatternSite, QKVSite, ZSite
from ..engine.norm_sites import UnembedInSite
from ..engine.places import AnyPlace, FactorPlace, FirstPlace, Place
from ..engine.sites import (
    BranchSite,
    GateUpSite,
    PartSite,
    PlainSite,
    PositionSite,
    Site,
    StreamSite,
    SumSite,
    UncentredEmbedSite,
    UnembedOutSite,
)
from ..parameters import factor_of


class Compared(NamedTuple):
    """A point (or what the norm behind it makes of it), what it should be, and where that comes from.

    Where the equation could not be computed, ``expected`` says why. ``through`` is the point whose equation it is, if
    that is another one.
    """

    point: str
    value: Tensor
    expected: Tensor | str
    source: str
    through: str | None = None


def comparisons(subject: Subject, look: Look) -> Iterator[Compared]:
    """Every point of a run, each with the most direct value that HuggingFace's own run has for it."""
    found: set[str] = set()
    for compared in (*_at_modules(subject, look), *_norms(subject, look), *_patterns(subject, look)):
        if compared.point in look and compared.point not in found:
            found.add(compared.point)
            yield compared
    behind: list[Compared] = []
    for identity in identities_of(subject):
        names = [name for name in (identity.point, *identity.verifies) if name in look and name not in found]
        if not names:
            continue
        value, expected = _sides(identity, look)
        if identity.point in names:
            found.add(identity.point)
            yield Compared(identity.point, value, expected, identity.equation)
        words = f"{identity.point.rsplit('hook_', 1)[-1]} = {identity.equation}"
        others = [name for name in names if name != identity.point]
        behind += [Compared(name, value, expected, words, identity.point) for name in others]
    # What has no equation of its own shows in what is computed from it.
    for compared in behind:
        if compared.point not in found:
            found.add(compared.point)
            yield compared


def _sides(identity: Identity, look: Look) -> tuple[Tensor, Tensor | str]:
    try:
        return identity.sides(look, look[identity.point])
    except Exception as error:
        return look[identity.point], f"{type(error).__name__}: {error}"


def _at_modules(subject: Subject, look: Look) -> Iterator[Compared]:
    """Points that are a module's input or output, or a part of it."""
    parts: dict[str, Tensor] = {}
    for site in subject.model.interior.engine.sites:
        read = next((read for cls, read in _READERS.items() if type(site) is cls), None)
        raw = _captured(subject, site.place) if read is not None or isinstance(site, PartSite) else None
        if raw is None:
            continue
        if isinstance(site, PartSite):
            parts[site.names[0]] = raw
            continue
        if isinstance(site, SumSite):
            if site.names[0] not in parts:
                continue
            raw = raw + parts[site.names[0]]
        assert read is not None
        for name, expected in read(subject, site, raw):
            if name in look and expected.numel() == look[name].numel():
                yield Compared(name, look[name], expected.reshape(look[name].shape), where(site.place))


def where(place: AnyPlace) -> str:
    """A place of the HF model in words."""
    assert isinstance(place, Place)
    return f"{place.side} of {place.path}"


def _captured(subject: Subject, place: AnyPlace) -> Tensor | None:
    """What the plain run had at a module, as the points show it; None if nothing was kept there."""
    if not isinstance(place, Place):
        return None
    calls = subject.plain.calls.get(place.path, [])
    value: Tensor | None = getattr(calls[place.call], place.side) if place.call < len(calls) else None
    if value is None:
        return None
    value = subject.batch_first(place.path, value)
    if place.flat:
        value = value.unflatten(0, (subject.tokens.shape[0], -1))
    if isinstance(place, FirstPlace):
        value = value[:, 0]
    if isinstance(place, FactorPlace):
        owner = subject.hf.get_submodule(place.owner)
        factor, bias = factor_of(owner, place.factor, place.power), factor_of(owner, place.bias)
        value = value if factor is None else value * factor
        value = value if bias is None else value + bias
    return value


Read = Callable[[Subject, Any, Tensor], Iterator[tuple[str, Tensor]]]


def _as_it_is(subject: Subject, site: Site, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name in site.names:
        yield name, raw


def _of_stream(subject: Subject, site: Site, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not subject.model.interior.basis.centres_stream:
        yield site.names[0], raw
    elif not subject.architecture.features & {"embedding norm", "norm of the embeddings"}:
        # A norm of the embeddings leaves a mean in the stream, which only the equations follow.
        yield site.names[0], raw - raw.mean(-1, keepdim=True)


def _of_positions(subject: Subject, site: Site, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from _of_stream(subject, site, raw.expand(subject.tokens.shape[0], *raw.shape[-2:]))


def _halves(subject: Subject, site: GateUpSite, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from zip(site.names, raw.chunk(2, dim=-1), strict=True)


def _heads(subject: Subject, site: QKVSite, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    if site.clips:
        return
    processing, parameters = subject.model.interior.basis.processing, subject.model.interior.weights.parameters
    for letter, name in zip(site.letters, site.names, strict=True):
        if not processing.refactor_factored_attn_matrices and not (letter == "v" and processing.moves_value_bias):
            yield name, parameters.slice(raw, letter.upper(), site.layer)


def _mixed(subject: Subject, site: ZSite, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not subject.model.interior.basis.processing.moves_value_bias:
        yield site.names[0], raw


def _unembedded(subject: Subject, site: UnembedInSite, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    if site.norm is None or not subject.model.interior.basis.processing.fold_ln:
        yield site.names[0], raw


def _logits(subject: Subject, site: Site, raw: Tensor) -> Iterator[tuple[str, Tensor]]:
    if subject.architecture.after_unembed is None:
        yield site.names[0], subject.model.interior.basis.logits(raw)


_READERS: dict[type[Site], Read] = {
    PlainSite: _as_it_is,
    ActivationSite: _as_it_is,
    UncentredEmbedSite: _as_it_is,
    StreamSite: _of_stream,
    BranchSite: _of_stream,
    SumSite: _of_stream,
    PositionSite: _of_positions,
    GateUpSite: _halves,
    QKVSite: _heads,
    ZSite: _mixed,
    UnembedInSite: _unembedded,
    UnembedOutSite: _logits,
}


def _norms(subject: Subject, look: Look) -> Iterator[Compared]:
    """Norms, by what they return: what they make of `hook_normalized`, where nothing is folded."""
    if subject.model.interior.basis.processing.fold_ln:
        return
    for name in [name for name in look.values if name.endswith(".hook_normalized")]:
        prefix = name.removesuffix(".hook_normalized")
        path = subject.model.mod_dict[prefix].path
        call, calls = call_of_norm(subject, prefix, path)
        try:
            output = subject.batch_first(path, subject.plain.output(path, call, calls))
            value = look.normed(prefix)
        except (LookupError, RuntimeError):
            # Called more often than the record says, or no norm of one width: its equation is left.
            continue
        output = output.transpose(1, 2) if has_heads_first(subject, prefix) else output
        if value.numel() == output.numel():
            yield Compared(name, value.reshape(output.shape).to(output.dtype), output, f"output of {path}")


def _patterns(subject: Subject, look: Look) -> Iterator[Compared]:
    """Patterns, where HuggingFace returns them itself."""
    sites = [site for site in subject.model.interior.engine.sites if type(site) is PatternSite]
    if not sites or getattr(subject.hf.config, "_attn_implementation", None) != "eager":
        return
    try:
        with torch.no_grad():
            returned = subject.hf(input_ids=subject.tokens, output_attentions=True).attentions
    except Exception:
        # Not every family returns them; their equation is left.
        return
    if returned is None or len(returned) != subject.n_layers:
        return
    for site in sites:
        name = site.names[0]
        attention = returned[site.layer]
        if name in look and isinstance(attention, Tensor) and attention.shape == look[name].shape:
            yield Compared(name, look[name], attention, "HuggingFace's output_attentions")
