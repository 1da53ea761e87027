"""CircuitsVis and plotly: pictures made of a cache's tensors; the numbers in them are what is compared."""

from __future__ import annotations

import json
import re

import torch
from torch import Tensor

from compat_tests.downstream.model import TEXT, load


def numbers(html: object) -> Tensor:
    """Every number in what CircuitsVis hands to the browser."""
    text = re.sub(r"circuits-vis-[\w-]+", "", str(html))
    found = [float(part) for part in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]
    assert found
    return torch.tensor(found)


def run() -> dict[str, Tensor]:
    """Attention, tokens, neurons and logits in CircuitsVis; a heatmap and a line in plotly."""
    import circuitsvis as cv
    import plotly.express as px
    from transformer_lens import HookedTransformer, utils

    model = load(HookedTransformer)
    tokens = model.to_str_tokens(TEXT)
    logits, cache = model.run_with_cache(TEXT)
    found = {}
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer][0]
        found[f"patterns {layer}"] = numbers(cv.attention.attention_patterns(tokens=tokens, attention=pattern))
        found[f"heads {layer}"] = numbers(cv.attention.attention_heads(attention=pattern, tokens=tokens))
    neurons = torch.stack([cache["post", layer][0, :, :8] for layer in range(model.cfg.n_layers)], dim=1)
    found["neurons"] = numbers(cv.activations.text_neuron_activations(tokens=tokens, activations=neurons))
    colours = cache["resid_post", 1][0, :, 0]
    found["tokens"] = numbers(cv.tokens.colored_tokens(tokens=tokens, values=colours))
    heatmap = px.imshow(utils.to_numpy(cache["pattern", 1][0, 0]))
    line = px.line(y=utils.to_numpy(logits[0, -1]))
    for name, figure, key in (("heatmap", heatmap, "z"), ("line", line, "y")):
        json.loads(figure.to_json())
        found[name] = torch.tensor(figure.data[0][key])
    return found
