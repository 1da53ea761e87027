"""What happens to the choice among experts, and to their neurons, when the forward pass reaches them?

HuggingFace hands all tokens to one module that holds every expert of a layer, with the experts chosen for each token
and their weights. What single experts compute is hidden inside: it is computed again from what the module is given,
for those experts that somebody listens to, and an edit goes in as a change of what the module returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..experts import ExpertForm, Experts
from ..whole import reading
from .places import Place
from .sites import Run, Site


class ChosenSite(Site):
    """mlp.hook_expert_weights, with one column for each expert, and mlp.hook_expert_indices: what experts are given."""

    def __init__(self, prefix: str, path: str, count: int) -> None:
        self.weights, self.indices = self.names = _choice(prefix)
        self.path = path
        self.place = Place(path, "input")
        self.count = count

    def visit(self, run: Run) -> None:
        call = Call(run.view[self.path].inputs)
        with run.graph_if_edited():
            given = call.weights.float()
            by_expert = given.new_zeros(*given.shape[:-1], self.count).scatter(-1, call.indices, given)
        by_expert, reweighted = run.fire(self.weights, by_expert, live=False)
        indices, rechosen = run.fire(self.indices, call.indices, live=True)
        if reweighted or rechosen:
            weights = by_expert.gather(-1, indices).to(call.weights.dtype)
            run.view[self.path].inputs = call.changed(indices, weights)


class ScoredSite(Site):
    """mlp.hook_expert_weights, a softmax over all experts, and mlp.hook_expert_indices, the best: the router's output.

    An edit of the weights chooses anew.
    """

    def __init__(self, prefix: str, path: str) -> None:
        self.weights, self.indices = self.names = _choice(prefix)
        self.path = path
        self.place = Place(path, "output")

    def visit(self, run: Run) -> None:
        logits, weights, indices = run.view[self.path].output
        with run.graph_if_edited():
            scores = torch.softmax(logits, dim=-1, dtype=torch.float)
        scores, rescored = run.fire(self.weights, scores, live=False)
        if rescored:
            best, indices = scores.topk(indices.shape[-1], dim=-1)
            weights = (best / best.sum(-1, keepdim=True) if run.cfg.norm_topk_prob else best).to(weights.dtype)
        indices, rechosen = run.fire(self.indices, indices, live=True)
        if rescored or rechosen:
            run.view[self.path].output = (logits, weights, indices)


def _choice(prefix: str) -> tuple[str, str]:
    return f"{prefix}.mlp.hook_expert_weights", f"{prefix}.mlp.hook_expert_indices"


class NeuronsSite(Site):
    """mlp.experts.{e}.hook_gate, hook_pre and hook_post, of the tokens that are sent to expert e.

    Args:
        shows_idle: whether the points of an expert without tokens show empty values.
    """

    def __init__(self, prefix: str, path: str, form: ExpertForm, shows_idle: bool) -> None:
        parts = ("gate", "pre", "post") if form.gated else ("pre", "post")
        experts = [f"{prefix}.mlp.experts.{expert}" for expert in range(form.count)]
        #: By expert, the names of its points.
        self.points = [{part: f"{expert}.hook_{part}" for part in parts} for expert in experts]
        self.names = tuple(name for points in self.points for name in points.values())
        self.path = path
        self.place = Place(path, "input")
        self.output = Place(path, "output")
        self.shows_idle = shows_idle

    def visit(self, run: Run) -> None:
        with reading():
            self._visit(run)

    def _visit(self, run: Run) -> None:
        call, experts = Call(run.view[self.path].inputs), Experts(run.view.module(self.path))
        changes = []
        for expert, points in enumerate(self.points):
            if any(run.listens(name) for name in points.values()):
                slot, token = torch.where((call.indices == expert).T)
                if self.shows_idle or len(token):
                    change = self._expert(run, experts, expert, call.hidden[token])
                    if change is not None:
                        changes.append((token, change * call.weights[token, slot, None]))
        if not changes:
            return
        output = run.read(self.output)
        total = output.flatten(0, -2)
        for token, change in changes:
            total = total.index_add(0, token, change.to(total.dtype))
        run.write(self.output, total.view(output.shape))

    def _expert(self, run: Run, experts: Experts, expert: int, x: Tensor) -> Tensor | None:
        """Show what one expert computes; by how much an edit changes what it returns, None without an edit."""
        points, apart = self.points[expert], run.view.apart
        before: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        changed, whole = False, run.listens(points["post"]) or any(run.edits(name) for name in points.values())
        for part in points:
            if not (whole or run.listens(points[part])):
                continue
            with run.graph_if_edited():
                if part == "post":
                    value = before[part] = apart(experts.activations, before.get("gate"), before["pre"])
                    value = apart(experts.activations, after.get("gate"), after["pre"]) if changed else value
                else:
                    value = before[part] = apart(experts.projected, expert, part, x)
            after[part], edited = run.fire(points[part], value, live=True)
            changed |= edited
        if not changed:
            return None
        return apart(experts.written, expert, after["post"]) - apart(experts.written, expert, before["post"])


class Call:
    """The arguments of the module that holds the experts; which of them is which shows in their types and shapes."""

    def __init__(self, inputs: tuple[tuple, dict[str, Any]]) -> None:
        self.args, self.kwargs = inputs
        given = dict([*enumerate(self.args), *self.kwargs.items()])
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        self._indices = next(key for key, value in tensors.items() if not value.is_floating_point())
        #: The experts chosen for each token, ``[batch*pos, chosen]``.
        self.indices: Tensor = tensors.pop(self._indices)
        self._weights = next(key for key, value in tensors.items() if value.shape == self.indices.shape)
        #: Their weights in the token's sum, ``[batch*pos, chosen]``.
        self.weights: Tensor = tensors.pop(self._weights)
        #: The tokens, ``[batch*pos, d_model]``.
        self.hidden: Tensor = next(iter(tensors.values())).flatten(0, -2)

    def changed(self, indices: Tensor, weights: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another choice."""
        new = {self._indices: indices, self._weights: weights}
        args = tuple(new.get(index, value) for index, value in enumerate(self.args))
        return args, {name: new.get(name, value) for name, value in self.kwargs.items()}
