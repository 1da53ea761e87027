"""Does code that was written around TransformerLens' model of a config run on ours: modules put in, subclasses, wrappers?

One source of such code is run with each of the two packages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformer_lens
from torch import nn

import lensbridge
from compat_tests.comparison import caches_close, close
from compat_tests.native_models import BASE

PACKAGES = (lensbridge, transformer_lens)
TOKENS = torch.randint(0, 17, (2, 7), generator=torch.Generator().manual_seed(5))


def built(package: Any, kind: Any = None, **fields: Any) -> Any:
    """The model of a package's, or of a subclass of it, on a config; a seed makes its weights the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return (kind or package.HookedTransformer)(package.HookedTransformerConfig(**BASE | {"seed": 2} | fields))


class OwnAttention(nn.Module):
    """Takes arguments in an order of its own, and fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, BASE["d_model"]))

    def forward(self, *, value_input: torch.Tensor, query_input: torch.Tensor, **others: Any) -> torch.Tensor:
        return value_input * self.gain + query_input.tanh() * len(others)


class OwnBlock(nn.Module):
    """Its optional arguments are in another order than those of TransformerLens' block."""

    def forward(
        self, stream: torch.Tensor, attention_mask: Any = None, past_kv_cache_entry: Any = None, **others: Any
    ) -> torch.Tensor:
        keep = 1.0 if attention_mask is None else attention_mask[..., None]
        return stream * keep + (0.0 if others["shortformer_pos_embed"] is None else others["shortformer_pos_embed"])


class OwnPositions(nn.Module):
    """Knows of the tokens which ones they are."""

    def forward(self, tokens: torch.Tensor, offset: int = 0, attention_mask: Any = None) -> torch.Tensor:
        return torch.sin(tokens.cumsum(1)[..., None] * torch.linspace(0.1, 1, BASE["d_model"]))


def own_attention(model: Any) -> None:
    model.blocks[0].attn = OwnAttention()


def own_block(model: Any) -> None:
    model.blocks[1] = OwnBlock()


def own_positions(model: Any) -> None:
    model.pos_embed = OwnPositions()


@pytest.mark.parametrize("positions", ["standard", "shortformer"])
@pytest.mark.parametrize("put", [own_attention, own_block, own_positions])
def test_modules_of_ones_own_are_called_as_there(put: Callable[[Any], None], positions: str) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    results = []
    for package in PACKAGES:
        model = built(package, positional_embedding_type=positions)
        put(model)
        model.setup()
        _, cache = model.run_with_cache(TOKENS)
        results.append((model(TOKENS), model(TOKENS, attention_mask=mask)[:, 2:], dict(cache)))
    (logits, masked, cache), (expected, expected_masked, expected_cache) = results
    close("logits", logits.detach(), expected.detach())
    close("masked logits", masked.detach(), expected_masked.detach())
    caches_close(cache, expected_cache)
