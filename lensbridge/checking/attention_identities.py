"""What must be true of the values inside attention?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..parameters import factor_of
from .norm_identities import norm_identities
from .scores import clipped, position_bias, products, repeated, unrotated
from .subject import Look, Subject


def attention_identities(subject: Subject, layer: int) -> Iterator[tuple]:
    """Those of one layer, as rows of `Identity`."""
    yield from _inputs(subject, layer)
    yield from _projections(subject, layer)
    yield from _heads(subject, layer)
    yield from _output(subject, layer)


def _inputs(subject: Subject, layer: int) -> Iterator[tuple]:
    """The copies that heads read, and the norm of what they read."""
    prefix, block = f"blocks.{layer}", subject.block(layer)
    pre = f"{prefix}.hook_resid_pre"

    def copies(heads: int) -> Callable[[Look], Tensor]:
        return lambda look: look[pre].unsqueeze(-2).expand(-1, -1, heads, -1)

    if "queries" in block.features:
        heads = subject.heads(layer)
        yield f"{prefix}.hook_attn_in", "resid_pre, for each head", copies(heads.queries)
        for letter in "qkv":
            yield f"{prefix}.hook_{letter}_input", "resid_pre, for each head", copies(heads.number(letter.upper()))

    def read(look: Look) -> Tensor:
        # The norm fires for each of its readers, and a cache keeps the last firing, the values'.
        points = (f"{prefix}.hook_v_input", f"{prefix}.hook_attn_in", pre)
        return look.first(points, subject.architecture.in_layer(layer, "ln1"))

    if norm_before(subject, layer):
        yield from norm_identities(subject, f"{prefix}.ln1", read, "resid_pre")


def norm_before(subject: Subject, layer: int) -> bool:
    """Whether ``ln1`` norms what attention reads."""
    return "norms before" in subject.block(layer).features


def _projections(subject: Subject, layer: int) -> Iterator[tuple]:
    prefix = f"blocks.{layer}"
    norm = None
    if norm_before(subject, layer):
        norm = subject.norm(f"{prefix}.ln1")

    def read(look: Look, letter: str) -> Tensor:
        points = (f"{prefix}.hook_{letter}_input", f"{prefix}.hook_attn_in")
        own = next((n for n in points if n in look), None)
        if norm is None:
            return look.first((*points, f"{prefix}.hook_resid_pre"), subject.architecture.in_layer(layer, letter))
        if own is None:
            return look.normed(f"{prefix}.ln1")
        x, scale = norm.split(look[own])
        return look.affine(f"{prefix}.ln1", x / scale)

    def projected(letter: str) -> Callable[[Look], Tensor]:
        def value(look: Look) -> Tensor:
            weight, bias = (_stored(look, f"{prefix}.attn.", f"{kind}_{letter.upper()}") for kind in "Wb")
            x = read(look, letter)
            out = torch.einsum("bpm,hmd->bphd" if x.dim() == 3 else "bphm,hmd->bphd", x, weight)
            return out if bias is None else out + bias

        return value

    # What a gated norm's readers read is shown at no point.
    plain = not subject.block(layer).gated_norms
    for letter in "qkv":
        if plain and _is_stored(subject, f"{prefix}.attn.", f"W_{letter.upper()}"):
            name = letter.upper()
            yield f"{prefix}.attn.hook_{letter}", f"n @ W_{name} + b_{name}", projected(letter)
        if letter != "v" and subject.has(f"{prefix}.attn.{letter}_norm.hook_scale"):
            norm_of = _rotated_norm if subject.block(layer).qk_norm_rotated else norm_identities
            given = _given(f"{prefix}.attn.hook_{letter}", subject.architecture.in_layer(layer, f"{letter}_norm"))
            yield from norm_of(subject, f"{prefix}.attn.{letter}_norm", given, letter)

    yield from _rotated(subject, layer)


def _rotated_norm(
    subject: Subject, prefix: str, source: Callable[[Look], Tensor], of: str
) -> Iterator[tuple[str, str, Callable[[Look], Tensor]] | tuple]:
    """Those of a norm that is given rotated heads: they are as long as before, and so are their products.

    But for a factor, where the frequencies are stretched (Peng et al. 2023, YaRN).
    """
    stretched = (getattr(module, "attention_scaling", None) for module in subject.hf.modules())
    factor = next((each for each in stretched if each is not None), 1.0)
    norm = norm_identities(subject, prefix, lambda look: source(look) * factor, of)
    (scale, equation, root), (normalized, _, divided) = norm

    def products(x: Tensor) -> Tensor:
        return gram(x.reshape(source(subject.look()).shape))

    yield scale, equation, root
    yield normalized, f"{of} rotated / scale", lambda look: products(divided(look)), (), products


def _rotated(subject: Subject, layer: int) -> Iterator[tuple]:
    """Heads at one position are rotated alike, so that their products stay what they were, times one factor.

    The factor is read off a run without hooks: where texts are long, scores may be sharpened by position. Dimensions
    that are not rotated have none.
    """
    prefix = f"blocks.{layer}.attn"
    for letter in "qk":
        point = f"{prefix}.hook_rot_{letter}"
        if not subject.has(point) or not subject.has(f"{prefix}.hook_{letter}"):
            continue
        if subject.block(layer).qk_norm_rotated:
            yield point, f"{letter}_norm's output", _reshaped(f"{prefix}.{letter}_norm", point)
            continue

        def before(look: Look, letter: str = letter, point: str = point) -> Tensor:
            clean, value = look.subject.look(), unrotated(look, prefix, letter)
            after, plain = clean[point], unrotated(clean, prefix, letter)
            turned = ((after - plain).abs() > 1e-5 * plain.abs().max()).flatten(0, 2).any(0)
            factor = (
                torch.div(*(x[..., turned].square().sum((0, 2, 3)) for x in (after, plain)))
                .view(-1, 1, 1)
                .nan_to_num(1.0)
            )
            return gram(value[..., turned]) * factor + gram(value[..., ~turned])

        yield point, f"{letter} rotated: the same products at each position, times a factor", before, (), gram


def gram(x: Tensor) -> Tensor:
    """The products of all heads of all rows of a batch at each position, ``[pos, batch*head, batch*head]``."""
    heads = x.transpose(0, 1).flatten(1, 2)
    return heads @ heads.transpose(-1, -2)


def _reshaped(norm: str, point: str) -> Callable[[Look], Tensor]:
    return lambda look: look.normed(norm).reshape(look[point].shape)


def _given(point: str, path: str) -> Callable[[Look], Tensor]:
    """The value of a point, or what a module was given if the model has no such point."""
    return lambda look: look.first([point], path)


def _is_stored(subject: Subject, prefix: str, name: str) -> bool:
    return bool({prefix + name, f"{prefix}_{name}"} & subject.weight_names)


def _stored(look: Look, prefix: str, name: str) -> Any:
    """A weight, with grouped queries once per key-value head."""
    grouped = look.weight(f"{prefix}_{name}")
    return look.weight(prefix + name) if grouped is None else grouped


def _heads(subject: Subject, layer: int) -> Iterator[tuple]:
    prefix = f"blocks.{layer}.attn"
    scores, pattern, v, z = (f"{prefix}.hook_{name}" for name in ("attn_scores", "pattern", "v", "z"))
    rotated = tuple(n for n in (f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k") if subject.has(n))

    def masked(look: Look) -> Tensor:
        value = products(look, layer) + position_bias(look.subject, layer)
        # Where keys are chosen, the choice changes with what is edited.
        masks = look if subject.chooses_keys else subject.look()
        return value.masked_fill(masks[scores].isneginf(), -torch.inf)

    if rotated or subject.has(f"{prefix}.hook_q"):
        yield scores, "q . k / attn_scale, -inf where masked", masked, rotated

    def softmax(look: Look) -> Tensor:
        value = torch.softmax(look[scores].float(), dim=-1)
        if subject.block(layer).sinks is None:
            return value.to(look[pattern].dtype)
        return (value * shares(look, layer)).to(look[pattern].dtype)

    if subject.has(scores):
        yield pattern, "softmax(attn_scores)", softmax, (scores,)

    def mixed(look: Look) -> Tensor:
        weights = look[pattern]
        heads = repeated(clipped(look[v], subject), weights.shape[1])
        return torch.einsum("bhqk,bkhd->bqhd", weights, heads.to(weights.dtype))

    if subject.has(pattern):
        yield z, "pattern @ v", mixed, (v, pattern)


def shares(look: Look, layer: int) -> Tensor:
    """What the rows of a pattern sum to where a learned logit of each head takes part in its softmax."""
    subject = look.subject
    sinks = factor_of(subject.hf.get_submodule(subject.architecture.layer(layer)), subject.block(layer).sinks)
    total = torch.logsumexp(look[f"blocks.{layer}.attn.hook_attn_scores"].float(), dim=-1, keepdim=True)
    return torch.sigmoid(total - sinks.detach().float().view(1, -1, 1, 1))


def _output(subject: Subject, layer: int) -> Iterator[tuple]:
    prefix, block = f"blocks.{layer}", subject.block(layer)
    z, result, out = f"{prefix}.attn.hook_z", f"{prefix}.attn.hook_result", f"{prefix}.hook_attn_out"
    unknown = block.z_from_call and block.z_norm is None

    def given(look: Look) -> Tensor:
        if block.z_norm is None:
            return look[z]
        norm: Any = subject.hf.get_submodule(subject.architecture.in_layer(layer, "z_norm"))
        return norm(look[z].flatten(-2)).detach().view(look[z].shape)

    def by_head(look: Look) -> Tensor:
        return torch.einsum("bphd,hdm->bphm", given(look), look.weight(f"{prefix}.attn.W_O"))

    def together(look: Look) -> Tensor:
        total = (look[result] if result in look else by_head(look)).sum(-2)
        bias = look.weight(f"{prefix}.attn.b_O")
        return total if bias is None else total + bias

    if "heads out" not in block.features or f"{prefix}.attn.W_O" not in subject.weight_names or not subject.has(z):
        return
    if unknown and result not in subject.names:
        # What the heads write is not a function of z alone.
        return
    if not unknown:
        yield result, "z @ W_O, by head" if block.z_norm is None else "norm(z) @ W_O, by head", by_head
    factor = subject.factor(layer, "attn_factor")
    times = " * factor" if factor is not None else ""
    bias = subject.factor(layer, "attn_bias")
    norm = subject.norm_behind(layer, "attn")
    if unknown and result not in subject.names:
        return
    if norm is not None:
        yield from norm_identities(subject, norm, together, "sum(result) + b_O")
        behind = _scaled(lambda look: look.normed(norm), factor)
        yield out, f"{norm.rpartition('.')[2]}'s output{times}", behind, (result,)
    else:
        equation, value = f"(sum(result) + b_O){times}" if times else "sum(result) + b_O", _scaled(together, factor)
        if block.attn_through is not None:
            equation, value = f"{block.attn_through} of {equation}", subject.through(layer, "attn_through", value)
        if bias is not None:
            inner = value
            equation, value = f"{equation} + bias", lambda look: inner(look) + bias
        if block.attn_also is not None:
            equation, value = f"{equation} + {block.attn_also}", _with_another(subject, layer, value, factor)
        yield out, equation, value, (z, result)


def _with_another(subject: Subject, layer: int, value: Callable[[Look], Tensor], factor: Any) -> Callable:
    """What another module adds to attention's output: it reads the same norm, and what HuggingFace's makes of it."""
    norm, module = (
        subject.hf.get_submodule(subject.architecture.in_layer(layer, role)) for role in ("ln1", "attn_also")
    )
    has_own = subject.block(layer).attn_also_factor is not None
    times = subject.factor(layer, "attn_also_factor") if has_own else factor

    def total(look: Look) -> Tensor:
        added = module(norm(look[f"blocks.{layer}.hook_resid_pre"]))
        return value(look) + added.detach() * (1 if times is None else times)

    return total


def _scaled(value: Callable[[Look], Tensor], factor: Any) -> Callable[[Look], Tensor]:
    return value if factor is None else lambda look: value(look) * factor
