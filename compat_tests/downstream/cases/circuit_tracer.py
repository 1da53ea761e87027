"""circuit-tracer: a replacement model with transcoders made here, its features, an intervention and an attribution."""

from __future__ import annotations

import torch
from torch import Tensor

from compat_tests.downstream.model import TEXT, generator, load


def transcoders(n_layers: int, width: int) -> object:
    """One random transcoder for each MLP."""
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    made = {}
    for layer in range(n_layers):
        one = SingleLayerTranscoder(width, 2 * width, torch.nn.functional.relu, layer, dtype=torch.float32)
        source = generator(layer)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
        made[layer] = one
    return TranscoderSet(made, "mlp.hook_in", "mlp.hook_out")


def run() -> dict[str, Tensor]:
    """Logits and features, what a change of three features does, and the graph of an attribution."""
    from circuit_tracer import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel

    model = load(TransformerLensReplacementModel, "from_pretrained_and_transcoders", transcoders=transcoders(4, 128))
    tokens = model.to_tokens(TEXT)[0]
    logits, features = model.get_activations(tokens)
    found = {"logits": logits, "features": features.to_dense() if features.is_sparse else features}
    changes = [(1, 5, 3, 4.0), (2, 7, 10, -2.0), (3, 9, 0, 1.5)]
    found["changed"] = model.feature_intervention(tokens, changes)[0]
    graph = attribute(TEXT, model, max_n_logits=5, batch_size=64)
    found["adjacency"] = graph.adjacency_matrix
    found["active"] = graph.active_features
    return found
