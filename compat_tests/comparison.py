"""When do two activations count as equal, and how far apart were they?

Equal means: same shape, same dtype, the same non-finite entries (masked scores are ``-inf`` exactly), and on the rest
``max |ours - theirs| <= 1e-4 * max |theirs|``. The largest difference of each kind of point is kept for the table
printed at the end of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 1e-4


@dataclass
class Largest:
    """The largest difference seen at one kind of point, and how many tensors were compared there."""

    difference: float = 0.0
    count: int = 0


differences: dict[str, Largest] = {}


def template(point: str) -> str:
    """``blocks.3.attn.hook_q`` -> ``blocks.{l}.attn.hook_q``."""
    return re.sub(r"\.\d+(?=\.|$)", ".{l}", point)


def record(point: str, difference: float) -> None:
    """Keep the largest difference per kind of point."""
    entry = differences.setdefault(template(point), Largest())
    entry.count += 1
    entry.difference = max(entry.difference, difference)


def relative_difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """``max |mine - theirs| / max |theirs|`` over the finite entries; infinite if those are not the same ones."""
    if mine.shape != theirs.shape:
        return float("inf")
    mine, theirs = mine.detach().double(), theirs.detach().double()
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return float("inf")
    if not torch.equal(mine[~finite].nan_to_num(nan=7.0), theirs[~finite].nan_to_num(nan=7.0)):
        return float("inf")
    if not finite.any():
        return 0.0
    mine, theirs = mine[finite], theirs[finite]
    gap = (mine - theirs).abs().max().item()
    size = theirs.abs().max().item()
    return gap if size == 0 else gap / size


def explain(point: str, mine: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """One line saying how the two differ, or None when they count as equal."""
    if not isinstance(mine, torch.Tensor):
        return f"{point}: {type(mine).__name__} instead of a tensor"
    if mine.shape != theirs.shape:
        return f"{point}: shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
    if mine.dtype != theirs.dtype:
        return f"{point}: {mine.dtype} instead of {theirs.dtype}"
    difference = relative_difference(mine, theirs)
    record(point, difference)
    if difference <= TOLERANCE:
        return None
    if difference == float("inf"):
        return f"{point}: {int((~mine.isfinite()).sum())} non-finite entries, not the {int((~theirs.isfinite()).sum())}"
    return f"{point}: relative difference {difference:.2e}, largest value {theirs.abs().max().item():.3g}"


def close(point: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert that two tensors count as equal, and record how far apart they are."""
    problem = explain(point, mine, theirs)
    assert problem is None, problem


def caches_close(mine: Any, theirs: Any, unless: Collection[str] = (), order: bool = True) -> None:
    """Assert that two caches have the same keys, in the same order, with equal tensors; ``unless`` names exceptions."""
    if order:
        assert list(mine.keys()) == list(theirs.keys())
    else:
        assert sorted(mine.keys()) == sorted(theirs.keys())
    problems = [explain(name, mine[name], theirs[name]) for name in theirs if name not in unless]
    found = [problem for problem in problems if problem]
    assert not found, f"{len(found)} of {len(problems)} points differ:\n" + "\n".join(found[:12])


def weights_close(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Assert that two mappings of weights have equal keys (in any order) and values."""
    assert sorted(mine) == sorted(theirs)
    found = [problem for name in theirs if (problem := explain(name, mine[name], theirs[name]))]
    assert not found, "\n".join(found)


@dataclass
class Outcome:
    """What a call gave: a value, or the exception it raised."""

    value: Any = None
    error: Exception | None = None


def outcome(call: Callable[[], Any]) -> Outcome:
    """Run a call; keep an exception instead of letting it out, so that two models can be compared in failing too."""
    try:
        return Outcome(value=call())
    except Exception as error:
        return Outcome(error=error)


def same_outcome(name: str, mine: Outcome, theirs: Outcome) -> None:
    """Assert that both calls gave equal values, or that ours raised the type theirs raised (or a subclass of it)."""
    if theirs.error is not None:
        assert mine.error is not None, f"{name}: gave {mine.value!r} instead of raising {theirs.error!r}"
        assert isinstance(mine.error, type(theirs.error)), f"{name}: raised {mine.error!r} instead of {theirs.error!r}"
        return
    if mine.error is not None:
        raise mine.error
    same_value(name, mine.value, theirs.value)


def same_value(name: str, mine: Any, theirs: Any) -> None:
    """Assert equality of results: tensors by tolerance (integers exactly), tuples element by element."""
    if isinstance(theirs, torch.Tensor):
        if theirs.is_floating_point():
            close(name, mine, theirs)
        else:
            assert torch.equal(mine, theirs), f"{name}: {mine} instead of {theirs}"
            assert mine.dtype == theirs.dtype
    elif isinstance(theirs, tuple):
        assert type(mine).__name__ == type(theirs).__name__
        assert len(mine) == len(theirs)
        for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            same_value(f"{name}[{index}]", left, right)
    else:
        assert type(mine) is type(theirs)
        assert mine == theirs
