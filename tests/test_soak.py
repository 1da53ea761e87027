"""Does a run leave anything behind, if there are many?"""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor


def halve(value: Tensor, hook: Any) -> Tensor:
    return value * 0.5


def some_runs(lens: Any, tokens: Tensor) -> None:
    """Four runs of different kinds."""
    lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", halve)])
    everything = lens.run_with_cache(tokens)[1]
    lens.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))[1]["pattern", 0].sum()
    with lens.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", halve)]):
        lens(tokens)
    everything["resid_post", -1].sum()


@pytest.mark.parametrize("runs", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_runs_leave_nothing_behind(lens: Any, tokens: Tensor, runs: int) -> None:
    engine, hf = lens.interior.engine, lens.hf_model
    with torch.no_grad():
        for _ in range(10):
            some_runs(lens, tokens)
        gc.collect()
        tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        plans, kept = engine.plans_made, len(engine._plans)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(runs // 4):
            some_runs(lens, tokens)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert sum(issubclass(type(each), Tensor) for each in gc.get_objects()) <= tensors
    # A byte for each run would be a leak.
    assert grown < 300_000 + runs
    assert (engine.plans_made, len(engine._plans), engine._running) == (plans, kept, [])
    assert not any(point.fwd_hooks or point.bwd_hooks for point in lens.hook_points())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert not any("__nnsight__" in module.__dict__ for module in hf.modules())
