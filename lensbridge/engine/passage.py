"""What does a forward pass of the HuggingFace model come by, in which order, and what does it change afterwards?

Both differ between families (attention before or beside the MLP, a sum made in place), so they are measured, once per
model, by a run on two tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: (path, "input" | "output" | "softmax"); (path, "several") where an output is something else than a tensor.
Where = tuple[str, str]
#: (path, moment, how often it had occurred before)
Event = tuple[str, str, int]


class Passage(NamedTuple):
    """The rank of each event, the places whose tensors are changed in place behind them, and which have the same one.

    Places with the same tensor have the same number in ``flow``.
    """

    order: dict[Event, int]
    overwritten: frozenset[Where]
    flow: dict[Event, int]


class _SoftmaxRecorder(TorchFunctionMode):
    """Notes when a softmax runs while an attention module does."""

    def __init__(self, events: list[Where], inside: list[str]) -> None:
        super().__init__()
        self.events = events
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and "softmax" in getattr(func, "__name__", ""):
            self.events.append((self.inside[-1], "softmax"))
        return func(*args, **(kwargs or {}))


def measure(hf_model: nn.Module, attention_paths: list[str], inputs: Mapping[str, Any]) -> Passage:
    """What a forward pass comes by.

    The model must be using eager attention for the softmax to be seen. Random state and modes are left as they were.

    Args:
        inputs: what to run the model on.
    """
    events: list[Where] = []
    seen: list[tuple[Where, Tensor, int]] = []
    inside: list[str] = []
    handles = []
    for path, module in hf_model.named_modules():
        if not path:
            continue

        def note(side: str, values: Any, path: str = path) -> None:
            events.append((path, side))
            first = next(iter(values), None) if isinstance(values, tuple | list) else values
            if isinstance(first, Tensor) and not first.is_inference():
                seen.append(((path, side), first, first._version))

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path, note: Any = note) -> None:
            note("input", (*args, *kwargs.values()))
            if path in attention_paths:
                inside.append(path)

        def leave(module: nn.Module, args: Any, output: Any, path: str = path, note: Any = note) -> None:
            note("output", output)
            if not isinstance(output, Tensor):
                events.append((path, "several"))
            if path in attention_paths:
                inside.pop()

        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    devices = {parameter.device for parameter in hf_model.parameters() if parameter.is_cuda}
    try:
        quiet = torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=devices)
        with quiet[0], quiet[1], quiet[2], _SoftmaxRecorder(events, inside):
            hf_model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    order: dict[Event, int] = {}
    times: Counter[Where] = Counter()
    for rank, where in enumerate(events):
        event = (*where, times[where])
        order[event] = rank
        times[where] += 1
    overwritten = frozenset(where for where, tensor, version in seen if tensor._version != version)
    # All of these tensors are alive, so that no two have one id.
    flow: dict[Event, int] = {}
    times.clear()
    for (path, side), tensor, _ in seen:
        flow[path, side, times[path, side]] = id(tensor)
        times[path, side] += 1
    return Passage(order, overwritten, flow)
