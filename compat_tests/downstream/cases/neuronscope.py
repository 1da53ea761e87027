"""neuronscope: its backend's activations, ablations and the attribution made of them."""

from __future__ import annotations

from torch import Tensor

from compat_tests.downstream.model import TEXT, load


def run() -> dict[str, Tensor]:
    """Everything that the backend computes."""
    from neuronscope.backends.transformer_lens import COMPONENT_HOOK_TEMPLATES, TransformerLensBackend
    from transformer_lens import HookedTransformer

    backend, model = TransformerLensBackend(), load(HookedTransformer)
    assert backend.supports_model("gpt2") and "gpt2" in backend.list_supported_architectures()
    result = backend.get_activations(model, TEXT)
    found = {"logits": result.logits, **{name: result.cache[name] for name in result.cache}}
    for component in COMPONENT_HOOK_TEMPLATES:
        for layer in range(model.cfg.n_layers):
            found[f"without {component} {layer}"] = backend.patch_activations(model, TEXT, layer, component)[1]
    return found
