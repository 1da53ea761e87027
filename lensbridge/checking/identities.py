"""What must be true of the values at a model's hook points, whatever the family?

Each identity gives one point's value as a function of other points' values and of the weights, in the active basis
(design.md, section 5). They hold in any run: without hooks, and after an edit at any point, because what follows an
edit is computed from it; only the identity of the edited point itself is then broken, by exactly the edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..affine import bias_of
from .attention_identities import attention_identities
from .mlp_identities import mlp_identities
from .norm_identities import norm_identities
from .subject import Look, Subject


class Identity(NamedTuple):
    """The value of ``point``, or what ``of`` makes of it, as a function of the run's other values.

    ``verifies`` are further points that it would show to be wrong.
    """

    point: str
    equation: str
    value: Callable[[Look], Tensor]
    verifies: tuple[str, ...] = ()
    of: Callable[[Tensor], Tensor] | None = None

    def sides(self, look: Look, value: Tensor) -> tuple[Tensor, Tensor]:
        """What has to be equal, if ``value`` is the point's."""
        shown = value if self.of is None else self.of(value)
        return shown, self.value(look).to(shown.dtype)


def identities_of(subject: Subject) -> list[Identity]:
    """Every identity on the points that are on now, in TransformerLens' order of the points."""
    on = set(subject.names)
    found = [identity for identity in _all(subject) if identity.point in on]
    rank = {name: index for index, name in enumerate(subject.all_names)}
    return sorted(found, key=lambda identity: rank[identity.point])


def _all(subject: Subject) -> Iterator[Identity]:
    for row in _before(subject):
        yield Identity(*row)
    for layer in range(subject.n_layers):
        for rows in (attention_identities(subject, layer), mlp_identities(subject, layer), _stream(subject, layer)):
            for row in rows:
                yield Identity(*row)
    for row in _after(subject):
        yield Identity(*row)


def _before(subject: Subject) -> Iterator[tuple]:
    def embedded(look: Look) -> Tensor:
        weight = look.weight("embed.W_E")
        assert weight is not None
        return weight[subject.tokens]

    architecture = subject.architecture
    if "embedding norm" in architecture.features:
        yield from norm_identities(subject, "embed.ln", embedded, "W_E[tokens]")
        yield "hook_embed", "embed.ln's output", lambda look: look.normed("embed.ln")
    elif "embed.W_E" in subject.weight_names:
        yield "hook_embed", "W_E[tokens]", embedded
    if subject.has("hook_pos_embed"):
        yield "hook_pos_embed", "W_pos[positions]", _positions
    terms = [name for name in ("hook_embed", "hook_pos_embed", "hook_token_type_embed") if subject.has(name)]
    equation, whole = " + ".join(terms), _total(terms)
    if "norm of the embeddings" in architecture.features:
        yield from norm_identities(subject, "embed.ln", whole, equation)
        equation, whole = "embed.ln's output", _normed_embeddings
    if not subject.n_layers:
        return
    first = "blocks.0.hook_resid_pre"
    if architecture.embed_map is not None:
        inner, mapped = whole, subject.hf.get_submodule(architecture.embed_map)

        def through_map(look: Look) -> Tensor:
            return mapped(inner(look))

        equation, whole = f"the linear map of {equation}", through_map
    if architecture.embed_extra is None:
        yield first, equation, whole, tuple(terms)
    else:

        def alike(look: Look) -> Tensor:
            # Read off the first row of tokens of a run without hooks; in the others it has to be the same.
            clean = look.subject.look()
            return whole(look) + (clean[first] - whole(clean))[:1]

        yield first, f"{equation} + the same in each row", alike, tuple(terms)


def _normed_embeddings(look: Look) -> Tensor:
    return look.normed("embed.ln")


def _positions(look: Look) -> Tensor:
    weight = look.weight("pos_embed.W_pos")
    assert weight is not None
    rows, length = look.subject.tokens.shape
    return weight[:length].expand(rows, -1, -1)


def _total(names: list[str], factor: Any = None) -> Callable[[Look], Tensor]:
    """The sum of points, with a factor on the first."""
    return lambda look: sum((look[name] for name in names[1:]), look[names[0]] * (1 if factor is None else factor))


