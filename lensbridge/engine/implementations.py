"""Which layers compute attention eagerly, in a run that is to see their scores or pattern?

Where the model uses sdpa and only some layers' squares are cached, these layers alone: a layer's attention reads the
implementation from its config and a mask from its arguments, and both can be its own for the time of a run. All other
layers go on as the user has chosen, in sdpa's memory, which matters on long contexts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .places import ArgumentPlace, ResultPlace, RotatedPlace, SoftmaxPlace
from .sites import Site


def alone(hf_model: Any, sites: Iterable[Site], attentions: Iterable[str]) -> list[nn.Module] | None:
    """The attention modules that have to be eager for these sites; None if that goes for the whole model only."""
    inside = (SoftmaxPlace, RotatedPlace, ArgumentPlace, ResultPlace)
    paths = {site.place.path for site in sites if isinstance(site.place, inside)}
    modules = [hf_model.get_submodule(path) for path in paths]
    if hf_model.config._attn_implementation != "sdpa" or paths.issuperset(attentions):
        return None
    return modules if all(map(_decides_by_itself, modules)) else None


def _decides_by_itself(module: Any) -> bool:
    """Whether a layer reads the implementation from a config and is given a mask, which is a causal one if not."""
    config = getattr(module, "config", None)
    takes = "attention_mask" in inspect.signature(type(module).forward).parameters
    return (
        takes and getattr(config, "_attn_implementation", None) == "sdpa" and getattr(module, "is_causal", None) is True
    )


@contextmanager
def eager(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The time in which these attention modules are eager, and no others."""
    with ExitStack() as stack:
        for module in modules:
            before = module.__dict__["config"]
            # The configs of parts stay the model's own.
            mine = copy.copy(before)
            mine._attn_implementation_internal = "eager"
            stack.callback(module.__dict__.__setitem__, "config", before)
            module.__dict__["config"] = mine
            handle = module.register_forward_pre_hook(_with_eager_mask, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _with_eager_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with sdpa's mask, which may be none for a causal one, as eager attention takes it."""
    hidden: Tensor = next(iter((*args, *kwargs.values())))
    position = list(inspect.signature(type(module).forward).parameters).index("attention_mask") - 1
    given = args[position] if position < len(args) else kwargs.get("attention_mask")
    mask = additive(given, hidden)
    if position < len(args):
        return (*args[:position], mask, *args[position + 1 :]), kwargs
    return args, kwargs | {"attention_mask": mask}


def additive(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """A mask to be added to scores, ``[batch, 1, query, key]``: 0 for what is attended to, else the smallest number."""
    if mask is None:
        length = hidden.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device).tril()
    if mask.dtype is not torch.bool:
        return mask
    zero = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(mask, zero, torch.finfo(hidden.dtype).min)
