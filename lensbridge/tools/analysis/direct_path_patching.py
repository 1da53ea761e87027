"""What does one head do to another head directly, by way of nothing in between?

The difference that one head writes between two runs is added to what later heads read as queries, keys or values, one
head at a time, with the scale of the norm before them kept. (Path patching: Wang et al. 2022, arXiv 2211.00593.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ...activation_cache import ActivationCache

Component = Literal["q", "k", "v"]


def _warn_if_unfolded(model: Any) -> None:
    gain = getattr(model.blocks[0].ln1, "w", None)
    if gain is not None and not torch.allclose(gain, torch.ones_like(gain), atol=1e-3):
        warnings.warn(
            "direct paths are computed as if norms only scaled: load the model with fold_ln=True, or call "
            "model.process_weights_()",
            UserWarning,
            stacklevel=3,
        )


def get_act_patch_direct_path(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    corrupted_cache: ActivationCache,
    patching_metric: Callable[[Tensor], Tensor],
    src_layer: int,
    src_head: int,
    component: Component = "q",
    verbose: bool = True,
) -> Float[Tensor, "n_layers n_heads"]:
    """The metric with one head's direct path to each later head patched; 0 for heads that are not later.

    Args:
        model: a HookedTransformer with folded norms.
        corrupted_tokens: input of the run that is patched, [batch, pos].
        clean_cache: of the run that the head's output is taken from.
        corrupted_cache: of the run on ``corrupted_tokens``.
        patching_metric: logits -> a single number.
        src_layer: layer of the head whose output is patched in.
        src_head: its number.
        component: what it is patched into: queries, keys or values.
        verbose: show progress.
    """
    _warn_if_unfolded(model)
    cfg = model.cfg
    results = torch.zeros(cfg.n_layers, cfg.n_heads, device=cfg.device)
    z = f"blocks.{src_layer}.attn.hook_z"
    difference = clean_cache[z][:, :, src_head] - corrupted_cache[z][:, :, src_head]
    written = difference @ model.blocks[src_layer].attn.W_O[src_head]
    later = [(layer, head) for layer in range(src_layer + 1, cfg.n_layers) for head in range(cfg.n_heads)]
    for layer, head in tqdm(later, desc=f"L{src_layer}H{src_head} -> {component}", disable=not verbose):
        read = getattr(model.blocks[layer].attn, f"W_{component.upper()}")[head]
        change = (written / corrupted_cache[f"blocks.{layer}.ln1.hook_scale"]) @ read

        def add(value: Tensor, hook: Any, head: int = head, change: Tensor = change) -> Tensor:
            value = value.clone()
            value[:, :, head] += change
            return value

        point = f"blocks.{layer}.attn.hook_{component}"
        logits = model.run_with_hooks(corrupted_tokens, fwd_hooks=[(point, add)])
        results[layer, head] = patching_metric(logits).item()
    return results


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    corrupted_cache: ActivationCache,
    patching_metric: Callable[[Tensor], Tensor],
    component: Component = "q",
    verbose: bool = True,
) -> Float[Tensor, "n_layers n_heads n_layers n_heads"]:
    """`get_act_patch_direct_path` from every head: [source layer, source head, layer, head].

    That is a run for every pair of heads, so it is for small models.
    """
    cfg = model.cfg
    results = torch.zeros(cfg.n_layers, cfg.n_heads, cfg.n_layers, cfg.n_heads, device=cfg.device)
    sources = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    for layer, head in tqdm(sources, desc=f"all heads -> {component}", disable=not verbose):
        results[layer, head] = get_act_patch_direct_path(
            model,
            corrupted_tokens,
            clean_cache,
            corrupted_cache,
            patching_metric,
            layer,
            head,
            component,
            verbose=False,
        )
    return results
