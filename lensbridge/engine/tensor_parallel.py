"""Which values of a model are one process's part of a larger one, and how are they put together for a run?

Under transformers' tensor parallelism (Shoeybi et al. 2019, Megatron-LM) each process has some heads of each attention
and some neurons of each MLP; the residual stream is whole everywhere. transformers wraps the forwards of the linear
layers, and in a run of ours nnsight's handles are outside of these wrappers: what a handle sees is what modules give
each other. So only what lies between a projection that divides and the one that adds up has to be gathered before it
is shown, and divided again behind that; nnsight does both around a visit, by the rules here. A gathering is something
that all processes take part in: they have to run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnsight.intervention.fragments import Fragments
from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.source import BODY_FORWARD
from nnsight.modeling.tp import device_mesh, gather, shard
from torch import Tensor

from ..architectures import Architecture
from ..errors import UnsupportedModelError
from ..whole import style_of

#: Styles of transformers' plans after whose wrappers what a module returns is divided by its last axis.
DIVIDES = frozenset({"colwise"})
#: Those that expect their input divided.
ADDS_UP = frozenset({"rowwise"})
#: Those between which everything is whole.
WHOLE = frozenset(
    "colwise_gather_output colwise_rep rowwise_split_input rowwise_rep embedding_rowwise embedding_colwise "
    "replicated_with_grad_allreduce moe_tp_experts all_reduce mla_kv_a_proj replicate".split()
)

#: Families of which transformers 5.22.2 itself computes something else when they are divided, without an error.
MISCOMPUTED = {
    "gemma3n_text": "its MLPs keep the largest of all neurons, and each process would keep the largest of its own",
    "hrm_text": "the parts of its fused projections that processes load are not those that they compute with",
}

#: Moves a tensor between its part and the whole, along an axis.
Move = Callable[[Tensor, int], Tensor]
#: Applies a move to those tensors of a value that are divided.
Rule = Callable[[Any, Move], Any]


def is_divided_among_processes(hf_model: Any) -> bool:
    """Whether several processes hold one model together."""
    return device_mesh(hf_model) is not None


def heads_are_divided(hf_model: Any, architecture: Architecture, layer: int) -> bool:
    """Whether each process computes some of a layer's heads only."""
    if not is_divided_among_processes(hf_model):
        return False
    block = architecture.blocks[layer]
    roles = [role for role in ("o", "qkv", "q") if getattr(block, role) is not None]
    if not roles:
        return False
    style = style_of(hf_model, architecture.in_layer(layer, roles[0]))
    return style in (ADDS_UP if roles[0] == "o" else DIVIDES)


def gather_heads(hf_model: Any, value: Tensor, axis: int = 1) -> Tensor:
    """All heads, from those of this process."""
    return gather(hf_model, value, axis)


def divide_heads(hf_model: Any, value: Tensor, axis: int = 1) -> Tensor:
    """The heads of this process, from all."""
    return shard(hf_model, value, axis)


def refuse_unknown_styles(hf_model: Any) -> None:
    """Refuse a divided model of which it is not known what its modules give each other.

    Raises:
        UnsupportedModelError: a style of its plan is unknown here, experts are spread over processes, or transformers
            computes something else.
    """
    if not is_divided_among_processes(hf_model):
        return
    family = hf_model.config.get_text_config(decoder=True).model_type
    if family in MISCOMPUTED:
        raise UnsupportedModelError(f"transformers' plan for {family!r} gives other logits: {MISCOMPUTED[family]}")
    settings = getattr(hf_model.config, "distributed_config", None)
    if getattr(settings, "ep_size", 1) > 1 or getattr(settings, "pp_size", 1) > 1:
        raise UnsupportedModelError(
            "this model's experts or layers are spread over processes (ep_size, pp_size), where a process does not "
            "come by all values: divide it with tp_size alone"
        )
    for path, module in hf_model.named_modules():
        style = style_of(hf_model, path)
        if style is not None and _is_wrapped(module) and style not in DIVIDES | ADDS_UP | WHOLE:
            raise UnsupportedModelError(
                f"{path!r} is divided among processes in the style {style!r}, of which it is not known here what the "
                f"module is given and returns (known: {', '.join(sorted(DIVIDES | ADDS_UP | WHOLE))})"
            )


def _is_wrapped(module: Any) -> bool:
    """Whether transformers has put its wrapper around a module's forward."""
    return ".install_forward.<locals>." in getattr(module.__dict__.get("forward"), "__qualname__", "")


