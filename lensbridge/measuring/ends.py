"""How does the residual stream begin and end: embedding, positions, final norm, head?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .findings import Findings
from .projections import affine_calls
from .recording import Call, Op, Ref, Value
from .stream import FACTORS, Term, Trace

#: Operations that pick tokens out of the stream.
PICKS = frozenset("slice select index narrow".split())


class NoStream(Exception):
    """The model has no residual stream from an embedding to a head; the message says what is missing."""


def read_start(trace: Trace, first: Call) -> Findings:
    """The fields of `Architecture` around the embedding, which leads to the first layer's input.

    Raises:
        NoStream: if the tokens' embedding is not found.
    """
    found = Findings()
    assert first.input is not None
    calls = [call for call in trace.recording.calls if call.end <= first.start]
    tables = [call for call in calls if isinstance(trace.recording.module(call.path), nn.Embedding)]
    tokens = [call for call in tables if _looked_up_by_tokens(trace, call)]
    if not tokens:
        raise NoStream("no torch.nn.Embedding is called with the tokens before the first layer")
    terms = trace.terms(first.input, [call for call in calls if call in tables or _is_table(trace, call)])
    by_path = {term.module: term for term in terms if term.module is not None}
    embedding = next((by_path[call.path] for call in tokens if call.path in by_path), None)
    if embedding is None:
        raise NoStream(f"what enters the first layer is not the output of {tokens[0].path!r} with something added")
    found.fields["embed"] = embedding.module
    _between(trace, embedding, terms, found)
    positions = [term for term in terms if term.module is not None and term is not embedding]
    _positions(trace, positions, found)
    return found


def _is_table(trace: Trace, call: Call) -> bool:
    """Whether a module looks its output up in a weight of its own."""
    weight = getattr(trace.recording.module(call.path), "weight", None)
    return isinstance(weight, Tensor) and any(
        op.name == "embedding" for op in trace.recording.ops[call.start : call.end]
    )


def _looked_up_by_tokens(trace: Trace, call: Call) -> bool:
    tokens = trace.flow.tensor(trace.recording.tokens)
    return any(torch.equal(trace.flow.tensor(value).to(tokens.dtype), tokens) for value in call.inputs)


def _between(trace: Trace, embedding: Term, terms: list[Term], found: Findings) -> None:
    """What stands between the embedding's table and the stream."""
    module: Any = trace.recording.module(embedding.module or "")
    if len(embedding.norms) == 1 and len(trace.calls[embedding.norms[0]]) == 1:
        found.fields["embed_norm"] = embedding.norms[0]
        others = [term for term in terms if term.module is not None and term is not embedding]
        found.fields["embed_norm_of_sum"] = any(term.norms == embedding.norms for term in others)
    elif embedding.norms:
        found.refuse(f"{embedding.norms[0]} is called more than once", "embed.ln.")
    if len(embedding.factors) == 1:
        found.fields["embed_factor"] = _attribute(trace, embedding.factors[0])
    if embedding.factors and found.fields.get("embed_factor") is None:
        found.refuse("it is multiplied by something that is no attribute of a module", "hook_embed")
    rows = module.weight[trace.flow.tensor(trace.recording.tokens)]
    given = trace.flow.tensor(embedding.value)
    scale = (given.double().norm() / rows.double().norm()).item()
    if abs(scale - 1) > 1e-4:
        names = [name for name, value in module.named_buffers() if value.numel() == 1]
        names += [name for name, value in vars(module).items() if isinstance(value, float)]
        held = [name for name in names if abs(float(getattr(module, name)) / scale - 1) < 1e-2]
        if held:
            found.fields["embed_scale"] = held[0]
        else:
            found.refuse("its factor is no attribute of the embedding", "hook_embed")


def _attribute(trace: Trace, factor: Any) -> str | None:
    """Where a factor is stored, from the root of the model."""
    for name, module in trace.recording.model.named_modules():
        for attribute, value in {**vars(module), **module._parameters, **module._buffers}.items():
            path = f"{name}.{attribute}" if name else attribute
            if isinstance(factor, Ref) and isinstance(value, Tensor) and trace.recording.known(value):
                if trace.recording.number(value) == factor.value:
                    return path
            elif isinstance(value, float) and not isinstance(factor, Ref) and abs(value - factor) <= 1e-6 * abs(factor):
                return path
    return None if isinstance(factor, Ref) else _config_attribute(trace.recording.model.config, factor)


def _config_attribute(config: Any, factor: float) -> str | None:
    """Where a number is in a config, properties of its class included."""
    properties = [name for name, value in inspect.getmembers(type(config)) if isinstance(value, property)]
    for name in (*vars(config), *properties):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value and abs(value - factor) <= 1e-6 * abs(factor):
            return f"config.{name}"
    return None


