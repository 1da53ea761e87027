"""What do the tests do to an activation, and where do two runs legitimately differ afterwards?"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

Hook = Callable[..., Any]


def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.zeros_like(value)


def halve(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.5


def in_place(value: torch.Tensor, hook: Any) -> None:
    """Overwrites all but the first entry of axis 1: positions, or heads of scores and pattern. Returns nothing.

    Not a small number: as a norm's scale it would make scores of several hundred, where float32 rounding shows.
    """
    value[:, 1:] = 0.75


def add_in_place(value: torch.Tensor, hook: Any) -> torch.Tensor:
    """Edits in place and returns the same object, as many notebooks do."""
    value[0] += 0.5
    return value


def noise(value: torch.Tensor, hook: Any) -> torch.Tensor:
    """Adds noise fixed by the point's name: pattern rows no longer sum to 1, norms and streams have a mean."""
    generator = torch.Generator().manual_seed(zlib.crc32(hook.name.encode()))
    return value + 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


def replace(source: Mapping[str, torch.Tensor]) -> Hook:
    """Puts in the same point's value from another run: activation patching."""

    def patch(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return source[hook.name].clone()

    return patch


#: Edits that need no second run.
EDITS: dict[str, Hook] = {
    "zero": zero,
    "halve": halve,
    "in place": in_place,
    "add in place": add_in_place,
    "noise": noise,
}


def shares_memory_with(point: str, folded: bool) -> set[str]:
    """Points fired earlier whose cached tensor 3.9.0 lets an in-place edit at this point change as well.

    There, the residual stream that leaves a block is the very tensor that enters the next one, and with folded norms
    the input of the unembedding is the normalised stream itself. Here the earlier entry keeps the value it had when it
    was cached.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", point)
    if match and int(match[1]) > 0:
        return {f"blocks.{int(match[1]) - 1}.hook_resid_post"}
    return {"ln_final.hook_normalized"} if folded and point == "unembed.hook_in" else set()
