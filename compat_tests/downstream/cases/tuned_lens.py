"""tuned-lens: the unembedding taken from a HookedTransformer."""

from __future__ import annotations

from torch import Tensor

from compat_tests.downstream.model import TEXT, load


def run() -> dict[str, Tensor]:
    """The logits of every layer through its logit lens."""
    from transformer_lens import HookedTransformer
    from tuned_lens.nn.lenses import LogitLens

    found = {}
    for method in ("from_pretrained", "from_pretrained_no_processing"):
        model = load(HookedTransformer, method)
        lens = LogitLens.from_model(model)
        cache = model.run_with_cache(TEXT)[1]
        for layer in range(model.cfg.n_layers):
            found[f"{method} {layer}"] = lens(cache["resid_post", layer], layer)
    return found