class Parts(Fragments):
    """The places of one model at which a process holds a part, by nnsight's names for them."""

    def __init__(self, hf_model: Any, architecture: Architecture) -> None:
        self.enabled = True
        self.hf_model = hf_model
        self._rules: dict[str, Rule] = {}
        for path, module in hf_model.named_modules():
            style = style_of(hf_model, path)
            if style in DIVIDES and _is_wrapped(module):
                self._module(path, "output", -1)
            elif style in ADDS_UP and _is_wrapped(module):
                self._module(path, "input", -1)
        for layer in range(len(architecture.blocks)):
            if heads_are_divided(hf_model, architecture, layer):
                self._attention(architecture, layer)
            self._neurons(architecture, layer)

    def _module(self, path: str, side: str, axis: int) -> None:
        self._rules[f"model.{path}.{side}"] = _first_argument(axis) if side == "input" else _first(axis)

    def _attention(self, architecture: Architecture, layer: int) -> None:
        """What is between the projections of an attention: its heads are divided."""
        block, path = architecture.blocks[layer], architecture.in_layer(layer, "attn")
        if block.qk_norm_over == "head":
            for role in ("q_norm", "k_norm"):
                for side in ("input", "output") if getattr(block, role) is not None else ():
                    # What it norms is [batch, head, pos, d_head] or [batch, pos, head, d_head].
                    self._module(architecture.in_layer(layer, role), side, 1 if block.qk_norm_heads_first else 2)
        if block.values is not None:
            self._module(architecture.in_layer(layer, "values"), "output", 2)
        softmax = block.softmax
        if softmax.module is not None:
            for side in ("input", "output"):
                self._module(architecture.below(layer, softmax.module), side, 1)
        source = f"model.{path}.source"
        self._rules[f"{source}.{softmax.call}.{softmax.operation}.input"] = _first_argument(1)
        self._rules[f"{source}.{softmax.call}.{softmax.operation}.output"] = _first(1)
        first = block.query_argument
        self._rules[f"{source}.{softmax.call}.around.input"] = _arguments(range(first, first + 3))
        self._rules[f"{source}.{softmax.call}.around.output"] = _heads_and_pattern
        for stem in (softmax.queries, softmax.keys):
            if stem is not None:
                self._rules[f"{source}.{stem}.output"] = _all(1)

    def _neurons(self, architecture: Architecture, layer: int) -> None:
        """What is between the projections of an MLP, other than these."""
        block = architecture.blocks[layer]
        if block.mlp_out is None or style_of(self.hf_model, architecture.in_layer(layer, "mlp_out")) not in ADDS_UP:
            return
        for role in ("neuron_norm", "act"):
            for side in ("input", "output") if getattr(block, role) is not None else ():
                self._module(architecture.in_layer(layer, role), side, -1)

    # --- what nnsight asks --------------------------------------------------------------------------------------------

    def fragmented(self, location: str) -> bool:
        """Whether a process has a part of the value there."""
        return location in self._rules

    def whole(self, location: str, value: Any) -> tuple[Any, Any]:
        """The value put together, and how to divide what has become of it."""
        rule = self._rules[location]
        return rule(value, self._gather), lambda edited: rule(edited, self._divide)

    def split(self, location: str, whole: Any) -> Any:
        """The part of a value that was whole from the start."""
        rule = self._rules.get(location)
        return whole if rule is None else rule(whole, self._divide)

    def _gather(self, value: Tensor, axis: int) -> Tensor:
        return gather(self.hf_model, value, axis)

    def _divide(self, value: Tensor, axis: int) -> Tensor:
        return shard(self.hf_model, value, axis)


def _first(axis: int) -> Rule:
    """What a module returns, or the first of it."""

    def rule(value: Any, move: Move) -> Any:
        return type(value)((move(value[0], axis), *value[1:])) if isinstance(value, tuple) else move(value, axis)

    return rule


def _first_argument(axis: int) -> Rule:
    """What a module or a function is called with first."""

    def rule(value: Any, move: Move) -> Any:
        args, kwargs = value
        if args:
            return (move(args[0], axis), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: move(kwargs[name], axis)}

    return rule


def _arguments(numbers: range) -> Rule:
    """Queries, keys and values, with their heads behind the batch."""

    def rule(value: Any, move: Move) -> Any:
        args, kwargs = value
        return tuple(move(each, 1) if number in numbers else each for number, each in enumerate(args)), kwargs

    return rule


def _heads_and_pattern(value: Any, move: Move) -> Any:
    """What the function around the softmax returns: [batch, pos, head, d_head], and the pattern if there is one."""
    if not isinstance(value, tuple):
        return move(value, 2)
    heads, *rest = value
    return (move(heads, 2), *(move(each, 1) if isinstance(each, Tensor) else each for each in rest))


def _all(axis: int) -> Rule:
    """Each of the tensors that a function returns."""

    def rule(value: Any, move: Move) -> Any:
        return type(value)(move(each, axis) for each in value) if isinstance(value, tuple) else move(value, axis)

    return rule


class PartsInterleaver(Interleaver):
    """nnsight's, whose handles are outside of transformers' wrappers."""

    def instrument(self, envoy: Any) -> None:
        """Put a handle on a module."""
        with _wrapper_kept(envoy._module.__dict__):
            super().instrument(envoy)


@contextmanager
def _wrapper_kept(attributes: dict[str, Any]) -> Iterator[None]:
    """The time in which nnsight takes a module's own ``forward`` for what is to run behind its handle."""
    before = attributes.get(BODY_FORWARD)
    attributes[BODY_FORWARD] = True
    try:
        yield
    finally:
        if before is None:
            del attributes[BODY_FORWARD]
        else:
            attributes[BODY_FORWARD] = before
