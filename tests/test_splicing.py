"""Do modules take part in a run that the user has put in the place of a component, or of a hook point?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookedTransformer, HookPoint
from lensbridge.checking import hooked
from lensbridge.errors import UnsupportedModelError
from lensbridge.tiny import tiny_family, tiny_tokens

TOKENS = tiny_tokens()
#: Norms before the MLP and behind it, gates, a mixture, a parallel block, capped logits.
FAMILIES = ["gpt2", "llama", "gemma2", "mixtral", "gptj", "gpt_neox", "olmo"]


class Around(nn.Module):
    """A module that calls what it took the place of, with hook points on both sides."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.hook_before, self.hook_after = inner, HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_after(self.inner(self.hook_before(x)))


class Linear(nn.Module):
    """A module that has nothing to do with the component it replaces."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def model_of(family: str, processed: bool) -> Any:
    hf = tiny_family(family)
    return HookedTransformer.from_pretrained(family, hf_model=hf) if processed else hooked(hf)


def close(mine: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "default"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_around_a_component_changes_nothing(family: str, processed: bool) -> None:
    model = model_of(family, processed)
    with torch.no_grad():
        expected, cache = model.run_with_cache(TOKENS)
        for block in model.blocks:
            block.mlp = Around(block.mlp)
        model.unembed = Around(model.unembed)
        assert close(model(TOKENS), expected)
        model.setup()
        logits, found = model.run_with_cache(TOKENS)
    assert close(logits, expected)
    shared = [name for name in found if name in cache]
    assert "blocks.1.hook_mlp_out" in shared and "blocks.1.ln2.hook_normalized" in shared
    assert all(close(found[name], cache[name]) for name in shared)
    behind_norm = "blocks.1.ln2_post.hook_scale" in cache
    assert behind_norm or close(found["blocks.1.mlp.hook_after"], cache["blocks.1.hook_mlp_out"])
    if "blocks.1.mlp.hook_post" in cache:
        assert close(found["blocks.1.mlp.inner.hook_post"], cache["blocks.1.mlp.hook_post"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_hooks_inside_act(family: str) -> None:
    model = model_of(family, True)
    with torch.no_grad():
        zeroed = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.mlp.hook_post", lambda value, hook: value * 0)])
        model.blocks[0].mlp = Around(model.blocks[0].mlp)
        model.setup()
        inner = ("blocks.0.mlp.inner.hook_post", lambda value, hook: value * 0)
        assert close(model.run_with_hooks(TOKENS, fwd_hooks=[inner]), zeroed)
        doubled = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.mlp.hook_before", lambda value, hook: value * 2)])
        assert not close(doubled, model(TOKENS))


def test_another_module_is_what_the_model_computes_with() -> None:
    model = model_of("gpt2", False)
    replacement = Linear(model.cfg.d_model)
    _, cache = model.run_with_cache(TOKENS)
    read = cache["blocks.1.ln2.hook_normalized"]
    ln2 = model.hf_model.transformer.h[1].ln_2
    written = (read * ln2.weight + ln2.bias) @ replacement.weight
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: written)])
    model.blocks[1].mlp = replacement
    logits = model(TOKENS)
    assert close(logits, expected)
    logits.sum().backward()
    assert replacement.weight.grad is not None and replacement.weight.grad.any()


def test_taking_it_off_again() -> None:
    model = model_of("gpt2", False)
    before, mlp = model(TOKENS), model.blocks[1].mlp
    model.blocks[1].mlp = Linear(model.cfg.d_model)
    assert not close(model(TOKENS), before)
    model.blocks[1].mlp = mlp
    assert torch.equal(model(TOKENS), before)


def test_a_hook_points_place_needs_no_setup() -> None:
    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    model = model_of("gpt2", False)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: 2 * value)])
    model.blocks[0].hook_mlp_out = Doubled()
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize(("family", "component"), [("gpt2", "attn"), ("gpt2", "ln1"), ("granite", "mlp")])
def test_other_places_are_refused(family: str, component: str) -> None:
    model = model_of(family, False)
    setattr(model.blocks[0], component, Linear(model.cfg.d_model))
    with pytest.raises(UnsupportedModelError, match=f"in the place of 'blocks.0.{component}'"):
        model(TOKENS)


def test_a_hook_that_starts_the_graph() -> None:
    """circuit-tracer's: no parameter has a gradient, and the embedding is made to have one."""
    model = model_of("gpt2", False)
    for parameter in model.parameters():
        parameter.requires_grad = False
    seen: list[Tensor] = []

    def start(value: Tensor, hook: Any) -> Tensor:
        value.requires_grad = True
        return value

    with model.hooks([("hook_embed", start)], [("hook_embed", lambda grad, hook: seen.append(grad))]):
        model(TOKENS).sum().backward()
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad = True
    with model.hooks(bwd_hooks=[("hook_embed", lambda grad, hook: seen.append(grad))]):
        model(TOKENS).sum().backward()
    assert close(*seen)


def test_attention_has_a_kind_and_a_mask() -> None:
    model = model_of("gpt_neo", False)
    kinds = [block.attn.attn_type for block in model.blocks]
    assert kinds == ["global", "local"]
    size, window = model.cfg.n_ctx, model.cfg.window_size
    rows, columns = torch.arange(size)[:, None], torch.arange(size)
    assert torch.equal(model.blocks[0].attn.mask, rows >= columns)
    assert torch.equal(model.blocks[1].attn.mask, (rows >= columns) & (rows - columns < window))
    model.blocks[0].attn.mask = model.blocks[0].attn.mask.clone()
    with pytest.raises(UnsupportedModelError, match="hook_attn_scores"):
        model.blocks[0].attn.mask = model.blocks[1].attn.mask