def _stream(subject: Subject, layer: int) -> Iterator[tuple]:
    """How the residual stream goes through a layer."""
    block, prefix = subject.block(layer), f"blocks.{layer}"
    pre, attn, mid, mlp, post = (
        f"{prefix}.hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    last, terms = pre, [name for name in (attn, mlp) if subject.has(name)]
    if block.attn_skip is not None:
        yield from _normed_skips(subject, layer)
    elif subject.has(mid):
        yield mid, "resid_pre + attn_out", _total([pre, attn], subject.factor(layer, "attn_residual")), (attn,)
        last, terms = mid, [mlp]
    if block.post_norm:
        first, second, copy = f"{prefix}.ln1", f"{prefix}.ln2", f"{prefix}.hook_mlp_in"
        yield from norm_identities(subject, first, lambda look: look[copy if copy in look else mid], "resid_mid")
        yield post, "ln1's output + mlp_out", lambda look: look.normed(first) + look[mlp], (mlp,)
        yield from norm_identities(subject, second, lambda look: look[f"{prefix}.hook_resid_post"], "resid_post")
        post = f"{prefix}.hook_normalized_resid_post"
        if block.extra is None:
            yield post, "ln2's output", lambda look: look.normed(second)
    elif block.extra is None and block.mlp_skip is None:
        equation = " + ".join(name.rsplit("hook_", 1)[-1] for name in (last, *terms))
        yield post, equation, _total([last, *terms], subject.factor(layer, "mlp_residual")), tuple(terms)
    after = f"blocks.{layer + 1}.hook_resid_pre"
    fresh = any(run.fresh for run in subject.architecture.ran[layer + 1 : layer + 2])
    if layer + 1 < subject.n_layers and not fresh:
        yield after, f"{post.rsplit('hook_', 1)[-1]} of the layer before", lambda look: look[post], (post,)


def _normed_skips(subject: Subject, layer: int) -> Iterator[tuple]:
    """A stream that attention and MLP are added to behind their norms."""
    prefix = f"blocks.{layer}"
    rows = (("attn", "ln1", "resid_pre", "resid_mid"), ("mlp", "ln2", "resid_mid", "resid_post"))
    for part, name, before, after in rows:
        norm, factor = f"{prefix}.{name}", subject.factor(layer, f"{part}_skip")

        def value(look: Look, norm: str = norm, factor: Any = factor, before: str = before, part: str = part) -> Tensor:
            x, scale = subject.norm(norm).split(look[f"{prefix}.hook_{before}"])
            path = subject.norm(norm).path
            bias = bias_of(subject.hf.get_submodule(path))
            skip = (x / scale) * subject.model.interior.weights.parameters.gain(path).detach()
            skip = skip if bias is None else skip + bias.detach()
            return skip * (1 if factor is None else factor) + look[f"{prefix}.hook_{part}_out"]

        equation = f"{name} of {before} * factor + {part}_out"
        yield f"{prefix}.hook_{after}", equation, value, (f"{prefix}.hook_{part}_out",)


def _after(subject: Subject) -> Iterator[tuple]:
    last = f"blocks.{subject.n_layers - 1}.hook_"
    normed = "normalized_resid_post" if subject.has(f"{last}normalized_resid_post") else "resid_post"
    read, equation = last + normed, f"the last {normed}"

    def given(look: Look) -> Tensor:
        value = look.normed("ln_final") if subject.has("ln_final.hook_scale") else look[read]
        length = subject.tokens.shape[1]
        # Positions that come before the text are left out; or it is the first of several streams behind the text's.
        return value[:, length : 2 * length] if subject.architecture.several_unembedded else value[:, -length:]

    if subject.has("ln_final.hook_scale"):
        final, path = read, subject.architecture.ln_final

        def stream(look: Look) -> Tensor:
            return look.first([final], path)

        for row in norm_identities(subject, "ln_final", stream, equation):
            yield *row, (final,)
        equation = "ln_final's output"
    # Where there is neither, several streams are mixed before the unembedding.
    if subject.has("ln_final.hook_scale") or subject.has(read):
        if subject.architecture.head is None:
            yield "unembed.hook_in", equation, given, (read,)
        else:
            head = f"the head's transform of {equation}"
            yield "unembed.hook_in", head, lambda look: subject.transformed(given(look)), (read,)

    def logits(look: Look) -> Tensor:
        weight, bias = look.weight("unembed.W_U"), look.weight("unembed.b_U")
        assert weight is not None
        out = torch.matmul(look["unembed.hook_in"], weight)
        return out if bias is None else out + bias

    if "unembed.W_U" in subject.weight_names:
        yield "unembed.hook_out", "unembed.hook_in @ W_U + b_U", logits, ("unembed.hook_in",)
