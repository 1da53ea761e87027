"""Does a wrong call end in an error that names the mistake, and is the model as before afterwards?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.lenses import steered

POINT = "blocks.0.hook_resid_post"


def _noop(value: Tensor, hook: Any) -> None:
    return None


CALLS: dict[str, tuple[Callable[[Any, Tensor], Any], type[Exception], str]] = {
    "no prompt": (lambda m, t: m.generate([]), IndexError, "list of prompts is empty"),
    "text as eos": (lambda m, t: m.generate(t, eos_token_id="x"), TypeError, "takes token ids"),
    "no list of interventions": (lambda m, t: list(m.run_sweep(t, None)), TypeError, "a list of interventions"),
    "no function as hook": (lambda m, t: list(m.run_sweep(t, [[(POINT, 5)]])), TypeError, "int, not a function"),
    "no function as metric": (
        lambda m, t: list(m.run_sweep(t, [[(POINT, _noop)]], 5)),
        TypeError,
        "function of logits",
    ),
    "part of a batch": (lambda m, t: list(m.run_sweep(t, [], batch_size=2.5)), ValueError, "at least 1, not 2.5"),
    "no token": (lambda m, t: list(m.run_sweep(t[:, :0], [[(POINT, _noop)]])), ValueError, "has no token"),
    "text as direction": (lambda m, t: steered(m, t, "x", layer=1), TypeError, "a direction is a tensor"),
    "no cache": (lambda m, t: m(t, past_kv_cache=5), TypeError, "this is a int"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_error_names_the_mistake(lens: Any, tokens: Tensor, name: str) -> None:
    call, error, message = CALLS[name]
    before = lens(tokens)
    with pytest.raises(error, match=message):
        call(lens, tokens)
    assert torch.equal(lens(tokens), before) and not any(lens._hook_lists)
