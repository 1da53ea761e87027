"""How does one component of the model run by itself?

As part of the HF model: a trace on that module alone, with the sites that lie inside it. Inputs and outputs are in the
active basis, like everything that enters or leaves the engine.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from transformers import Cache

from ..basis import Stream
from ..errors import UnsupportedModelError
from .kv import append_new, hf_cache
from .places import Place, View
from .plan import Listeners, Plan, Span, edits_of
from .sites import Run
from .turns import in_turn

if TYPE_CHECKING:
    from .run import Engine


def run_mlp(engine: Engine, layer: int, x: Tensor, listeners: Listeners) -> Tensor:
    """One layer's MLP on the output of its norm; an MLP that is a module."""
    arch = engine.architecture
    if arch.blocks[layer].beside is not None:
        raise UnsupportedModelError(
            f"the MLP of layer {layer} does not run by itself: there are experts beside it, which read the residual "
            "stream through another norm. Run the block, or the model with start_at_layer and stop_at_layer."
        )
    path, block = arch.in_layer(layer, "mlp"), arch.blocks[layer]
    normed = block.ln2 is not None and not block.post_norm
    hidden = engine.basis.norm_output_as_hf(x, engine.norms[arch.in_layer(layer, "ln2")]) if normed else x
    hidden = hidden.contiguous()
    # Where the MLP adds the stream itself, there is none.
    adds = "residual" in _signature(engine.hf_model.get_submodule(path)).parameters
    kwargs = {"residual": torch.zeros_like(hidden)} if adds else {}
    output = _run_module(engine, layer, path, hidden, kwargs, listeners, {})
    return Stream(engine.basis.centres_stream).read_branch(output)


def run_attention(
    engine: Engine,
    layer: int,
    inputs: dict[str, Tensor],
    listeners: Listeners,
    past_kv_cache_entry: Any = None,
    additive_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """One layer's attention on what its queries, keys and values read ("q", "k", "v"), with or without a head axis."""
    arch, basis = engine.architecture, engine.basis
    normed = arch.blocks[layer].ln1 is not None and not arch.blocks[layer].post_norm
    norm = engine.norms[arch.in_layer(layer, "ln1")] if normed else None

    def as_hf(value: Tensor) -> Tensor:
        return value if norm is None else basis.norm_output_as_hf(value, norm)

    query = inputs["q"]
    hidden = as_hf(query if query.dim() == 3 else query[..., 0, :])
    own = {letter: as_hf(value) for letter, value in inputs.items() if value is not query or query.dim() == 4}
    past = 0 if past_kv_cache_entry is None else past_kv_cache_entry.past_keys.shape[1]
    if _reads_more(engine, layer):
        if past_kv_cache_entry is not None:
            raise UnsupportedModelError(
                "attention that rotates queries and keys, or has ALiBi, is told positions by the model, and by itself "
                "it counts from 0: run the model with past_kv_cache"
            )
        kwargs = _what_the_model_passes(engine, layer, hidden, attention_mask)
    else:
        kwargs = {"attention_mask": causal_mask(hidden, past, attention_mask)}
    if additive_attention_mask is not None:
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = additive_attention_mask if mask is None else mask + additive_attention_mask
    entries = {} if past_kv_cache_entry is None else {layer: past_kv_cache_entry}
    if entries:
        kwargs["past_key_values"] = hf_cache(entries, basis)
    output = _run_module(engine, layer, arch.in_layer(layer, "attn"), hidden.contiguous(), kwargs, listeners, own)
    if entries:
        append_new(entries, kwargs["past_key_values"], basis)
    return Stream(basis.centres_stream).read_branch(output)


def _reads_more(engine: Engine, layer: int) -> bool:
    """Whether one layer's attention takes more than what it reads, a mask and a cache: rotations or slopes."""
    module = engine.hf_model.get_submodule(engine.architecture.in_layer(layer, "attn"))
    parameters = list(_signature(module).parameters.values())[1:]
    asked = [each for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    rotates = "rotary" in engine.architecture.blocks[layer].features
    return rotates or any(each.name not in ("attention_mask", "past_key_values") for each in asked)


def _signature(module: Any) -> inspect.Signature:
    """What a module's class takes: in a run, the module's own attribute is somebody's wrapper."""
    signature = inspect.signature(type(module).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@in_turn
def _what_the_model_passes(engine: Engine, layer: int, hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """The arguments besides the first that HF's model calls one layer's attention with, on a stream of zeros."""
    module = engine.hf_model.get_submodule(engine.architecture.in_layer(layer, "attn"))
    signature, found = _signature(module), dict[str, Any]()

    def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        names = list(bound.arguments)[1:]
        for name in names:
            value = bound.arguments[name]
            found.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        # The cache that the model has made for this run is full already.
        found.update({name: None for name, value in found.items() if isinstance(value, Cache)})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with engine.eager_attention(), torch.no_grad():
            engine.run_block(layer, torch.zeros_like(hidden), {}, mask)
    finally:
        handle.remove()
    return found


def causal_mask(hidden: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """HF's additive mask for causal attention: 0 where a query may attend, the smallest finite number elsewhere."""
    length = hidden.shape[1]
    keep = torch.ones(length, past + length, dtype=torch.bool, device=hidden.device).tril(past)
    keep = keep.expand(hidden.shape[0], 1, -1, -1)
    if attention_mask is not None:
        keep = keep & attention_mask[:, None, None, :].bool()
    smallest = torch.finfo(hidden.dtype).min
    return torch.zeros(keep.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~keep, smallest)


@in_turn
def _run_module(
    engine: Engine,
    layer: int,
    path: str,
    hidden: Tensor,
    kwargs: dict[str, Any],
    listeners: Listeners,
    own: dict[str, Tensor],
) -> Tensor:
    """Call the HF module at ``path`` with its hook points firing; returns its (first) output, in HF's basis.

    ``own`` holds what q, k or v read instead of the module's input.
    """
    span = Span(layer, layer + 1, embeds=False, norm=False, unembeds=False)
    given = tuple(f"blocks.{layer}.hook_{letter}_input" for letter in own)
    edits = edits_of(listeners)
    plan = engine.plan_for(edits, span, below=path, given=given)
    # The mask is eager attention's.
    eager = "attention_mask" in kwargs
    if not plan.sites:
        with engine.eager_attention(eager):
            output = engine.hf_model.get_submodule(path)(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output
    with engine.wrapped(plan) as view, engine.eager_attention(eager or plan.needs_eager):
        run = engine.new_run(view, listeners, edits, batch_size=hidden.shape[0])
        run.inputs = {(layer, letter): value for letter, value in own.items()}
        view.calls_before = engine.architecture.call(layer)
        try:
            with run.explaining():
                return _trace_part(view, path, hidden, kwargs, run, plan)
        finally:
            view.calls_before = 0


def _trace_part(view: View, path: str, hidden: Tensor, kwargs: dict[str, Any], run: Run, plan: Plan) -> Tensor:
    part = view[path]
    with part.trace(hidden, **kwargs):
        output = nnsight.save(_walk_part(view, path, run, plan))
    return output


def _walk_part(view: View, path: str, run: Run, plan: Plan) -> Tensor:
    for site in plan.sites:
        site.visit(run)
    return Place(path, "output").read(view)
