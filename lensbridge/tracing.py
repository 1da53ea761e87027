"""How is nnsight's way of writing used on the same model: ``with model.trace(prompt):``?

`TraceMethods` opens nnsight's traces on the model's own HuggingFace model. In the body the hook points have a
``value``, in the active basis, and ``model.envoy`` has nnsight's own paths. What a prompt may be, and how several
prompts become one batch, follows TransformerLens' rules, as in ``forward``.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .engine import Engine
from .engine.tracing import root_envoy, running_envoy
from .errors import TraceError, UnknownArgumentError, UnknownPointError, UnsupportedModelError, near_misses
from .hook_points import HookPoint
from .inputs import prepare, span_of
from .tokens import as_batch
from .utilities.components_utils import get_act_name
from .utilities.defaults_utils import LocallyOverridenDefaults
from .utilities.tokenize_utils import get_attention_mask

if TYPE_CHECKING:
    from .model import HookedTransformer

#: What an input may be accompanied by.
OPTIONS = ("prepend_bos", "padding_side", "attention_mask")

Invoke = tuple[tuple, dict[str, Any]]


class TraceMethods:
    """The methods of `HookedTransformer` that open nnsight's traces."""

    def trace(self, *input: Any, gradients: bool | None = None, **options: Any) -> Any:
        """A context whose body runs beside one forward pass of the model; nnsight's ``trace``, with hook points in it.

        In the body, ``model.blocks[3].hook_resid_post.value`` (or ``model.point("resid_post", 3).value``) waits for the
        value at a hook point, in the active basis; assigning to it, or editing the tensor in place, changes the rest of
        the forward pass. ``model.envoy`` has nnsight's own paths: ``model.envoy.transformer.h[3].mlp.output``. Values
        come in the order of the forward pass. What is to outlive the body is kept by ``.save()`` or ``nnsight.save``.
        Without an input, each ``with tracer.invoke(input):`` inside brings its own and sees its own rows.

            with model.trace("Hello world") as tracer:
                pattern = model.blocks[0].attn.hook_pattern.value.save()
                model.blocks[1].hook_resid_post.value[:, -1] = 0
                logits = model.unembed.hook_out.value.save()

        Args:
            input: a text, a list of texts, or tokens ``[batch, pos]`` (or ``[pos]``).
            gradients: whether gradients at hook points are wanted, so that a value which is only read has to lie on the
                way to the logits. None finds out whether the body itself calls ``backward``.
            options: ``prepend_bos``, ``padding_side`` and ``attention_mask``, as for ``forward``.
        """
        model: Any = self
        return root_envoy(_traced(model), _Host(model)).trace(*input, gradients=gradients, **options)

    def session(self) -> Any:
        """A context around several traces, in which what one trace has computed is there for the next (nnsight's)."""
        return self.envoy.session()

    @property
    def envoy(self) -> Any:
        """nnsight's handle on the HuggingFace model; its parts have ``output`` and ``input`` while a trace runs."""
        model: Any = self
        engine = _traced(model)
        return running_envoy(engine) or root_envoy(engine, _Host(model))

    def _turn(self) -> AbstractContextManager:
        return self.interior.engine.turns  # type: ignore[attr-defined]

    def point(self, name: str, layer: int | None = None, layer_type: str | None = None) -> HookPoint:
        """A hook point by its name, or by its short name and layer as in `utils.get_act_name`.

        Raises:
            UnknownPointError: (a KeyError) there is no such hook point, with the closest names.
        """
        points: dict[str, HookPoint] = self.hook_dict  # type: ignore[attr-defined]
        full = name if name in points else get_act_name(name, layer, layer_type)
        if full not in points:
            raise UnknownPointError(f"{type(self).__name__} has no hook point {full!r}.{near_misses(full, points)}")
        return points[full]


def _traced(model: HookedTransformer) -> Engine:
    """The engine of a model that traces can be opened on."""
    if model.interior.service is not None:
        raise UnsupportedModelError(
            "this model is elsewhere, and traces are opened where a model is: use run_with_hooks, run_with_cache, "
            "run_sweep or generate, which are jobs; nnsight's own handle is model.interior.service.unloaded"
        )
    if not model.interior.can_be_traced:
        raise UnsupportedModelError(
            "a model that was made from a config has no traces, because nnsight's values belong to modules of "
            "HuggingFace's own: use run_with_hooks, hooks or run_with_cache, whose hook points are the same"
        )
    return model.interior.engine


