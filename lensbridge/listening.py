"""Which hook points and modules take part in a run of a `HookedTransformer`?

Points with hooks on them, as long as their flag is on, and modules that the user has put into the tree (`splicing`).
Every run asks, so that the answer for none is looked up in lists that `setup` has collected.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .errors import DisabledPointError
from .hook_points import HookPoint
from .hooked_root_module import HookedRootModule
from .interior import listening
from .points import FLAG_SETTERS, point_of
from .splicing import Splices


class ListeningMethods(HookedRootModule):
    """The facade's methods about who listens."""

    cfg: Any
    interior: Any
    #: The names of the components.
    _components: list[str]

    def setup(self) -> None:
        """Name the modules and find the hook points, and modules that were put in a hook point's place."""
        super().setup()
        known = ((name, point_of(name)) for name in self.hook_dict)
        #: The flag of each point that has one.
        self._flags = {name: point.flag for name, point in known if point is not None and point.flag}
        # Every run asks whether there is a hook at all: one look at the lists themselves.
        self._hook_lists = [h for p in self.hook_points() for h in (p.fwd_hooks, p.bwd_hooks, p._forward_hooks)]
        self._ours = self.interior.points()
        self._find_splices()

    def _find_splices(self) -> None:
        """Find the modules that were put in a place of the tree, and the hook points that only they call."""
        served = self.interior.served(self.hook_dict)
        tree = dict(self.named_modules())
        self._splices = Splices.of(tree, served, self._components, self.interior)
        inside = {name for name in self.hook_dict if self._splices.inside(name)}
        self._foreign = (self.hook_dict.keys() - served) | inside
        self._spliced = self._splices.in_points
        self.interior.rearranged = False

    def _listeners(self) -> dict[str, nn.Module]:
        if self.interior.rearranged:
            self._find_splices()
        spliced = self._splices.listeners()
        if not spliced and not any(self._hook_lists):
            return {}
        found = listening(self.hook_dict)
        for name in found.keys() & self._flags.keys():
            self._check_flag(name)
        # Hook points inside a spliced-in module fire when that module calls them.
        return {name: point for name, point in found.items() if name not in self._foreign} | spliced

    def __setattr__(self, name: str, value: Any) -> None:
        # A module that is put in a component's place takes part in the next run, set up or not.
        if isinstance(value, nn.Module) and name in self.__dict__.get("_modules", ()):
            self.interior.rearranged = True
        if name in self.__dict__ and isinstance(value, bool | int | None):
            # Past nn.Module's own, which looks for parameters and modules: every run sets a few.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _closest(self, name: str) -> str:
        number = re.match(r"blocks\.(-?\d+)\.", name)
        n_layers = self.cfg.n_layers
        layers = f" Its layers are 0 to {n_layers - 1}." if number and not 0 <= int(number[1]) < n_layers else ""
        return layers + super()._closest(name)

    def _why_absent(self, name: str) -> str:
        reason = self.interior.why_absent(name)
        return "" if reason is None else f": {reason}"

    def _check_flag(self, name: str) -> None:
        if not self._is_on(name):
            flag = self._flags[name]
            raise DisabledPointError(
                f"{name!r} is off, so a hook there would never fire: call model.{FLAG_SETTERS[flag]}(True) first "
                f"({flag})"
            )

    def _is_on(self, name: str) -> bool:
        flag = self._flags.get(name)
        return flag is None or bool(getattr(self.cfg, flag))

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: Any,
        dir: Any = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Refuse a hook on a point that its flag turns off.

        Raises:
            DisabledPointError: (a KeyError and an AssertionError) naming the setter to call.
        """
        self._check_flag(hook_point_name)
