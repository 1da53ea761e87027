"""What is one layer made of?

What is added to the stream is told apart by what it depends on: attention on a softmax over positions, another mixer on
other positions, an MLP on nothing but its own. Norms are those that the stream itself goes into.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention import AttentionReader, softmaxes
from .findings import ATTN, BLOCK, NEURONS, OWN_INPUTS, Findings
from .mlp import MlpReader
from .recording import Call, Ref, Value
from .stream import Step, Term, Trace

#: Every point of a layer but the stream before and after it.
INNER = tuple(
    BLOCK + name
    for name in (
        *("attn.", "mlp.", "ln1.", "ln2.", "ln1_post.", "ln2_post."),
        *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"),
        *("hook_attn_out", "hook_mlp_out", "hook_resid_mid", "hook_normalized_resid_post"),
    )
)
#: What is in the names of attributes that hold factors.
FACTOR_WORDS = ("mult", "scal", "factor", "alpha", "gamma", "lambda", "weight")
#: A layer of which nothing is known.
NOTHING: dict[str, Any] = dict.fromkeys(
    "ln1 attn q k v qkv o ln1_post ln2 mlp gate mlp_in mlp_out ln2_post attn_branch mlp_branch".split()
)


class LayerReader:
    """Reads one layer."""

    def __init__(self, trace: Trace, call: Call) -> None:
        self.trace = trace
        self.flow = trace.flow
        self.call = call
        assert call.input is not None and call.output is not None
        self.pre: Value = call.input
        self.post: Value = call.output
        self.inner = trace.within(call)
        self.found = Findings(dict(NOTHING) | {"rotary": False})
        #: See `MlpReader.activation`.
        self.activation: Any = None

    def read(self) -> Findings:
        """The fields of `Block` for this layer, and reasons for the points that it does not have."""
        way = self.trace.way(self.post, self.pre, self.call.start)
        if way is None or not any(step.kind == "add" for step in way):
            reason = "what leaves the layer is not what enters it with something added"
            self.found.fields["extra"] = reason
            self.found.refuse(reason, *INNER)
            return self.found
        terms = [term for step in way if step.kind == "add" for term in self._terms(step)]
        attention, mlp, others = self._assigned(terms)
        if attention is not None:
            self._attention(attention)
        if mlp is not None:
            self._mlp(mlp)
        others = self._also("attn", attention, others)
        others = self._also("mlp", mlp, others)
        self._norms_around(attention, mlp, way)
        self._order(attention, mlp)
        self._extra(way, others)
        return self.found

    def relative(self, path: str) -> str:
        """A path below the layer."""
        return path.removeprefix(f"{self.call.path}.")

    def _terms(self, step: Step) -> list[Term]:
        assert step.branch is not None
        return self.trace.terms(step.branch, self.inner, step, self.call.start)

    # --- which is which -----------------------------------------------------------------------------------------------

    def _assigned(self, terms: list[Term]) -> tuple[Term | None, Term | None, list[Term]]:
        """(attention or what is in its place, the MLP, what else is added)."""
        named = [term for term in terms if term.module is not None]
        soft = [op.outputs[0] for op in softmaxes(self.trace, self.call)]
        attention = next((term for term in named if self._within(term) & set(soft)), None)
        rest = [term for term in named if term is not attention]
        pointwise = [term for term in rest if self._pointwise(term)]
        if attention is None:
            attention = next((term for term in rest if term not in pointwise), None)
        # Of several that are added together, the one that is called last.
        together = [term for term in pointwise if term.step is pointwise[0].step]
        mlp = max(together, key=self._start) if pointwise else None
        return attention, mlp, [term for term in terms if term not in (attention, mlp)]

    def _within(self, term: Term) -> set[Value]:
        """What a branch is made of, from the stream on."""
        assert term.step is not None
        stop = {self.pre, self.flow.root(self.pre), term.step.before, self.flow.root(term.step.before)}
        return self.flow.ancestors(term.value, stop, self.call.start)

    def _pointwise(self, term: Term) -> bool:
        """Whether a branch at a position depends on the stream at that position only."""
        assert term.step is not None
        before = term.step.before
        if not self.flow.depends(term.value, {before}, since=self.call.start):
            before = self.pre
        x, y = self.flow.tensor(before), self.flow.tensor(term.value)
        length = self.flow.shape(self.trace.recording.tokens)[1]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * x.std()
        # Batch and position may be one axis.
        here = (torch.arange(x.shape[:-1].numel()) % length == 0).view(x.shape[:-1]).to(x.device)
        try:
            again = self.flow.again(term.value, {before: x + 0.1 * noise * here[..., None]})
        except (LookupError, RuntimeError, IndexError):
            return False
        moved = (again - y).abs().flatten(0, -2)[~here.flatten()]
        return bool(moved.max() <= 1e-6 * (1 + y.abs().max()))

    # --- branches -----------------------------------------------------------------------------------------------------

    def _attention(self, term: Term) -> None:
        fields, module = self.found.fields, self.relative(term.module or "")
        inside = self._within(term)
        soft = [op for op in softmaxes(self.trace, self.call) if op.outputs[0] in inside]
        if soft:
            self.found.add(AttentionReader(self.trace, self.call, soft[0]).read())
        if len(soft) > 1:
            self.found.refuse(f"{len(soft)} softmaxes are computed, not one", f"{ATTN}hook_attn_scores")
        own = [call.output for call in self.trace.calls[f"{self.call.path}.{fields['attn']}"]] if soft else []
        if not any(self.flow.same(output, term.value) for output in own):
            fields["attn_branch"] = module
        self._wrapped("attn", "ln1_post", term)

    def _mlp(self, term: Term) -> None:
        assert term.step is not None
        reader = MlpReader(self.trace, self.call, term, term.step.before)
        self.found.add(reader.read())
        self.activation = reader.activation
        self._wrapped("mlp", "ln2_post", term)

    def _start(self, term: Term) -> int:
        """When the module of a term was called."""
        return self.trace.calls[term.module or ""][0].start

    def _also(self, part: str, main: Term | None, others: list[Term]) -> list[Term]:
        """Note the module whose output is added with a branch's; what else there is."""
        fields = self.found.fields
        for term in others:
            same = main is not None and term.module is not None and term.step is main.step
            if not same or main is None or self._start(term) > self._start(main):
                continue
            if (term.norms, term.factors) != (main.norms, main.factors) or self._pointwise(term) != (part == "mlp"):
                continue
            fields[f"{part}_also"] = self.relative(term.module or "")
            if part == "mlp" and term.step is not None:
                other = MlpReader(self.trace, self.call, term, term.step.before).read()
                experts = {role: other.fields[role] for role in ("experts", "router") if other.fields.get(role)}
                fields |= {role: path for role, path in experts.items() if fields.get(role) is None}
                fields |= dict.fromkeys(("gate", "mlp_in", "mlp_out")) | {"gate_up": False}
                self.found.refuse(f"no neurons of the MLP are shown: {fields['mlp_also']} adds to it", *NEURONS)
            return [each for each in others if each is not term]
        return others

    def _wrapped(self, part: str, role: str, term: Term) -> None:
        """The norm and the factor between a branch and the stream."""
        fields, point = self.found.fields, f"{BLOCK}hook_{part}_out"
        if len(term.norms) == 1 and self.trace.norms[term.norms[0]].obstacle is None:
            fields[role] = self.relative(term.norms[0])
            # What is added is the norm's output.
            fields[f"{part}_branch"] = None if fields[part] is not None else fields[role]
            if fields["ln1"] is None and f"{BLOCK}ln1." in self.found.reasons:
                reason = "what is called so depends on the norm before attention, which is not known"
                self.found.refuse(reason, f"{BLOCK}ln1_post.")
        elif term.norms:
            self.found.refuse("it is normed in a way that is not known before it is added", point)
        if any(isinstance(factor, Ref) or factor != 1 for factor in term.factors):
            path = self._factor(term.factors[0]) if len(term.factors) == 1 else None
            if path is None:
                self.found.refuse("it is multiplied by something that is no attribute of the layer", point)
            fields[f"{part}_factor"] = path

    def _factor(self, factor: Any) -> str | None:
        """Where a factor is stored, below the layer."""
        found = []
        for name, module in self.trace.recording.module(self.call.path).named_modules():
            held = {**vars(module), **module._parameters, **module._buffers}
            found += [f"{name}.{each}" if name else each for each, value in held.items() if self._is(value, factor)]
        # Other numbers may happen to have the same value.
        return min(found, key=lambda path: not any(word in path for word in FACTOR_WORDS)) if found else None

    def _is(self, value: Any, factor: Any) -> bool:
        if isinstance(factor, Ref):
            recording = self.trace.recording
            known = isinstance(value, torch.Tensor) and recording.known(value)
            return known and recording.number(value) == factor.value
        return isinstance(value, float) and abs(value - factor) <= 1e-6 * abs(factor)

    # --- norms and order ----------------------------------------------------------------------------------------------

    def _norms_around(self, attention: Term | None, mlp: Term | None, way: list[Step]) -> None:
        """The norms that the stream goes into, before the branches or behind them."""
        kinds = [step.kind for step in way]
        if kinds == ["add", "norm", "add", "norm"]:
            norms = [step.norm for step in way if step.kind == "norm"]
            self.found.fields |= {"post_norm": True} | {
                role: self.relative(path or "") for role, path in zip(("ln1", "ln2"), norms, strict=True)
            }
            return
        if "norm" in kinds:
            reason = "norms stand in the residual stream itself, in an order that is not known"
            self.found.fields["extra"] = reason
            self.found.refuse(reason, *INNER)
        for role, term in (("ln1", attention), ("ln2", mlp)):
            if term is not None:
                self._norm_before(role, term)

    def _norm_before(self, role: str, term: Term) -> None:
        assert term.step is not None
        inside = self._within(term)
        streams = {self.flow.root(value) for value in (term.step.before, self.pre)}
        readers = [call for call in self.inner if call.input is not None and self.flow.root(call.input) in streams]
        readers = [call for call in readers if call.output in inside]
        norms = [call for call in readers if call.path in self.trace.norms]
        known = [call for call in norms if self.trace.norms[call.path].obstacle is None]
        if known:
            call = max(known, key=lambda call: call.start)
            self.found.fields[role] = self.relative(call.path)
            self._gated(role, call, term)
            return
        if any(call.path == term.module for call in readers):
            return
        # Whatever stands there, what reads it does not read the stream.
        self.found.fields["gated_norms"] = True
        own = OWN_INPUTS if role == "ln1" else (f"{BLOCK}hook_mlp_in",)
        self.found.refuse(self._unknown_norm(readers, norms), f"{BLOCK}{role}.", *own)

    def _unknown_norm(self, readers: list[Call], norms: list[Call]) -> str:
        """Why what the stream goes into is no norm that is known."""
        if norms:
            return f"{self.relative(norms[0].path)} is a norm, but {self.trace.norms[norms[0].path].obstacle}"
        if readers:
            return f"{self.relative(readers[0].path)} computes neither LayerNorm nor RMSNorm"
        return "no module is given the residual stream there"

    def _gated(self, role: str, norm: Call, term: Term) -> None:
        """Whether something stands between a norm and what reads it."""
        fields = self.found.fields
        readers = {"ln1": ("attn", "attn_branch", "q", "k", "v", "qkv"), "ln2": ("mlp", "mlp_branch", "mlp_in", "gate")}
        paths = {f"{self.call.path}.{fields[each]}" for each in readers[role] if fields.get(each)} | {term.module}
        if not any(self.flow.same(call.input, norm.output) for call in self.inner if call.path in paths):
            fields["gated_norms"] = True

    def _order(self, attention: Term | None, mlp: Term | None) -> None:
        """Whether the MLP reads what attention wrote, and where the stream between them is to be had."""
        fields = self.found.fields
        if attention is None or mlp is None or attention.step is None or mlp.step is None:
            return
        middle = attention.step.after
        inside = self.flow.ancestors(mlp.value, {middle}, self.call.start)
        if middle not in inside and self.flow.root(middle) not in inside:
            if attention.step is not mlp.step and mlp.step.time < attention.step.time:
                self.found.refuse("attention comes after the MLP", f"{BLOCK}hook_resid_mid")
            fields["parallel"] = True
            return
        if not fields.get("post_norm"):
            self._middle(mlp)

    def _middle(self, mlp: Term) -> None:
        """A module whose input is the stream between attention and MLP, in the memory that the stream goes on in."""
        assert mlp.step is not None
        fields, memory = self.found.fields, self.trace.recording.memory
        stream = mlp.step.before
        readers = [
            self.relative(call.path)
            for call in self.inner
            if self.flow.same(call.input, stream) and memory[call.input or 0] == memory[stream]
        ]
        reader = fields["ln2"] if fields["ln2"] is not None else fields["mlp"]
        if reader in readers:
            return
        if readers:
            fields["middle"] = readers[0]
        else:
            self.found.refuse(
                "no module is given the residual stream between attention and MLP", f"{BLOCK}hook_resid_mid"
            )

    def _extra(self, way: list[Step], others: list[Term]) -> None:
        """What else happens to the stream, in words."""
        words = []
        names = [self.relative(term.module) if term.module else "something that no module returns" for term in others]
        if names:
            words.append(f"{' and '.join(dict.fromkeys(names))} {'is' if len(names) == 1 else 'are'} added, too")
        if any(step.kind == "factor" for step in way):
            words.append("the residual stream itself is multiplied by a factor")
        if words:
            self.found.fields["extra"] = "; ".join(filter(None, [self.found.fields.get("extra"), *words]))
