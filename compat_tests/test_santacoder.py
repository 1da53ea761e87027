"""Is the multi-query model that 3.9.0 knows as santacoder the same on HuggingFace's GPTBigCode?

3.9.0 loads the code that santacoder's repository brings along; transformers has had the model itself since, with
queries, keys and values in one projection. 3.9.0 repeats the one key and value for all heads, as weights and as
activations; here they are what the model computes, one of each.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPTBigCodeForCausalLM

from compat_tests.comparison import close
from compat_tests.edits import halve
from compat_tests.rough_families import APART, reference, rough_model
from compat_tests.rough_models import (
    DEFAULT_PROCESSING,
    NO_PROCESSING,
    SUBJECT,
    load_tokenizer,
    random_tokens,
    save_tokenizer,
)

pytestmark = pytest.mark.skipif(SUBJECT == "transformer_lens", reason="3.9.0 cannot convert HuggingFace's own class")
FAMILY = APART["gpt_bigcode"]
#: Hooks and weights of the one key and value.
SHARED = ("hook_k", "hook_v")

WEIGHTS = "W_E W_pos W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in b_in W_out b_out".split()
SIZES = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "layer_norm_epsilon", "activation_function")


class Projection(nn.Module):
    """Weights as GPT-2 has them, inputs before outputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().T), nn.Parameter(bias.detach())


def as_santacoder(model: GPTBigCodeForCausalLM) -> Any:
    """What 3.9.0 reads of santacoder's own class: the same weights, queries apart from the key and the value."""

    def block(layer: Any) -> SimpleNamespace:
        width = model.config.n_embd
        q, kv = (
            Projection(layer.attn.c_attn.weight[part], layer.attn.c_attn.bias[part])
            for part in (slice(width), slice(width, None))
        )
        projections = SimpleNamespace(q_attn=q, kv_attn=kv, c_proj=_turned(layer.attn.c_proj))
        mlp = SimpleNamespace(c_fc=_turned(layer.mlp.c_fc), c_proj=_turned(layer.mlp.c_proj))
        return SimpleNamespace(attn=projections, ln_1=layer.ln_1, ln_2=layer.ln_2, mlp=mlp)

    body = model.transformer
    blocks = [block(layer) for layer in body.h]
    sizes = {name: getattr(model.config, name) for name in SIZES}
    config = GPT2Config(architectures=["GPT2LMHeadCustomModel"], **sizes)
    around = SimpleNamespace(wte=body.wte, wpe=body.wpe, h=blocks, ln_f=body.ln_f)
    return SimpleNamespace(transformer=around, lm_head=model.lm_head, config=config)


def _turned(linear: nn.Linear) -> Projection:
    return Projection(linear.weight, linear.bias)


def pair(hf: Any, tokenizer: Path, flags: dict[str, Any]) -> tuple[Any, Any]:
    """The model in both libraries."""
    from lensbridge import HookedTransformer

    theirs = reference(as_santacoder(hf), FAMILY, load_tokenizer(tokenizer), **flags)
    return HookedTransformer.from_pretrained(
        "gpt_bigcode", hf_model=hf, tokenizer=load_tokenizer(tokenizer), **flags
    ), theirs


@pytest.fixture(scope="module", params=[NO_PROCESSING, DEFAULT_PROCESSING], ids=["raw", "default"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(rough_model(FAMILY), save_tokenizer(tmp_path_factory.mktemp("tokenizer")), request.param)


def one_for_all(name: str, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Our one key or value, repeated as 3.9.0 has it."""
    return value.expand(-1, -1, heads, -1) if name.endswith(SHARED) else value


def test_points(two: tuple[Any, Any]) -> None:
    ours, theirs = two
    tokens = random_tokens(2, 9)
    (logits, mine), (expected, cache) = (model.run_with_cache(tokens) for model in two)
    close("logits", logits, expected)
    assert list(mine.keys()) == list(cache.keys())
    for name, value in cache.items():
        close(name, one_for_all(name, mine[name], ours.cfg.n_heads), value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(two: tuple[Any, Any], name: str) -> None:
    mine, theirs = (getattr(model, name) for model in two)
    close(name, mine.expand_as(theirs), theirs)


@pytest.mark.parametrize("point", ["hook_q", "hook_k", "hook_v", "hook_z", "hook_pattern"])
def test_edits_and_gradients(two: tuple[Any, Any], point: str) -> None:
    """An edit of all heads' keys is one of the key."""
    tokens, results = random_tokens(2, 9), []
    for model in two:
        grads: list[torch.Tensor] = []
        with model.hooks(
            fwd_hooks=[(f"blocks.0.attn.{point}", halve)],
            bwd_hooks=[("blocks.0.hook_resid_pre", lambda grad, hook, kept=grads: kept.append(grad))],
        ):
            loss = model(tokens, return_type="loss")
            loss.backward()
        results.append((loss.detach(), grads[0]))
        model.zero_grad()
    (loss, grad), (expected, expected_grad) = results
    close("loss", loss, expected)
    close(f"gradient through {point}", grad, expected_grad)