def _positions(trace: Trace, terms: list[Term], found: Findings) -> None:
    """The learned positions and the types of tokens among what is added to the embedding."""
    length, extra = trace.flow.shape(trace.recording.tokens)[1], []
    for term in terms:
        call = trace.calls[term.module or ""][0]
        lookups = [op for op in trace.recording.ops[call.start : call.end] if op.name == "embedding"]
        rows = trace.flow.tensor(lookups[-1].inputs[1]).flatten().cpu() if lookups else torch.empty(0)
        first = int(rows[0]) if len(rows) else 0
        if torch.equal(rows[:length], torch.arange(first, first + length)):
            counted = trace.flow.depends(lookups[-1].inputs[1], {trace.recording.tokens})
            found.fields |= {"pos_embed": term.module, "pos_after_padding": counted}
            found.fields["pos_offset"] = 0 if counted else first
        elif len(rows) and not rows.any():
            found.fields["type_embed"] = term.module
        else:
            extra.append(term.module or "")
    if extra:
        found.fields["embed_extra"] = f"{' and '.join(extra)} is added to it"
        if "pos_embed" not in found.fields:
            found.refuse(f"{' and '.join(extra)} is no table with a row for each position", "hook_pos_embed")


def read_end(trace: Trace, last: Call) -> Findings:
    """The fields of `Architecture` from the last layer's output to the logits.

    Raises:
        NoStream: if no projection gives the logits.
    """
    found = Findings()
    if trace.recording.logits < 0:
        raise NoStream("its forward pass returns no logits")
    after = [call for call in affine_calls(trace, trace.recording.calls) if call.start >= last.end]
    heads = {trace.flow.root(call.output): call for call in after if call.output is not None}
    head, steps = _head(trace, heads)
    found.fields["unembed"] = head.path
    if steps:
        found.fields["after_unembed"] = "factor" if all(op.name in FACTORS for op in steps) else "cap"
    assert last.output is not None and head.input is not None
    reads: Value | None = head.input
    between = [call for call in trace.recording.calls if call.start >= last.end and trace.flow.same(call.output, reads)]
    between = [call for call in between if call.path not in trace.norms and call.path != head.path]
    own = [call for call in between if call.input is not None and not trace.flow.same(call.input, call.output)]
    # Or the head is a module that ends with the projection.
    later = [call for call in trace.recording.calls if last.end <= call.start <= head.start and head.end <= call.end]
    if not trace.flow.same(reads, last.output):
        ends = [last.output, *(norm.output for norm in trace.norm_inputs.get(trace.flow.root(last.output), ()))]
        reads_end = [call for call in later if any(trace.flow.same(call.input, end) for end in ends)]
        own += [call for call in reads_end if call.path != head.path]
    if own:
        found.fields["head"], reads = own[0].path, own[0].input
    assert reads is not None
    norm, divisor = _before_head(trace, reads)
    if norm is None or not trace.flow.same(norm.input, last.output):
        if not trace.flow.same(_unpicked(trace, reads), last.output):
            raise NoStream(f"{(own or [head])[0].path!r} does not read the last layer's output, or a norm of it")
        found.fields["ln_final"] = None
        return found
    fact = trace.norms[norm.path]
    found.fields["ln_final"] = norm.path
    if fact.obstacle is not None:
        raise NoStream(f"{norm.path!r} norms the residual stream at its end, but {fact.obstacle}")
    if divisor is not None:
        path = _attribute(trace, 1 / divisor if isinstance(divisor, (int, float)) else divisor)
        if path is None:
            raise NoStream("the final norm's output is multiplied by something that is no attribute of a module")
        found.fields["unembed_divisor"] = path
    return found


def _head(trace: Trace, heads: dict[Value, Call]) -> tuple[Call, list[Op]]:
    """(the projection that gives the logits, what is done to its output)."""
    value, steps = trace.recording.logits, list[Op]()
    for _ in range(50):
        value = trace.flow.root(value)
        if value in heads:
            return heads[value], steps
        op = trace.flow.maker(value)
        if op is None:
            break
        if op.name not in PICKS:
            steps.append(op)
        value = _largest(trace, op)
    raise NoStream("no module with a weight of its own gives the logits")


def _largest(trace: Trace, op: Op) -> Value:
    return max(op.inputs, key=lambda value: trace.flow.tensor(value).numel()) if op.inputs else op.outputs[0]


def _before_head(trace: Trace, value: Value) -> tuple[Call | None, Any]:
    """(the norm that the head reads, the factor in between)."""
    factor: Any = None
    for each, step in _back(trace, value):
        norm = trace.norm_outputs.get(each)
        if norm is not None:
            return norm, factor
        factor = step if step is not None else factor
    return None, None


def _unpicked(trace: Trace, value: Value) -> Value:
    return [each for each, _ in _back(trace, value)][-1]


def _back(trace: Trace, value: Value) -> Iterator[tuple[Value, Any]]:
    """A value and those that it was picked out of or multiplied from, each with the factor that leads on from it."""
    for _ in range(20):
        value = trace.flow.root(value)
        op = trace.flow.maker(value)
        if op is None or op.name not in (*PICKS, *FACTORS):
            yield value, None
            return
        source = op.inputs[0]
        factor = trace.flow.factor_of(op, source) if op.name in FACTORS else None
        if op.name in FACTORS and factor is None:
            yield value, None
            return
        inverse = op.name.startswith("div") and isinstance(factor, (int, float))
        yield value, 1 / factor if inverse and factor else factor
        value = source
