"""What would the model predict if it stopped at an earlier layer?"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..activation_cache import ActivationCache
from ..utilities.components_utils import get_act_name
from ..utilities.slice import Slice, SliceInput
from .stream import Prompt, as_tokens

Layers = Float[Tensor, "layer *batch_and_pos d_vocab"]


def logit_lens(
    model: Any,
    input: Prompt | ActivationCache,
    *,
    incl_mid: bool = False,
    pos_slice: Slice | SliceInput = None,
    return_type: Literal["logits", "probs", "log_probs"] = "logits",
    return_labels: bool = False,
) -> Layers | tuple[Layers, list[str]]:
    """Every layer's residual stream through the final norm and the unembedding, ``[layer, batch, pos, d_vocab]``.

    The logit lens of nostalgebraist (2020, "interpreting GPT: the logit lens"). Layer ``l`` is the stream that enters
    block ``l``; the last entry is the model's own prediction. Nothing is trained: the tuned lens (Belrose et al. 2023,
    "Eliciting Latent Predictions from Transformers with the Tuned Lens") learns a map per layer instead, and early
    layers are easier to read through it.

    Args:
        input: a prompt, or the `ActivationCache` of a run that holds ``resid_pre`` of every layer and the last
            ``resid_post``.
        incl_mid: also the stream between attention and MLP of each block.
        pos_slice: which positions, as for `Slice`; the result is as large as the vocabulary for each. An int takes the
            position axis off.
        return_type: "logits", "probs" or "log_probs".
        return_labels: give the labels ``0_pre``, (``0_mid``,) ``1_pre``, ..., ``final_post`` too.

    Raises:
        ValueError: for another ``return_type``.
        UnknownPointError: (a KeyError) if the cache lacks a layer.
    """
    if return_type not in ("logits", "probs", "log_probs"):
        raise ValueError(f"return_type must be 'logits', 'probs' or 'log_probs', not {return_type!r}")
    cache = input if isinstance(input, ActivationCache) else _streams(model, input, incl_mid)
    stack, labels = cache.accumulated_resid(apply_ln=True, incl_mid=incl_mid, pos_slice=pos_slice, return_labels=True)
    shown = _scaled(model, stack @ model.W_U + model.b_U, return_type)
    return (shown, labels) if return_labels else shown


def _streams(model: Any, prompt: Prompt, incl_mid: bool) -> ActivationCache:
    n_layers = model.cfg.n_layers
    points = [get_act_name("resid_pre", layer) for layer in range(n_layers)]
    if incl_mid:
        points += [get_act_name("resid_mid", layer) for layer in range(n_layers)]
    points.append(get_act_name("resid_post", n_layers - 1))
    _, cache = model.run_with_cache(as_tokens(model, prompt), names_filter=points, return_type=None)
    return cache


def _scaled(model: Any, logits: Tensor, return_type: str) -> Tensor:
    cap = model.cfg.output_logits_soft_cap
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    if return_type == "logits":
        return logits
    return logits.softmax(-1) if return_type == "probs" else logits.log_softmax(-1)
