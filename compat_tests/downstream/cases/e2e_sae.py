"""e2e-sae: a HookedTransformer with autoencoders run in its hooks."""

from __future__ import annotations

import torch
from torch import Tensor

from compat_tests.downstream.model import TEXT, generator, load


def run() -> dict[str, Tensor]:
    """Activations with and without autoencoders, and gradients of them."""
    from e2e_sae.models.transformers import SAETransformer
    from transformer_lens import HookedTransformer

    model = load(HookedTransformer)
    positions = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    whole = SAETransformer(model, list(positions), dict_size_to_input_ratio=2.0)
    source = generator()
    with torch.no_grad():
        for parameter in whole.saes.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    tokens = model.to_tokens(TEXT)
    plain, acts = whole.forward_raw(tokens, run_entire_model=True)
    found = {"plain": plain, **{f"plain {name}": value for name, value in acts.items()}}
    logits, acts = whole.forward(tokens, sae_positions=list(positions))
    found["with"] = logits
    logits.logsumexp(-1).sum().backward()
    found |= {f"gradient {name}": p.grad for name, p in whole.saes.named_parameters() if p.grad is not None}
    return found
