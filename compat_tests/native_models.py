"""How do a native model and TransformerLens' own come to be the same model?

From the same config fields, with the same rough weights: every bias and gain far from its neutral value, queries and
keys large enough for attention to be far from uniform. Then both are run and everything that can be seen is compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformer_lens import HookedTransformer as ReferenceTransformer
from transformer_lens.config import HookedTransformerConfig as ReferenceConfig
from transformer_lens.hook_points import HookPoint as ReferencePoint

from compat_tests.comparison import caches_close, close, weights_close
from lensbridge import HookedTransformerConfig, HookPoint
from lensbridge.native import NativeForCausalLM

BASE: dict[str, Any] = {
    "d_model": 12,
    "d_head": 4,
    "n_layers": 2,
    "n_ctx": 14,
    "d_vocab": 17,
    "act_fn": "gelu",
    "seed": 5,
    "device": "cpu",
}


@dataclass
class NativePair:
    """Our model and TransformerLens' with the same weights."""

    mine: NativeForCausalLM
    theirs: Any

    def set(self, **flags: Any) -> None:
        """Set config fields of both."""
        for model in (self.mine, self.theirs):
            for name, value in flags.items():
                setattr(model.cfg, name, value)


def reference(fields: dict[str, Any]) -> Any:
    """TransformerLens' model of these fields, as it draws it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceTransformer(ReferenceConfig(**fields))


def roughen(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            mean = 1.0 if last == "w" else 0.0
            spread = 0.3 if last[0] in "bws" else 0.6
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(mean + spread * noise)


def native_pair(**options: Any) -> NativePair:
    """Both models of the base config with these options, in evaluation mode, with rough weights."""
    fields = BASE | options
    theirs = reference(fields)
    if fields.get("num_experts"):
        for block in theirs.blocks:
            # TransformerLens makes experts in float32 whatever the model's dtype, and then cannot run them.
            block.mlp.to(theirs.cfg.dtype)
    roughen(theirs)
    mine = NativeForCausalLM.from_cfg(HookedTransformerConfig(**fields))
    # Without the tables of sines and cosines, so that ours are put to the test too.
    mine.load_state_dict({name: value for name, value in theirs.state_dict().items() if ".rotary_" not in name})
    return NativePair(mine.eval(), theirs.eval())


@contextmanager
def caching(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every hook point of the model (ours or theirs) keeps what passes it last, in the order of firing."""
    cache: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(tensor: torch.Tensor, *, hook: HookPoint) -> None:
            cache[name] = tensor.detach()

        return hook

    kinds = (HookPoint, ReferencePoint)
    points = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, point in points.items():
        point.add_hook(keep(name))
    try:
        yield cache
    finally:
        for point in points.values():
            point.remove_hooks()


def forget_alibi(model: Any) -> None:
    """Let TransformerLens compute its ALiBi biases anew.

    It keeps those of the longest input and, for a shorter one, takes rows that belong to later queries: the pattern is
    the same, the scores are off by a constant per row, depending on what ran before.
    """
    for block in model.blocks:
        block.attn.alibi = None


def agree_in_a_run(pair: NativePair, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Logits and every hook point."""
    forget_alibi(pair.theirs)
    with caching(pair.mine) as mine, torch.no_grad():
        logits = pair.mine(tokens, attention_mask=mask).logits
    expected, theirs = pair.theirs.run_with_cache(tokens, attention_mask=mask)
    close("logits", logits, expected.detach())
    caches_close(mine, theirs.cache_dict)


def agree_in_gradients(pair: NativePair, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """The gradient of every parameter."""
    gradients = []
    for model, run in (
        (pair.mine, lambda: pair.mine(tokens, attention_mask=mask).logits),
        (pair.theirs, lambda: pair.theirs(tokens, attention_mask=mask)),
    ):
        model.zero_grad()
        logits = run()
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
        (logits.log_softmax(-1) * weights).sum().backward()
        gradients.append({name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None})
    mine, theirs = gradients
    # Some gradients are zero but for rounding (b_K cancels in the softmax): all are held against a part of the largest.
    floor = 1e-2 * max(gradient.abs().max() for gradient in theirs.values())[None]
    weights_close(
        {name: torch.cat((gradient, floor)) for name, gradient in mine.items()},
        {name: torch.cat((gradient, floor)) for name, gradient in theirs.items()},
    )
