"""How does each intervention see only its own rows of a shared run?

A stand-in takes a hook point's place in the run. It cuts the value into blocks of rows, one per intervention, and
passes each block through the real point with that intervention's hooks on it, as in a run of its own: the hooks that
the model has anyway come first, ``hook`` is the real point, edits in place and returned tensors both count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import HookError
from ..hook_points import HookPoint, ReadOnlyHook
from .interventions import Intervention


class SharedPoint(HookPoint):
    """Stands for one point in a run whose rows belong to several interventions.

    Args:
        model: the model that is run.
        point: the hook point, or the module that was put in its place.
        heard: whether the model itself has hooks there, which every block of rows has to pass.
        hooks: number of the block -> the intervention's hooks at this point.
        blocks: how many blocks of rows there are.
    """

    model: Any
    point: Any
    hooks: Mapping[int, Sequence[Callable]]
    blocks: int
    shown: Sequence[int]

    def __init__(
        self, model: Any, point: nn.Module, heard: bool, hooks: Mapping[int, Sequence[Callable]], blocks: int
    ) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, which would make the point a child.
        shown = range(blocks) if heard else sorted(hooks)
        self.__dict__.update(model=model, point=point, hooks=hooks, blocks=blocks, shown=shown)

    @property
    def only_reads(self) -> bool:
        """Whether nobody at the real point, and no intervention, can change the value."""
        added = [hook for hooks in self.hooks.values() for hook in hooks]
        before = isinstance(self.point, HookPoint) and self.point.only_reads
        return before and all(isinstance(hook, ReadOnlyHook) for hook in added)

    def forward(self, x: Tensor) -> Tensor:
        """`run_forward_hooks`: a point without hooks of its own would pass ``x`` on."""
        return self.run_forward_hooks(x)

    def run_forward_hooks(self, x: Tensor) -> Tensor:
        """Show each block of rows to those who listen to it; returns ``x`` with what they make of it."""
        size = x.shape[0] // self.blocks
        for block in self.shown:
            rows = x[block * size : (block + 1) * size]
            result = self._show(rows, self.hooks.get(block, ()))
            if result is rows:
                continue
            if self.blocks == 1:
                return result
            self._put(rows, result)
        return x

    def _show(self, rows: Tensor, hooks: Sequence[Callable]) -> Any:
        if not hooks:
            return self.point(rows)
        model = self.model
        model.context_level += 1
        try:
            for hook in hooks:
                self.point.add_hook(hook, level=model.context_level)
            return self.point(rows)
        finally:
            self.point.remove_hooks(level=model.context_level)
            model.context_level -= 1

    def _put(self, rows: Tensor, result: Any) -> None:
        was, now = ((getattr(x, "shape", None), getattr(x, "dtype", type(x))) for x in (rows, result))
        if was != now:
            raise HookError(
                f"a hook at {self.point.name!r} returned {_described(*now)}, where the activation is "
                f"{_described(*was)}: interventions that share a run cannot change that. batch_size=1 gives each a run "
                "of its own"
            )
        if result.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
            result = result.clone()  # a transposed view, say
        rows.copy_(result)


def _described(shape: Any, kind: Any) -> str:
    return f"{list(shape)} {str(kind).removeprefix('torch.')}" if shape is not None else kind.__name__


def shared_points(model: Any, together: Sequence[Intervention]) -> dict[str, nn.Module]:
    """Stand-ins for all points that the model or one of these interventions listens to."""
    heard = model._listeners()
    hooks: dict[str, dict[int, list[Callable]]] = {name: {} for name in heard}
    for block, intervention in enumerate(together):
        for name, own in intervention.hooks.items():
            hooks.setdefault(name, {})[block] = own
    return {
        name: SharedPoint(model, model.mod_dict[name], name in heard, own, len(together)) for name, own in hooks.items()
    }
