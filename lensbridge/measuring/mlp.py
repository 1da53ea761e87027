"""What happens inside an MLP?

Its last projection gives what it adds to the stream; what that reads is the neurons, and these are made of one
projection, or of two of which the one that doubles them when it is doubled itself is the linear one.
"""

from __future__ import annotations

import os.path
from typing import Any

import torch
from torch import Tensor

from .findings import EXPERTS, NEURONS, Findings
from .projections import affine_calls
from .recording import Call, Value
from .stream import Term, Trace


class MlpReader:
    """Reads one branch of a layer that is no attention.

    Args:
        term: what it adds to the stream.
        before: the stream that it reads.
    """

    def __init__(self, trace: Trace, layer: Call, term: Term, before: Value) -> None:
        self.trace = trace
        self.flow = trace.flow
        self.layer = layer
        self.term = term
        stop = {before, trace.flow.root(before)}
        self.ancestors = trace.flow.ancestors(term.value, stop, layer.start)
        self.calls = [call for call in trace.within(layer) if call.output in self.ancestors]
        self.found = Findings()
        #: The projection that goes through the activation function (its columns), what it is multiplied with, and the
        #: product; to find the name of the function by.
        self.activation: tuple[Tensor, Tensor | None, Tensor] | None = None

    def read(self) -> Findings:
        """The fields of `Block` that the MLP fills, and reasons for its points that there are not."""
        fields, path = self.found.fields, self.term.module
        fields |= {"mlp": None, "gate": None, "mlp_in": None, "mlp_out": None}
        assert path is not None
        affine = affine_calls(self.trace, self.calls)
        out = [call for call in affine if self.flow.same(call.output, self.term.value)]
        inner = out[-1] if out else None
        fields["mlp"] = self.relative(path)
        if inner is None:
            self._experts(path)
            return self.found
        involved = self._neurons(inner, [call for call in affine if call is not inner])
        if inner.path == path:
            # The projections lie side by side with others' modules, or in one that returns something else.
            fields["mlp"] = _common([self.relative(each) for each in (*involved, path)])
            fields["mlp_branch"] = self.relative(path)
        if len(self.flow.shape(inner.output or 0)) == 2 and len(self.flow.shape(self.output(path))) == 2:
            fields["flat_mlp"] = True
        return self.found

    def output(self, path: str) -> Value:
        """What the module at ``path`` returned."""
        value = self.trace.calls[path][0].output
        assert value is not None
        return value

    def relative(self, path: str) -> str:
        """A path below the layer."""
        return path.removeprefix(f"{self.layer.path}.")

    # --- neurons ------------------------------------------------------------------------------------------------------

    def _neurons(self, out: Call, affine: list[Call]) -> list[str]:
        """Fill in the projections around the neurons, which ``out`` reads; the paths of all that were found."""
        fields, post = self.found.fields, out.input
        assert post is not None
        norm = self.trace.norm_outputs.get(self.flow.root(post))
        if norm is not None and norm.input is not None and self.trace.norms[norm.path].obstacle is None:
            fields["neuron_norm"] = self.relative(norm.path)
            post = norm.input
        behind = self._direct(post, affine)
        groups = self._groups(post, behind)
        if len(groups) == 1 and groups[0].whole:
            fields |= {"mlp_in": self.relative(groups[0].path)}
            self.activation = groups[0].tensor(self.flow), None, self.flow.tensor(post)
        elif len(groups) == 2:
            self._gated(post, groups)
        else:
            paths = ", ".join(dict.fromkeys(self.relative(group.path) for group in groups)) or "no projection"
            self._no_neurons(f"its neurons are made of {paths} in an unknown way")
        if fields["mlp_in"] is not None:
            fields["mlp_out"] = self.relative(out.path)
            self._learned_function(post)
        return [out.path, *(call.path for call in behind)]

    def _learned_function(self, post: Value) -> None:
        """An activation function that has weights."""
        ancestors = self.flow.ancestors(post, since=self.layer.start)
        for call in self.calls:
            module = self.trace.recording.module(call.path)
            alone = call.output in ancestors and call.path not in self.trace.norms and not list(module.children())
            if alone and list(module.parameters()) and not affine_calls(self.trace, [call]):
                self.found.fields["act"] = self.relative(call.path)
                return

    def _direct(self, post: Value, affine: list[Call]) -> list[Call]:
        """The projections that the neurons are made of, without those that only these read."""
        ancestors = self.flow.ancestors(post, since=self.layer.start)
        found = [call for call in affine if call.output in ancestors]

        def reads(reader: Call, other: Call) -> bool:
            assert reader.input is not None
            return self.flow.depends(reader.input, {other.output or -1}, since=self.layer.start)

        return [call for call in found if not any(reads(other, call) for other in found if other is not call)]

    def _groups(self, post: Value, calls: list[Call]) -> list[_Columns]:
        """The sets of columns that are used together."""
        ancestors = self.flow.ancestors(post, since=self.layer.start)
        groups: dict[tuple[Any, ...], _Columns] = {}
        for call in calls:
            assert call.output is not None
            width = self.flow.shape(call.output)[-1]
            held = self.flow.spread(call.output, self.layer.end)
            for value in held:
                outputs = [out for op in self.flow.users[value] for out in op.outputs]
                used = any(out in ancestors and out not in held for out in outputs) or value == post
                columns = held[value].columns
                if value in ancestors and used and columns.dim() >= 2:
                    row = tuple(columns.flatten(0, -2)[0].tolist())
                    group = groups.setdefault((call.path, row), _Columns(call.path, row, width, []))
                    group.values.append(value)
        return list(groups.values())

    def _gated(self, post: Value, groups: list[_Columns]) -> None:
        """Tell the linear one of two from the one that goes through the activation function."""
        fields, whole = self.found.fields, self.flow.tensor(post)
        doubles = []
        for group in groups:
            changed = {value: 2 * self.flow.tensor(value) for value in group.values}
            try:
                again = self.flow.again(post, changed)
            except (LookupError, RuntimeError):
                self._no_neurons("what its neurons are made of is edited in place")
                return
            doubles.append(torch.allclose(again, 2 * whole, rtol=1e-3, atol=1e-5))
        if doubles[0] == doubles[1]:
            kind = "both" if doubles[0] else "neither"
            self._no_neurons(f"{kind} of the two projections that make its neurons is linear in them")
            return
        linear, gate = (groups[0], groups[1]) if doubles[0] else (groups[1], groups[0])
        if linear.path != gate.path and linear.whole and gate.whole:
            fields |= {"gate": self.relative(gate.path), "mlp_in": self.relative(linear.path)}
        elif linear.path == gate.path and (*gate.row, *linear.row) == tuple(range(gate.width)):
            fields |= {"mlp_in": self.relative(gate.path), "gate_up": True}
        else:
            self._no_neurons(f"{self.relative(gate.path)} holds gate and linear part in an order that is not known")
            return
        self.activation = gate.tensor(self.flow), linear.tensor(self.flow), whole

    def _no_neurons(self, reason: str) -> None:
        self.found.refuse(f"no neurons of the MLP are shown: {reason}", *NEURONS)

    # --- experts ------------------------------------------------------------------------------------------------------

    def _experts(self, path: str) -> None:
        """A module that holds all experts, and what chooses among them."""
        fields, found = self.found.fields, self.found
        reason = "its output is that of no single projection"
        found.refuse(f"no neurons of the MLP are shown: {reason}", *NEURONS)
        for call in self.calls:
            chosen = self._choice(call)
            if chosen is None or call.path == path:
                continue
            fields["experts"] = self.relative(call.path)
            ancestors = self.flow.ancestors(chosen, since=self.layer.start)
            affine = [each for each in self.calls if each.start < call.start and set(each.outputs) & ancestors]
            chooser = [each for each in affine if each.path.startswith(f"{path}.")]
            if chooser:
                fields["router"] = self.relative(
                    min(chooser, key=lambda each: (each.path.count("."), -each.start)).path
                )
            return
        found.refuse("no module is called with the experts chosen for each token and their weights", *EXPERTS)

    def _choice(self, call: Call) -> Value | None:
        """The weights that a module gets for the experts chosen for each token."""
        tensors = {value: self.flow.tensor(value) for value in call.inputs}
        for index in tensors.values():
            if index.is_floating_point() or index.dim() != 2 or index.dtype == torch.bool:
                continue
            for value, weights in tensors.items():
                if weights.is_floating_point() and weights.shape == index.shape:
                    return value
        return None


class _Columns:
    """Columns of a projection that are used together, and the values that consist of them."""

    def __init__(self, path: str, row: tuple[int, ...], width: int, values: list[Value]) -> None:
        self.path = path
        self.row = row
        self.width = width
        self.values = values

    @property
    def whole(self) -> bool:
        """Whether they are all that the projection gives, in order."""
        return self.row == tuple(range(self.width))

    def tensor(self, flow: Any) -> Tensor:
        """The columns' numbers."""
        return flow.tensor(self.values[0])


def _common(paths: list[str]) -> str:
    """The path of the module that all of these are in."""
    return os.path.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".") if len(paths) > 1 else ""
