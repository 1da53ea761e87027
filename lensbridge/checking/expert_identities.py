"""What must be true of the choice among experts, of their neurons, and of what they write?

HuggingFace's own modules say what is chosen for the tokens that a layer's MLP reads, and what becomes of the experts'
sum: they are run by themselves on those tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..engine.expert_sites import Call
from ..experts import Experts
from .subject import Look, Subject

Read = Callable[[Look], Tensor]


class Mixture:
    """The mixture of experts of one layer.

    Args:
        read: what the MLP reads, in the active basis, ``[batch, pos, d_model]``.
    """

    def __init__(self, subject: Subject, layer: int, read: Read) -> None:
        self.subject = subject
        self.layer = layer
        self.block = subject.block(layer)
        self.read = read
        self.prefix = f"blocks.{layer}.mlp"
        self.weights, self.indices = (f"{self.prefix}.hook_expert_{name}" for name in ("weights", "indices"))
        self.module = subject.hf.get_submodule(subject.architecture.in_layer(layer, "experts"))
        self.experts = Experts(self.module)
        self.form = self.block.expert_form

    # --- HuggingFace's modules ----------------------------------------------------------------------------------------

    def _given(self, look: Look) -> Tensor:
        """What HuggingFace's MLP reads."""
        basis, arch = self.subject.model.interior.basis, self.subject.architecture
        norms, before = self.subject.model.interior.engine.norms, self.block.ln2
        x = self.read(look)
        return x if before is None else basis.norm_output_as_hf(x, norms[arch.in_layer(self.layer, "ln2")])

    def _run(self, look: Look, before: Any = None, after: Any = None) -> Tensor:
        """What HuggingFace's MLP adds, with hooks on the module of its experts."""
        hidden, total = self._given(look), 0
        with ExitStack() as stack:
            if before is not None:
                stack.enter_context(self.module.register_forward_pre_hook(before, with_kwargs=True))
            if after is not None:
                stack.enter_context(self.module.register_forward_hook(after))
            for path in filter(None, (self.block.mlp_also, self.block.mlp)):
                whole = self.subject.architecture.below(self.layer, path)
                # Some choose by the tokens themselves, or by what was chosen before.
                args, kwargs = look.further[whole]
                output = self.subject.hf.get_submodule(whole)(hidden.clone(), *args, **kwargs)
                total = total + (output[0] if isinstance(output, tuple) else output)
        assert isinstance(total, Tensor)
        return total - total.mean(-1, keepdim=True) if self.subject.model.interior.basis.centres_stream else total

    def chosen(self, look: Look) -> Call:
        """What HuggingFace gives its experts."""
        calls: list[Call] = []
        self._run(look, before=lambda module, args, kwargs: calls.append(Call((args, kwargs))))
        return calls[0]

    def written(self, look: Look) -> Tensor:
        """What HuggingFace's MLP makes of the choice that is shown, and of the neurons."""
        if self.form.shown:
            return self._run(look, after=lambda module, args, output: self._total(look).view(output.shape))

        def choose(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = Call((args, kwargs))
            indices = look[self.indices]
            return call.changed(indices, look[self.weights].gather(-1, indices).to(call.weights.dtype))

        return self._run(look, before=choose)

    # --- what is shown ------------------------------------------------------------------------------------------------

    def scores(self, look: Look) -> Tensor:
        """A softmax over all experts."""
        weight, bias = (look.weight(f"{self.prefix}.W_gate.{name}") for name in ("weight", "bias"))
        assert weight is not None
        return torch.softmax(linear(self.read(look).flatten(0, 1), weight, bias), dim=-1, dtype=torch.float)

    def best(self, look: Look) -> Tensor:
        """The experts with the largest weights."""
        return look[self.weights].topk(look[self.indices].shape[-1], dim=-1).indices

    def spread(self, look: Look) -> Tensor:
        """The weights that HuggingFace gives its experts, by expert."""
        call = self.chosen(look)
        return torch.zeros_like(look[self.weights]).scatter(-1, call.indices, call.weights.float())

    def point(self, expert: int, part: str) -> str:
        """The name of a point of one expert."""
        return f"{self.prefix}.experts.{expert}.hook_{part}"

    def _sent(self, look: Look, expert: int) -> tuple[Tensor, Tensor]:
        """(token, its weight) of what is sent to an expert, in the order in which its points show them."""
        indices, weights = look[self.indices], look[self.weights]
        slot, token = torch.where((indices == expert).T)
        if self.block.weighs_all:
            best = weights.topk(indices.shape[-1], dim=-1).values
            by_slot = best / best.sum(-1, keepdim=True) if self.subject.model.cfg.norm_topk_prob else best
        else:
            by_slot = weights.gather(-1, indices)
        return token, by_slot[token, slot, None]

    def projected(self, expert: int, name: str) -> Read:
        """``n @ W_gate`` or ``n @ W_in`` of the tokens that are sent to an expert."""

        def value(look: Look) -> Tensor:
            prefix = f"{self.prefix}.experts.{expert}.{name}"
            weight, bias = (look.weight(f"{prefix}.{word}") for word in ("weight", "bias"))
            assert weight is not None
            return linear(self.read(look).flatten(0, 1)[self._sent(look, expert)[0]], weight, bias)

        return value

    def activated(self, expert: int) -> Read:
        """HuggingFace's function of gate and linear part."""

        def value(look: Look) -> Tensor:
            gate = look[self.point(expert, "gate")] if self.form.gated else None
            return self.experts.activations(gate, look[self.point(expert, "pre")])

        return value

    def _total(self, look: Look) -> Tensor:
        """The experts' weighted sum, from their neurons."""
        x = self.read(look).flatten(0, 1)
        total = torch.zeros_like(x)
        for expert in range(self.form.shown):
            if self.point(expert, "post") not in look:
                continue
            token, weights = self._sent(look, expert)
            prefix = f"{self.prefix}.experts.{expert}.W_out"
            weight, bias = (look.weight(f"{prefix}.{word}") for word in ("weight", "bias"))
            assert weight is not None
            out = linear(look[self.point(expert, "post")], weight, bias)
            if getattr(self.module, "has_post_expert_norm", False):
                out = self.module.post_expert_norm(out)
            total = total.index_add(0, token, (out * weights).to(total.dtype))
        return total


class Beside(Mixture):
    """The experts beside the MLP of one layer, with the MLP.

    Args:
        source: what is normed for both, ``[batch, pos, d_model]``.
    """

    def __init__(self, subject: Subject, layer: int, source: Read) -> None:
        super().__init__(subject, layer, self._normed)
        self.source = source
        assert self.block.beside is not None
        self.beside = self.block.beside

    def _module(self, path: str | None) -> Any:
        return self.subject.hf.get_submodule(self.subject.architecture.below(self.layer, path))

    def _gain(self, path: str | None) -> Tensor:
        path = self.subject.architecture.below(self.layer, path)
        return self.subject.model.interior.weights.parameters.gain(path).detach()

    def _normed(self, look: Look) -> Tensor:
        """What the experts read, in the active basis."""
        normalized = look[f"blocks.{self.layer}.ln2.hook_normalized"]
        folded = self.subject.model.interior.weights.processing.fold_ln
        return normalized if folded else normalized * self._gain(self.beside.reads)

    def _run(self, look: Look, before: Any = None, after: Any = None) -> Tensor:
        normalized = look[f"blocks.{self.layer}.ln2.hook_normalized"]
        to_mlp, to_experts = (normalized * self._gain(path) for path in (self.block.ln2, self.beside.reads))
        with ExitStack() as stack:
            if before is not None:
                stack.enter_context(self.module.register_forward_pre_hook(before, with_kwargs=True))
            if after is not None:
                stack.enter_context(self.module.register_forward_hook(after))
            _, weights, indices = self._module(self.block.router)(self.source(look).flatten(0, 1))
            experts = self.module(to_experts.flatten(0, 1), indices, weights).view(to_experts.shape)
        mlp = self._module(self.block.mlp)(to_mlp)
        return self._module(self.beside.of_mlp)(mlp) + self._module(self.beside.of_experts)(experts)


def expert_identities(mixture: Mixture) -> Iterator[tuple]:
    """Those of the choice and of the neurons, as rows of `Identity`."""
    if mixture.block.weighs_all:
        yield mixture.weights, "softmax(n @ W_gate)", mixture.scores
        yield mixture.indices, "the largest of hook_expert_weights", mixture.best
    else:
        yield mixture.weights, "HuggingFace's, by expert", mixture.spread
        yield mixture.indices, "HuggingFace's choice", lambda look: mixture.chosen(look).indices
    for expert in range(mixture.form.shown):
        parts = {"gate": "W_gate", "pre": "W_in"} if mixture.form.gated else {"pre": "W_in"}
        points = [mixture.point(expert, part) for part in parts]
        for point, name in zip(points, parts.values(), strict=True):
            yield point, f"n @ {name}, of the tokens sent there", mixture.projected(expert, name)
        yield mixture.point(expert, "post"), "act_fn(gate) * pre", mixture.activated(expert), tuple(points)
