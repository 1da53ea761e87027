"""Can a run begin at any layer with what the layers before it have made, whatever these layers read besides?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge.checking import hooked
from lensbridge.checking.families import recorded, refusal
from lensbridge.errors import UnsupportedModelError
from lensbridge.tiny import tiny_family, tiny_tokens

#: Some that are special in this: additions in place, more than the stream, choices of earlier layers, more positions.
QUICK = frozenset("gpt2 llama ctrl git zamba glm_moe_dsa gemma4_text gemma4_text@shared_keys cpmant prophetnet".split())
SEVERAL = ("deepseek_v4", "gemma3n_text", "hy_v4", "qwen4_exp", "qwen4_exp_text")
KEYS = [key for key in recorded() if refusal(key) is None and key not in SEVERAL]


def text_for(model: Any) -> torch.Tensor:
    rows = model.interior.architecture.rows
    return tiny_tokens(2 if rows is None else 2 * getattr(model.hf_model.config, rows))


@pytest.mark.parametrize("key", [pytest.param(key, marks=[] if key in QUICK else [pytest.mark.slow]) for key in KEYS])
def test_each_layer_goes_on_from_its_residual_stream(key: str) -> None:
    model = hooked(tiny_family(key), key)
    tokens = text_for(model)
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    logits, cache = model.run_with_cache(tokens, names_filter=streams)
    for layer, name in enumerate(streams):
        given = cache[name].clone()
        more = {} if model.interior.rereads is None else {"tokens": tokens}
        found = model(given, start_at_layer=layer, **more)
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert torch.equal(given, cache[name]), "the caller's tensor was written into"


@pytest.mark.parametrize("key", ["zamba", "gemma4_text", "glm_moe_dsa"])
def test_layers_that_read_more_need_the_tokens(key: str) -> None:
    model = hooked(tiny_family(key), key)
    residual = torch.randn(2, 5, model.cfg.d_model)
    with pytest.raises(UnsupportedModelError, match=r"start_at_layer needs the tokens .* Pass tokens="):
        model(residual, start_at_layer=1)
    with pytest.raises(AssertionError, match=r"tokens has shape \[1, 5\], the residual stream \[2, 5, 64\]"):
        model(residual, start_at_layer=1, tokens=tiny_tokens(1, 5))
    with pytest.raises(UnsupportedModelError, match="a block does not run by itself here"):
        model.blocks[0](residual)


@pytest.mark.parametrize("key", SEVERAL)
def test_no_run_begins_or_ends_between_layers_of_several_streams(key: str) -> None:
    model = hooked(tiny_family(key), key)
    with pytest.raises(UnsupportedModelError, match="start_at_layer cannot be used .* there are several residual"):
        model(torch.randn(2, 5, model.cfg.d_model), start_at_layer=1)
    with pytest.raises(UnsupportedModelError, match="stop_at_layer cannot be used .* there are several residual"):
        model(tiny_tokens(2, 5), stop_at_layer=1)
