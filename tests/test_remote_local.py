"""``remote="local"``: what a run would send to a server is complete, on families that differ in what travels.

A server itself is in `compat_tests/test_remote.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import HookedTransformer
from lensbridge.engine.remote.failures import _error
from lensbridge.engine.remote.hooks import States, put_back
from lensbridge.engine.remote.sources import lean, own_lines
from lensbridge.errors import HookError, RemoteRunError, UnsupportedModelError
from lensbridge.tiny import tiny_family, tiny_tokens

#: By what is particular in them: fused projections, caps and norms behind, experts, sinks, ALiBi, latent attention,
#: a recurrence, positions in the embedding.
FAMILIES = ["gpt_neox", "gemma2", "mixtral", "gpt_oss", "bloom", "deepseek_v3", "mamba", "opt"]


def halve(x: Tensor, hook: Any) -> Tensor:
    return x * 0.5 if x.is_floating_point() else x


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_gives_what_it_gives_here(family: str, capsys: pytest.CaptureFixture) -> None:
    hf = tiny_family(family)
    lens, tokens = HookedTransformer.from_pretrained(family, hf_model=hf, tokenizer=None), tiny_tokens()
    before = {name: dict(module.__dict__) for name, module in hf.named_modules()}
    with torch.no_grad():
        logits, cache = lens.run_with_cache(tokens)
        found, kept = lens.run_with_cache(tokens, remote="local")
        assert torch.equal(found, logits) and list(kept) == list(cache)
        for name in cache:
            difference = float((kept[name] - cache[name]).nan_to_num().abs().max())
            assert difference <= 1e-6 * float(cache[name].nan_to_num(neginf=0).abs().max()), name
        points = [name for name in lens.hook_dict if name.startswith("blocks.1.") and lens._is_on(name)]
        for name in points[::4]:
            pairs = [(name, halve)]
            expected = lens.run_with_hooks(tokens, fwd_hooks=pairs)
            found = lens.run_with_hooks(tokens, fwd_hooks=pairs, remote="local")
            assert torch.equal(found, expected), name
    assert all(before[name].keys() == module.__dict__.keys() for name, module in hf.named_modules())


def test_what_is_out_of_reach_comes_back() -> None:
    lens = HookedTransformer.from_pretrained("toy")
    known = sys.modules["lensbridge.hook_points"]
    with pytest.raises(RemoteRunError, match="No module named 'lensbridge"):
        lens.run_with_hooks("Mary", fwd_hooks=[("hook_embed", imports)], remote="local")
    assert sys.modules["lensbridge.hook_points"] is known


def imports(x: Tensor, hook: Any) -> Tensor:
    import lensbridge.hook_points

    return x * len(lensbridge.hook_points.__name__)


def test_a_model_that_is_loaded_to_run_so() -> None:
    lens = HookedTransformer.from_pretrained("toy", remote="local")
    here = HookedTransformer.from_pretrained("toy")
    assert torch.equal(lens("Mary"), here("Mary")) and not lens("Mary").requires_grad
    assert torch.equal(lens.W_U, here.W_U)


def test_a_model_of_a_config_stays_here() -> None:
    from lensbridge import HookedTransformerConfig

    config = HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=4, d_head=4, d_vocab=5, act_fn="relu")
    with pytest.raises(UnsupportedModelError, match="made from a config"):
        HookedTransformer(config)(torch.zeros(1, 2, dtype=torch.long), remote="local")


# --- what travels -----------------------------------------------------------------------------------------------------


def documented(first: int, *rest: int, flag: bool = False) -> int:
    """Not to travel."""
    named: int = first
    later: int
    # Nor this.
    later = named + len(rest)
    assert later >= first
    return later if flag else named


def test_sources_of_ours_are_lean() -> None:
    source = lean(documented)  # type: ignore[arg-type]
    assert "travel" not in source.text and ": int" not in source.text and "assert" not in source.text
    scope: dict[str, Any] = {}
    exec(source.text, scope)
    assert scope["documented"](3, 4, flag=True) == documented(3, 4, flag=True) == 4


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Float[Tensor, 'a b'], *rest: int, key: Unknown = 1) -> Never:\n    return x\n",
        "def f(\n    x: Dict[\n        str\n    ],\n) -> Dict[\n    str\n]:\n    y: Wide = x\n    z: No\n    return y",
        "def f(x: 'é' = 1) -> 'é':\n    def inner(y: Missing) -> Missing:\n        return y\n    return inner(x)\n",
    ],
)
def test_annotations_are_blanked_and_lines_stay(source: str) -> None:
    without = own_lines(source)
    assert len(without.splitlines()) == len(source.splitlines())
    scope: dict[str, Any] = {}
    exec(without, scope)
    assert scope["f"](7) == 7


def test_objects_that_hooks_can_reach() -> None:
    shared: list[int] = []
    nested = {"list": shared}

    def hook(x: Tensor, hook: Any) -> None:
        nested["list"].append(1)

    states = States()
    states.reached_by(hook, "the hook")
    assert [id(state) for state in states.found] == [id(nested), id(shared)]
    put_back(states.found, {0: [("list", ("known", 1)), ("new", ("new", 2))], 1: [("new", 5)]})
    assert nested == {"list": shared, "new": 2} and shared == [5]


def test_sums_come_back() -> None:
    """A new number may lie where an old one was: what has changed is not told by where it lies."""
    lens, sums, last = HookedTransformer.from_pretrained("toy"), {"sum": 0.5}, [0.5]

    def add(x: Tensor, hook: Any) -> None:
        sums["sum"] = sums["sum"] + 1000.5
        last[0] = last[0] + 1000.5

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(lens.cfg.n_layers)]
    for times in range(1, lens.cfg.n_layers + 1):
        sums["sum"] = last[0] = 0.5
        lens.run_with_hooks("Mary", fwd_hooks=[(name, add) for name in names[:times]], remote="local")
        assert sums["sum"] == last[0] == 0.5 + 1000.5 * times


def test_copies_and_threads() -> None:
    lens = HookedTransformer.from_pretrained("toy")
    expected, engine = lens("Mary"), lens.interior.engine
    assert torch.equal(copy.deepcopy(lens)("Mary", remote="local"), expected)
    lens("Mary", remote="local")
    assert torch.equal(copy.deepcopy(lens)("Mary", remote="local"), expected)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: lens("Mary", remote=("local", None)[index % 2]), range(12)))
    assert all(torch.equal(each, expected) for each in found)
    assert lens.interior.engine is engine


def assigns() -> Callable:
    count = 0

    def hook(x: Tensor, hook: Any) -> None:
        nonlocal count
        count += 1

    return hook


def test_a_name_that_a_hook_assigns_to_cannot_come_back() -> None:
    with pytest.raises(HookError, match="the hook assigns to count"):
        States().reached_by(assigns(), "the hook")


def test_errors_of_a_server() -> None:
    text = f'Traceback (most recent call last):\n  File "[mine:3] {Path(__file__)}", line 4, in mine\n    y = 1 / 0\n'
    error = _error(
        text + '  File "/x/site-packages/torch/a.py", line 1, in t\n    z\nZeroDivisionError: division by zero'
    )
    assert isinstance(error, RemoteRunError) and error.remote_traceback is not None
    assert str(error).splitlines()[0].endswith("ZeroDivisionError: division by zero")
    assert f"in mine, {Path(__file__)}:4" in str(error) and "y = 1 / 0" in str(error)
    assert isinstance(_error("HookError: a hook at 'x' returned int"), HookError)
    assert "the queue is full" in str(_error("the queue is full"))
