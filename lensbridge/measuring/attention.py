"""How does attention work in one layer?

It starts from the softmax: backwards lie the product of queries and keys and what these are made of, forwards the
product with the values, and what reads the heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.record import PARTS, Softmax
from .code import Called, call_at, within_forward
from .findings import QK_NORMS, QUERIES, RESULT, ROTATED, SQUARES, VALUES, Findings, Z
from .projections import Projections, Source, affine_calls, layout_of, ungrouped
from .recording import Call, Caller, Op, Value
from .scores import cap_among, scoring
from .stream import Trace

PRODUCTS = ("bmm", "baddbmm", "mm")
LETTERS = ("query", "key", "value")


def softmaxes(trace: Trace, layer: Call) -> list[Op]:
    """The operations in a layer that turn scores into patterns, [..., query, key]."""
    found = []
    _, length = trace.flow.shape(trace.recording.tokens)
    for op in trace.recording.ops[layer.start : layer.end]:
        if op.name not in ("_softmax", "_safe_softmax", "softmax"):
            continue
        shape = trace.flow.shape(op.outputs[0])
        if len(shape) >= 3 and shape[-2] == length and shape[-1] in (length, length + 1):
            found.append(op)
    return found


class AttentionReader:
    """Reads attention off one layer."""

    def __init__(self, trace: Trace, layer: Call, softmax: Op) -> None:
        self.trace = trace
        self.flow = trace.flow
        self.layer = layer
        self.op = softmax
        self.batch, self.length = trace.flow.shape(trace.recording.tokens)
        self.inner = trace.within(layer)
        self.found = Findings()

    def read(self) -> Findings:
        """The fields of `Block` that attention fills, and reasons for its points that there are not."""
        shape = self.flow.shape(self.op.outputs[0])
        if len(shape) not in (3, 4) or (len(shape) == 3 and shape[0] % self.batch):
            self.found.refuse(f"its pattern has the shape {list(shape)}, not [batch, head, query, key]", *SQUARES)
        self.n_heads = shape[1] if len(shape) == 4 else shape[0] // self.batch
        self.met: tuple[Tensor, Tensor] | None = None
        self._place()
        self._operands()
        self._sides()
        self._heads_out()
        self._sinks(shape)
        if len(shape) == 3:
            self.found.fields["flat_heads"] = True
        self._values()
        return self.found

    def relative(self, path: str) -> str:
        """A path below the layer."""
        return "" if path == self.layer.path else path.removeprefix(f"{self.layer.path}.")

    def _values(self) -> None:
        """What TransformerLens' config says of attention."""
        values = self.found.values
        values["n_heads"] = self.n_heads
        if self.query is not None:
            size = self.flow.shape(self.query)[-1]
            module = self.trace.recording.module(self.call.path)
            plain = self.found.fields.get("q", "") is not None or "qkv" in self.found.fields
            if plain and getattr(module, "head_dim", None) != size:
                values["d_head"] = size
            product = next(op for op in self.flow.users[self.query] if op.name in PRODUCTS)
            cap = cap_among(self.trace.recording.ops[product.time : self.op.time])
            values |= {} if cap is None else {"attn_scores_soft_cap": cap}
            self._scoring(module, size, cap)

    def _scoring(self, module: Any, size: int, cap: float | None) -> None:
        """How scores come from the queries and keys that are shown."""
        scores = self.flow.tensor(self.op.inputs[0])
        met = self.met
        if "sinks" in self.found.fields or scores.shape[-1] != self.length or met is None:
            return
        found = scoring(*met, scores.reshape(self.batch, self.n_heads, self.length, self.length), cap)
        if found is not None:
            scaling = getattr(module, "scaling", None)
            usual = 1 / scaling if isinstance(scaling, float) and scaling else size**0.5
            self.found.values["scoring"] = (found, usual)

    # --- where the softmax is -----------------------------------------------------------------------------------------

    def _place(self) -> None:
        """The module in whose forward the softmax is, and what it is called there."""
        trace, fields = self.trace, self.found.fields
        path = self.op.inside[-1]
        self.callers: list[Caller] = []
        self.outer: Called | None = None
        fields["softmax"] = Softmax(call=None)
        if isinstance(trace.recording.module(path), nn.Softmax):
            fields["softmax"] = Softmax(call=None, module=self.relative(path))
            path = self.op.inside[-2]
        else:
            self.callers = self._callers(path)
        fields["attn"] = self.relative(path)
        self.call = max(
            (call for call in trace.calls[path] if call.start <= self.op.time < call.end), key=lambda call: call.start
        )

    def _callers(self, path: str) -> list[Caller]:
        """The functions between the module's forward and the softmax; notes how the record finds it."""
        module = self.trace.recording.module(path)
        callers = within_forward(self.trace.recording.callers[self.op.time], module) or []
        name = f"{type(module).__name__}.forward"
        if not callers:
            self.found.refuse(f"the softmax is not called from {name}, as its source shows it", *SQUARES)
            return []
        called = call_at(callers[0], "softmax")
        names = ("softmax",) if called is None else called.names
        # What has no name, being the result of another call, goes by "call".
        operation = "softmax" if "softmax" in "_".join(names) else ("call", *names)[-1]
        if len(callers) > 2:
            chain = ", then ".join(each.code.co_name for each in callers[-2::-1])
            self.found.refuse(f"the softmax is too deep inside {name} to be looked at (it calls {chain})", *SQUARES)
        self.outer = outer = call_at(callers[-1], callers[-2].code.co_name) if len(callers) > 1 else None
        if len(callers) > 1 and outer is None:
            self.found.refuse(f"what {name} calls for its softmax cannot be read off its source", *SQUARES)
        call = outer.names[-1] if outer is not None and outer.names else None
        self.found.fields["softmax"] = Softmax(call=call, operation=operation)
        return callers

    # --- queries, keys and values -------------------------------------------------------------------------------------

    def _operands(self) -> None:
        """What the two products multiply: queries with keys before the softmax, the pattern with values after it."""
        ops, flow = self.trace.recording.ops, self.flow
        pattern = {self.op.outputs[0]}
        self.query = self.key = self.value = self.z = None
        ancestors = flow.ancestors(self.op.inputs[0], since=self.layer.start)
        size = self.batch * self.n_heads * self.length * self.length
        for op in reversed(ops[self.layer.start : self.op.time]):
            if op.name in PRODUCTS and op.outputs[0] in ancestors and flow.tensor(op.outputs[0]).numel() == size:
                self.query, self.key = op.inputs[-2:]
                break
        for op in ops[self.op.time + 1 : self.layer.end]:
            if op.name in PRODUCTS and any(flow.depends(each, pattern, since=self.op.time) for each in op.inputs):
                self.value, self.z = op.inputs[-1], op.outputs[0]
                break

    def _arguments(self) -> dict[str, Value] | None:
        """Query, key and value as the call inside the forward gets them; None if it does not, in a row."""
        if len(self.callers) < 2 or self.outer is None:
            return None
        caller, flow = self.callers[-2], self.flow
        code = caller.code
        names = code.co_varnames[: code.co_argcount]
        bound = int(bool(names) and names[0] == "self" and len(self.outer.names) > 1)
        given = {
            index - bound: caller.values[name]
            for index, name in enumerate(names)
            if name in caller.values and flow.tensor(caller.values[name]).is_floating_point()
        }
        found: dict[str, int] = {}
        for letter, operand in zip(LETTERS, (self.query, self.key, self.value), strict=True):
            if operand is None:
                return None
            ancestors = flow.ancestors(operand, since=self.layer.start)
            ancestors |= {flow.root(each) for each in ancestors}
            hits = [index for index, value in given.items() if flow.root(value) in ancestors]
            if not hits:
                return None
            found[letter] = max(hits, key=lambda index: given[index])
        first = found["query"]
        in_row = [found[letter] for letter in LETTERS] == [first, first + 1, first + 2]
        if not in_row or self.outer.positional <= first + 2:
            return None
        self.found.fields["query_argument"] = first
        return {letter: given[index] for letter, index in found.items()}

    def _sides(self) -> None:
        """Where queries, keys and values come from."""
        found = self.found
        if self.query is None or self.key is None or self.value is None:
            for points in (QUERIES, VALUES, ROTATED, Z, RESULT):
                found.refuse("no products of queries, keys and values were found around its softmax", *points)
            found.fields |= {"q": None, "k": None, "v": None, "rotary": False}
            return
        arguments = self._arguments()
        operands = dict(zip(LETTERS, (self.query, self.key, self.value), strict=True))
        sizes = {
            "query": self.flow.shape(self.query)[-1],
            "key": self.flow.shape(self.query)[-1],
            "value": self.flow.shape(self.value)[-1],
        }
        given = arguments or operands
        product = self.flow.maker(self.z) if self.z is not None else None
        self.projections = Projections(self.trace, self.inner, self.layer.start, product.time if product else 0)
        sources = {letter: self.projections.source(given[letter], sizes[letter]) for letter in LETTERS}
        self._projections(sources)
        self.met = self._meeting(arguments, sources)
        if arguments is not None and self._pairs_neighbours(arguments["query"], sources["query"]):
            found.values["rotary_adjacent_pairs"] = True
        rotary = any(self._rotated(given[letter], sources[letter]) for letter in ("query", "key"))
        found.fields["rotary"] = rotary and arguments is not None
        if arguments is None and (rotary or (found.fields.get("q", "") is None and "qkv" not in found.fields)):
            found.refuse(
                "queries and keys are not arguments of a call inside attention once they are rotated", *ROTATED
            )
        if arguments is None and found.fields.get("v", "") is None and "qkv" not in found.fields:
            found.refuse("values are no plain projection, and no argument of a call inside attention", *VALUES)
        self._head_norms(sources, given)

    def _meeting(
        self, arguments: dict[str, Value] | None, sources: dict[str, Source | str]
    ) -> tuple[Tensor, Tensor] | None:
        """Queries and keys as they are shown, [batch, head, pos, d_head]: as projected, or once normed and rotated."""
        found = []
        for letter in ("query", "key"):
            source = sources[letter]
            if isinstance(source, Source) and source.whole and not source.norms:
                x = self.flow.tensor(source.call.output or 0)
                x = x.reshape(self.batch, self.length, -1)[..., source.columns].transpose(1, 2)
            elif arguments is not None and len(self.flow.shape(arguments[letter])) == 4:
                x = self.flow.tensor(arguments[letter])
            else:
                return None
            if x.shape[2] != self.length:
                return None
            found.append(x)
        return found[0], found[1]

    def _pairs_neighbours(self, rotated: Value, source: Source | str) -> bool:
        """Whether a rotation turns neighbouring dimensions into each other."""
        if not isinstance(source, Source) or source.whole:
            return False
        before, after = self.flow.tensor(source.value), self.flow.tensor(rotated)
        if before.shape != after.shape:
            before = before.transpose(1, 2) if before.dim() == 4 else before
        if before.shape != after.shape or after.shape[-1] % 2:
            return False
        lengths = [x.double().unflatten(-1, (-1, 2)).norm(dim=-1) for x in (before, after)]
        factor = lengths[1].norm() / lengths[0].norm()
        return torch.allclose(lengths[1], factor * lengths[0], rtol=1e-3, atol=1e-4)

    def _rotated(self, value: Value, source: Source | str) -> bool:
        """Whether queries or keys are changed by where they are, after they were projected."""
        if isinstance(source, Source):
            return not source.whole
        ancestors = self.flow.ancestors(value, since=self.layer.start)
        ops = {op for op in map(self.flow.maker, ancestors) if op is not None and op.time >= self.layer.start}
        sides = [side for op in ops if op.name in ("mul", "mul_") and len(op.inputs) == 2 for side in op.inputs]
        start = {self.layer.input or -1}
        given = [side for side in sides if not self.flow.depends(side, start, since=self.layer.start)]
        return any(self.length in self.flow.shape(side)[:-1] for side in given)

    def _projections(self, sources: dict[str, Source | str]) -> None:
        """Fill in the projections, if they are laid out in a known way."""
        problems: dict[str, str] = {}
        plain: dict[str, Source] = {}
        for letter, source in sources.items():
            if isinstance(source, str):
                problems[letter] = source
            elif source.bounded:
                problems[letter] = f"they are bounded after {self.relative(source.path)}"
            elif letter == "value" and (source.norms or source.scaled or not source.whole):
                problems[letter] = f"they are normed, scaled or mixed after {self.relative(source.path)}"
            else:
                plain[letter] = source
        if any(source.clipped for source in plain.values()):
            self.found.fields["clips"] = True
        paths = {source.path for source in plain.values()}
        if len(plain) == 3 and len(paths) == 1:
            self._fused(plain)
            return
        self._separate(plain, problems)

    def _fused(self, plain: dict[str, Source]) -> None:
        path = next(iter(plain.values())).path
        width = self.flow.shape(plain["query"].call.output or 0)[-1]
        layout = layout_of(
            width, plain["query"].columns, ungrouped(plain["key"].columns), ungrouped(plain["value"].columns)
        )
        if layout is None:
            self._no_queries(f"{self.relative(path)} holds queries, keys and values in an order that is not known")
            return
        self.found.fields |= {"qkv": self.relative(path)} | ({} if layout == PARTS else {"qkv_layout": layout})

    def _no_queries(self, reason: str) -> None:
        self.found.fields |= {"q": None, "k": None, "v": None}
        self.found.refuse(reason, *QUERIES)

    def _separate(self, plain: dict[str, Source], problems: dict[str, str]) -> None:
        fields = self.found.fields
        for letter, source in plain.items():
            width = self.flow.shape(source.call.output or 0)[-1]
            columns = source.columns if letter == "query" else ungrouped(source.columns)
            if torch.equal(columns.flatten(), torch.arange(width)):
                fields[letter[0]] = self.relative(source.path)
            elif letter == "query" and _gated(columns, width):
                fields |= {"q": self.relative(source.path), "q_gate": True}
            else:
                problems[letter] = f"{self.relative(source.path)} holds other things, or its heads in another order"
        if "query" in problems or "key" in problems:
            both = [f"{letter}: {problems[letter]}" for letter in ("query", "key") if letter in problems]
            fields.pop("q_gate", None)
            fields |= {"q": None, "k": None}
            self.found.refuse(f"queries or keys are no plain projection ({'; '.join(both)})", *QUERIES)
        if "value" in problems:
            fields["v"] = None

    def _head_norms(self, sources: dict[str, Source | str], given: dict[str, Value]) -> None:
        """Norms of queries and keys."""
        fields, found = self.found.fields, self.found
        norms = {letter: source.norms for letter, source in sources.items() if isinstance(source, Source)}
        late = [self._behind_rotation(given[letter], sources[letter]) for letter in ("query", "key")]
        if any(late):
            self._late_norms(late, sources)
        elif len(norms.get("query", ())) == len(norms.get("key", ())) == 1:
            forms = {letter: self._norm_form(norms[letter][0], sources[letter]) for letter in ("query", "key")}
            if forms["query"] == forms["key"] is not None:
                fields |= {f"{letter[0]}_norm": self.relative(norms[letter][0].path) for letter in ("query", "key")}
                fields |= forms["query"] or {}
            else:
                found.refuse("the norms of queries and keys are over neither single heads nor all of them", *QK_NORMS)
        elif norms.get("query") or norms.get("key"):
            found.refuse("queries and keys are not normed alike", *QK_NORMS)
        elif any(self._normed_somehow(given[letter], sources[letter]) for letter in ("query", "key")):
            found.refuse("queries and keys are normed in a way that is not known", *QK_NORMS)

    def _normed_somehow(self, value: Value, source: Source | str) -> bool:
        """Whether a norm stands between a projection and ``value``."""
        start = self.layer.start if isinstance(source, str) else source.call.end
        ancestors = self.flow.ancestors(value, since=start)
        calls = [call for root, call in self.trace.norm_outputs.items() if root in ancestors and call.start >= start]
        return not isinstance(source, str) and bool(calls)

    def _late_norms(self, late: list[Call | None], sources: dict[str, Source | str]) -> None:
        """Norms of what is rotated already."""
        query, key = late
        forms = [
            None if call is None else self._norm_form(call, sources[letter])
            for call, letter in zip(late, LETTERS, strict=False)
        ]
        obstacles = [call is not None and self.trace.norms[call.path].obstacle is not None for call in late]
        if query is None or key is None or forms[0] is None or forms[0] != forms[1] or any(obstacles):
            reason = "norms of queries and keys stand behind their rotation, in a way that is not known"
            self.found.refuse(reason, *QK_NORMS)
            return
        paths = {"q_norm": self.relative(query.path), "k_norm": self.relative(key.path)}
        self.found.fields |= {**paths, **forms[0], "qk_norm_rotated": True}

    def _norm_form(self, norm: Call, source: Any) -> dict[str, Any] | None:
        shape, (heads, size) = self.flow.shape(norm.input or 0), source.columns.shape
        if len(shape) == 4 and shape[-1] == size:
            return {"qk_norm_heads_first": True} if shape[2] == self.length else {}
        return {"qk_norm_over": "all"} if len(shape) == 3 and shape[-1] == heads * size else None

    def _behind_rotation(self, value: Value, source: Source | str) -> Call | None:
        """The norm between the rotation and ``value``, if there is one."""
        if isinstance(source, str):
            return None
        held = self.projections.held[id(source.call)]
        ancestors = self.flow.ancestors(value, since=self.layer.start)
        outputs = [call for root, call in self.trace.norm_outputs.items() if root in ancestors]
        return next((call for call in outputs if call.start >= source.call.end and call.input not in held), None)

    # --- what the heads write -----------------------------------------------------------------------------------------

    def _heads_out(self) -> None:
        """Where the heads' outputs are, and the projection that reads them."""
        found, fields = self.found, self.found.fields
        fields["o"] = None
        if self.z is None:
            return
        calls = [call for call in affine_calls(self.trace, self.inner) if call.start > self.op.time]
        columns = self._z_columns()
        if columns is not None:
            spread = self.flow.spread(self.z, self.layer.end, columns=columns)
            for call in calls:
                held = spread.get(call.input or -1)
                if held is None or not held.plain:
                    continue
                if self._in_order(held.columns):
                    fields["o"] = self.relative(call.path)
                    return
                found.refuse(f"{self.relative(call.path)} does not read one head after the other", *RESULT)
                break
        self._z_from_call(calls)

    def _z_from_call(self, calls: list[Call]) -> None:
        """What stands between the heads and their projection hides them; the call inside attention returns them."""
        found, fields = self.found, self.found.fields
        if fields["softmax"].call is None:
            reason = (
                "something stands between the heads and their projection, and no call inside attention returns them"
            )
            found.refuse(reason, *Z, *RESULT)
            return
        fields["z_from_call"] = True
        assert self.z is not None
        readers = [call for call in calls if self.flow.depends(call.input or 0, {self.z}, since=self.op.time)]
        if readers:
            fields["o"] = self.relative(readers[0].path)
            norm = self.trace.norm_outputs.get(self.flow.root(readers[0].input or 0))
            if norm is not None and self._reads_heads(norm.input):
                fields["z_norm"] = self.relative(norm.path)

    def _reads_heads(self, value: Value | None) -> bool:
        """Whether a value is what the heads write, one after the other."""
        columns = self._z_columns()
        if columns is None or self.z is None:
            return False
        held = self.flow.spread(self.z, self.layer.end, columns=columns).get(value or -1)
        return held is not None and held.plain and self._in_order(held.columns)

    def _in_order(self, columns: Tensor) -> bool:
        row = columns.flatten(0, -2)[0]
        return torch.equal(row, torch.arange(len(row)))

    def _z_columns(self) -> Tensor | None:
        """For each element of what the heads write, its place in [head, d_head]."""
        assert self.z is not None
        shape = self.flow.shape(self.z)
        size, heads = shape[-1], self.n_heads
        place = torch.arange(heads * size).view(heads, size)
        if len(shape) == 3 and shape[:2] == (self.batch * heads, self.length):
            return place[:, None].expand(heads, self.length, size).repeat(self.batch, 1, 1)
        if len(shape) == 3 and shape[:2] == (self.batch, self.length * heads):
            return place.repeat(self.length, 1).expand(self.batch, -1, -1).clone()
        return None

    def _sinks(self, shape: tuple[int, ...]) -> None:
        """The learned logits in the last column, if there is one."""
        if shape[-1] == self.length:
            return
        parameters = dict(self.trace.recording.model.named_parameters())
        ancestors = self.flow.ancestors(self.op.inputs[0], since=self.layer.start)
        for name, parameter in parameters.items():
            if name.startswith(f"{self.layer.path}.") and parameter.numel() == self.n_heads:
                known = self.trace.recording.known(parameter) and self.trace.recording.number(parameter) in ancestors
                if known:
                    self.found.fields["sinks"] = self.relative(name)
                    return
        self.found.refuse("its softmax has a column more than there are keys", *SQUARES)


def _gated(columns: Tensor, width: int) -> bool:
    """Whether each head's query comes first, then as much of something else."""
    heads, size = columns.shape
    expected = torch.arange(width).view(heads, -1)
    return expected.shape[1] == 2 * size and torch.equal(columns, expected[:, :size])
