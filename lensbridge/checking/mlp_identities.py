"""What must be true of the values inside an MLP?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ..utilities.activation_functions import SUPPORTED_ACTIVATIONS
from .expert_identities import Beside, Mixture, expert_identities
from .norm_identities import norm_identities
from .subject import Look, Subject


def mlp_identities(subject: Subject, layer: int) -> Iterator[tuple]:
    """Those of one layer, as rows of `Identity`."""
    prefix, block = f"blocks.{layer}", subject.block(layer)
    if block.mlp is None:
        return
    streams = [n for n in (f"{prefix}.hook_resid_mid", f"{prefix}.hook_resid_pre") if subject.has(n)]
    stream = streams[0] if streams else "what the MLP's norm is given"
    copy = f"{prefix}.hook_mlp_in"

    def given(look: Look) -> Tensor:
        reader = block.ln2 or block.mlp
        assert reader is not None
        return look.first(streams, subject.architecture.below(layer, reader))

    def source(look: Look) -> Tensor:
        return look[copy] if copy in look else given(look)

    yield copy, stream.rsplit("hook_", 1)[-1], given
    norm = f"{prefix}.ln1" if block.post_norm else f"{prefix}.ln2"
    if block.ln2 is not None and not block.post_norm:
        yield from norm_identities(subject, norm, source, stream.rsplit("hook_", 1)[-1])

    def read(look: Look) -> Tensor:
        if block.ln2 is None:
            return source(look)
        return subject.behind_norm(layer, "ln2", subject.reaching(norm, look.normed(norm)))

    if block.experts is not None:
        mixture = Mixture(subject, layer, read) if block.beside is None else Beside(subject, layer, source)
        yield from expert_identities(mixture)
        posts = [mixture.point(expert, "post") for expert in range(mixture.form.shown)]
        verifies = (mixture.weights, mixture.indices, *posts)
        yield from _output(subject, layer, mixture.written, "the experts' sum in HuggingFace's MLP", verifies)
        return
    yield from _neurons(subject, layer, read)
    yield from _neurons_output(subject, layer)


def _neurons(subject: Subject, layer: int, read: Callable[[Look], Tensor]) -> Iterator[tuple]:
    prefix = f"blocks.{layer}.mlp"
    pre, linear, post = (f"{prefix}.hook_{name}" for name in ("pre", "pre_linear", "post"))
    gated = subject.has(linear)

    def projected(weight: str, bias: str) -> Callable[[Look], Tensor]:
        def value(look: Look) -> Tensor:
            matrix, offset = look.weight(f"{prefix}.{weight}"), look.weight(f"{prefix}.{bias}")
            assert matrix is not None
            if offset is None:
                # What folding a norm's bias into a gate leaves has no name in TransformerLens.
                offset = subject.model.interior.weights.branch("mlp", layer).get(bias)
            out = torch.matmul(read(look), matrix)
            return out if offset is None else out + offset

        return value

    if f"{prefix}.W_in" in subject.weight_names:
        if gated:
            yield pre, "n @ W_gate + b_gate", projected("W_gate", "b_gate")
            yield linear, "n @ W_in + b_in", projected("W_in", "b_in")
        else:
            yield pre, "n @ W_in + b_in", projected("W_in", "b_in")

    act = _activation(subject, layer)

    def activated(look: Look) -> Tensor:
        return act(look[pre]).detach() * look[linear] if gated else act(look[pre]).detach()

    mid, norm = f"{prefix}.hook_mid", f"{prefix}.ln"
    active, equation = mid if subject.has(mid) else post, "act_fn(pre) * pre_linear" if gated else "act_fn(pre)"
    yield active, equation, activated, (pre, linear) if gated else (pre,)
    if active != post:
        yield from norm_identities(subject, norm, lambda look: look[mid], "mid")
        yield post, "ln's output", lambda look: look.normed(norm)


def _activation(subject: Subject, layer: int) -> Any:
    """The model's activation function: HuggingFace's of that name, where the two have one of the same name."""
    if subject.block(layer).act is not None:
        return subject.hf.get_submodule(subject.architecture.in_layer(layer, "act"))
    name = subject.model.cfg.act_fn
    return ACT2FN[name] if name in ACT2FN else SUPPORTED_ACTIVATIONS[name]


def _neurons_output(subject: Subject, layer: int) -> Iterator[tuple]:
    prefix = f"blocks.{layer}"
    post = f"{prefix}.mlp.hook_post"

    def written(look: Look) -> Tensor:
        matrix, bias = look.weight(f"{prefix}.mlp.W_out"), look.weight(f"{prefix}.mlp.b_out")
        assert matrix is not None
        value = torch.matmul(look[post], matrix)
        return value if bias is None else value + bias

    if f"{prefix}.mlp.W_out" in subject.weight_names and subject.has(post):
        yield from _output(subject, layer, written, "post @ W_out + b_out", (post,))


def _output(
    subject: Subject, layer: int, written: Callable[[Look], Tensor], name: str, verifies: tuple[str, ...]
) -> Iterator[tuple]:
    """From what the MLP's module returns, called ``name``, to what is added to the stream."""
    factor, norm = subject.factor(layer, "mlp_factor"), subject.norm_behind(layer, "mlp")
    times = " * factor" if factor is not None else ""
    if norm is not None:
        yield from norm_identities(subject, norm, written, name)
        value: Callable[[Look], Tensor] = lambda look: look.normed(norm)  # noqa: E731
        equation = f"{norm.rsplit('.', 1)[-1]}'s output{times}"
    else:
        value, equation = written, f"({name}){times}" if times else name
    through, bias = subject.block(layer).mlp_through, subject.factor(layer, "mlp_bias")
    if through is not None:
        equation, value = f"{through} of {equation}", subject.through(layer, "mlp_through", value)
    if factor is not None or bias is not None:
        inner = value
        value = lambda look: inner(look) * (1 if factor is None else factor) + (0 if bias is None else bias)  # noqa: E731
    yield f"blocks.{layer}.hook_mlp_out", equation, value, verifies