class _Host:
    """The model as its traces know it; weakly, since the model holds what holds this."""

    def __init__(self, model: HookedTransformer) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> HookedTransformer:
        model = self._model()
        if model is None:
            raise TraceError("the HookedTransformer that this envoy was taken from is gone")
        return model

    @property
    def engine(self) -> Engine:
        return _traced(self.model)

    def points(self) -> Mapping[str, HookPoint]:
        return self.model.hook_dict

    def listeners(self) -> dict[str, nn.Module]:
        return self.model._listeners()

    def check(self, name: str) -> None:
        self.model._check_flag(name)

    def rows(self, *input: Any, **options: Any) -> int:
        if unknown := sorted(options.keys() - set(OPTIONS)):
            raise UnknownArgumentError(f"{', '.join(unknown)}: a trace takes an input, and {', '.join(OPTIONS)}")
        if len(input) > 1:
            raise TypeError(f"a trace (or an invoke) takes one input, not {len(input)}: a list of texts is one")
        if not input:
            return 0
        if isinstance(input[0], (str, list)):
            return 1 if isinstance(input[0], str) else len(input[0])
        return as_batch(input[0]).shape[0]

    def assemble(self, invokes: list[Invoke], options: dict[str, Any]) -> dict[str, Any]:
        model = self.model
        side, prepend = options.get("padding_side"), options.get("prepend_bos")
        with LocallyOverridenDefaults(model, prepend_bos=prepend, padding_side=side):
            if len(invokes) == 1:
                (input,), given = invokes[0]
                given = options | given
            else:
                input, given = _together(model, [(one[0], options | own) for one, own in invokes])
            return _arguments(model, input, given)


def _arguments(model: HookedTransformer, input: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What HF's forward is called with."""
    prepend, side = options.get("prepend_bos"), options.get("padding_side")
    with LocallyOverridenDefaults(model, prepend_bos=prepend, padding_side=side):
        span = span_of(model.cfg.n_layers, None, None, "logits")
        mask = options.get("attention_mask")
        call = prepare(model, model.interior.basis, input, span, prepend, None, mask, None)
    inputs = call.request.inputs
    # nnsight tells what belongs to an invoke by the number of rows, so that positions need a row for each.
    first, length = model.interior.counts_from, inputs["input_ids"].shape[1]
    positions = torch.arange(first, first + length, device=inputs["input_ids"].device)
    return {"position_ids": positions.expand(inputs["input_ids"].shape)} | inputs


def _together(model: HookedTransformer, invokes: list[tuple[Any, dict[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
    """(tokens of all invokes, padded to one length, options): as if all had been given as one list."""
    tokens, masks = [], []
    padded_left = model.tokenizer is not None and model.tokenizer.padding_side == "left"
    masked = padded_left or any(options.get("attention_mask") is not None for _, options in invokes)
    for input, options in invokes:
        prepend = options.get("prepend_bos", model.cfg.default_prepend_bos)
        if isinstance(input, (str, list)):
            input = model.to_tokens(input, prepend_bos=options.get("prepend_bos"))
        tokens.append(as_batch(input).to(model.cfg.device))
        mask = options.get("attention_mask")
        masks.append(get_attention_mask(model.tokenizer, tokens[-1], prepend) if mask is None else mask)
    length = max(one.shape[1] for one in tokens)
    if any(one.shape[1] < length for one in tokens) and model.tokenizer is None:
        raise ValueError("invokes of different lengths need a pad token, and the model has no tokenizer")
    pad = 0 if model.tokenizer is None else model.tokenizer.pad_token_id
    batch = torch.cat([_padded(one, length, pad, padded_left) for one in tokens])
    if not masked:
        return batch, {}
    return batch, {"attention_mask": torch.cat([_padded(one, length, 0, padded_left) for one in masks])}


def _padded(rows: Tensor, length: int, value: int, left: bool) -> Tensor:
    missing = length - rows.shape[1]
    return torch.nn.functional.pad(rows, (missing, 0) if left else (0, missing), value=value)
