"""SAELens: a sparse autoencoder made here, attached to, run with and taken off a HookedSAETransformer."""

from __future__ import annotations

import torch
from torch import Tensor

from compat_tests.downstream.model import OTHER, TEXT, generator, load

SITES = {"blocks.1.hook_resid_pre": 128, "blocks.2.hook_mlp_out": 128, "blocks.1.attn.hook_z": 128}


def new_sae(site: str, width: int) -> torch.nn.Module:
    """A random autoencoder of the standard architecture."""
    from sae_lens import SAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    reshape = "hook_z" if site.endswith("hook_z") else "none"
    config = StandardSAEConfig(
        d_in=width, d_sae=3 * width, reshape_activations=reshape, metadata=SAEMetadata(hook_name=site)
    )
    sae = SAE.get_sae_class_for_architecture("standard")(config)
    source = generator(len(site))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    return sae


def run() -> dict[str, Tensor]:
    """Every way of running with autoencoders, with and without their error term; then gradients, then none attached."""
    from sae_lens import HookedSAETransformer

    found: dict[str, Tensor] = {}
    saes = {site: new_sae(site, width) for site, width in SITES.items()}
    for processing in ("from_pretrained", "from_pretrained_no_processing"):
        model = load(HookedSAETransformer, processing)
        tokens = model.to_tokens([TEXT, OTHER])

        def keep(name: str, value: Tensor, kind: str = processing) -> None:
            found[f"{kind} {name}"] = value

        keep("plain", model(tokens))
        for site, sae in saes.items():
            for error in (False, True):
                logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=error)
                keep(f"{site} {error} logits", logits)
                for name in cache:
                    if "sae" in name or name.endswith(("resid_post", "hook_pattern")):
                        keep(f"{site} {error} {name}", cache[name])
        with model.saes(saes=list(saes.values())):
            keep("all logits", model(tokens))
            loss = model(tokens, return_type="loss")
            keep("all loss", loss)
            loss.backward()
        for site, sae in saes.items():
            for name, parameter in sae.named_parameters():
                if parameter.grad is not None:
                    keep(f"{site} gradient of {name}", parameter.grad)
                    parameter.grad = None
        model.add_sae(saes["blocks.2.hook_mlp_out"], use_error_term=False)
        site = "blocks.2.hook_mlp_out.hook_sae_acts_post"
        keep("hooked", model.run_with_hooks(tokens, fwd_hooks=[(site, lambda acts, hook: acts * 2)]))
        model.reset_saes()
        keep("after", model(tokens))
    return found
