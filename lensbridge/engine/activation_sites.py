"""Which function makes an MLP's activations of what goes into it?

Where HuggingFace calls a module for it, `mlp.hook_post` need not be kept beside `mlp.hook_pre`: what a run sees is that
the module was given the very tensor that is kept, and that what it returned went on, times the other half where the MLP
is gated. If so, the module's function makes the activations when somebody looks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from .keeping import same
from .passage import Event
from .places import AnyPlace, Place
from .sites import PlainSite, Run

#: Where functions are defined that do the same each time; those of torch are a few more.
_HOME = activations.__name__
_RANDOM = (nn.RReLU,)
#: Attributes of any module, besides those with an underscore.
_OTHERS = ("forward", "training")


class ActivationSite(PlainSite):
    """``mlp.hook_post``.

    Args:
        pre: where what goes into the function is.
        linear: where the other half is, if the MLP is gated.
    """

    place: Place

    def __init__(self, name: str, place: Place, pre: PlainSite, linear: PlainSite | None = None) -> None:
        super().__init__(name, place)
        #: The module with the function, its attributes, and its function with these.
        self._known: tuple[nn.Module, dict[str, Any], Callable[..., Tensor]] | None = None
        self.pre = pre
        self.linear = linear
        self.follows = (*pre.names, *(() if linear is None else linear.names))

    def derives_from(self, wanted: Collection[str], flow: Mapping[Event, int]) -> tuple[AnyPlace, ...]:
        kept = [site for site in (self.pre, self.linear) if site is not None]
        into = flow.get(self.pre.place.event)
        if into is None or not all(name in wanted for name in (*self.names, *self.follows)):
            return ()
        for (path, side, call), tensor in flow.items():
            if side == "input" and call == 0 and tensor == into and (path, side) != (self.place.path, self.place.side):
                made = flow.get((path, "output", 0))
                if (made == flow.get(self.place.event)) == (self.linear is None):
                    act = Place(path, "input"), Place(path, "output")
                    return (*act, *(site.place for site in kept))
        return ()

    def record(self, run: Run) -> None:
        function = self._function(run) if self in run.deriving else None
        halves = [run.sources.pop(name) for name in self.follows if name in run.sources]
        if function is None or len(halves) < len(self.follows):
            super().record(run)
        else:
            run.keep_made(self.names[0], function, *halves)

    def _function(self, run: Run) -> Callable[..., Tensor] | None:
        """What makes the value of what is kept, or None if that does not show."""
        given, made, pre, *others = (place.read(run.view) for place in run.deriving[self])
        value = self.place.read(run.view)
        module = run.view.module(run.deriving[self][0].path)
        if given is not pre or not _is_known(module):
            return None
        function = self._as_now(module)
        if not others:
            return function if made is value else None
        with torch.no_grad():
            product = made * others[0]
            return partial(_gated, function) if product.dtype == value.dtype and same(product, value) else None

    def _as_now(self, module: nn.Module) -> Callable[..., Tensor]:
        """The module's function, whatever becomes of the module before anybody looks."""
        own = {name: value for name, value in module.__dict__.items() if name[0] != "_" and name not in _OTHERS}
        if self._known is None or self._known[:2] != (module, own):
            self._known = module, own, partial(type(module).forward, copy.copy(module))
        return self._known[2]


def _gated(function: Callable[[Tensor], Tensor], pre: Tensor, linear: Tensor) -> Tensor:
    return function(pre) * linear


def _is_known(module: Any) -> bool:
    """Whether a module computes the same at any later time."""
    home = type(module).__module__
    known = home == _HOME or (home == "torch.nn.modules.activation" and not isinstance(module, _RANDOM))
    return known and not (module._parameters or module._buffers or module._modules)
