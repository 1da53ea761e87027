"""How a type checker learns what a ``ModuleList`` holds.

At runtime this is ``torch.nn.ModuleList``. The signatures below exist for the checker alone, so that iterating over a
``TypedModuleList[Block]`` gives blocks and not bare modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from torch import nn

T = TypeVar("T", bound=nn.Module)


class TypedModuleList(nn.ModuleList, Generic[T]):
    """A ``ModuleList`` that knows the type of its modules."""

    if TYPE_CHECKING:

        def __init__(self, modules: Iterable[T] | None = None) -> None: ...

        def __iter__(self) -> Iterator[T]: ...

        @overload
        def __getitem__(self, idx: slice) -> TypedModuleList[T]: ...

        @overload
        def __getitem__(self, idx: int) -> T: ...

        def __getitem__(self, idx: int | slice) -> T | TypedModuleList[T]: ...

        def __setitem__(self, idx: int, module: T) -> None: ...  # type: ignore[override]

        def append(self, module: T) -> TypedModuleList[T]: ...  # type: ignore[override]
