"""What is a native model of fewer layers, or of another context?

A model of its own: processing rewrites the weights of native models, so none are shared with the one it comes from.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..config import HookedTransformerConfig
from .body import LEARNED_POSITIONS
from .config import fields_of
from .model import NativeForCausalLM


def narrowed(model: NativeForCausalLM, n_layers: int | None, n_ctx: int | None) -> NativeForCausalLM:
    """The first layers of ``model``, with room for another number of tokens; None leaves each as it is.

    Learned positions that are not needed are left out. Other kinds of positions take a longer context too.

    Raises:
        ValueError: there are not so many layers, or not so many learned positions.
    """
    cfg = model.cfg
    n_layers = cfg.n_layers if n_layers is None else n_layers
    n_ctx = cfg.n_ctx if n_ctx is None else n_ctx
    if (n_layers, n_ctx) == (cfg.n_layers, cfg.n_ctx):
        return model
    if not 0 <= n_layers <= cfg.n_layers:
        raise ValueError(f"first_n_layers must be between 0 and {cfg.n_layers}, not {n_layers}")
    _check_context(cfg, n_ctx)
    narrow: Any = _empty(cfg, n_layers, n_ctx)
    narrow.to(model.embed.W_E.device)
    state, own = model.state_dict(), narrow.state_dict()
    if "pos_embed.W_pos" in state:
        state["pos_embed.W_pos"] = _rows(state["pos_embed.W_pos"], n_ctx)
    # Tables of rotary angles are as long as the context, and have been computed for the new one.
    narrow.load_state_dict({name: state[name] for name in own if state[name].shape == own[name].shape})
    return narrow.train(model.training)


def _check_context(cfg: HookedTransformerConfig, n_ctx: int) -> None:
    learned = cfg.positional_embedding_type in LEARNED_POSITIONS
    if n_ctx < 1 or (learned and n_ctx > cfg.n_ctx):
        allowed = f"between 1 and {cfg.n_ctx}, the model's learned positions" if learned else "at least 1"
        raise ValueError(f"n_ctx must be {allowed}, not {n_ctx}")
    if n_ctx > cfg.n_ctx:
        logging.warning("n_ctx=%d is longer than the %d tokens that the model was made for", n_ctx, cfg.n_ctx)


def _empty(cfg: HookedTransformerConfig, n_layers: int, n_ctx: int) -> NativeForCausalLM:
    """A model of this config but for its size, whose weights are not drawn."""
    # A config that is made with a seed sets it.
    size = {"n_layers": n_layers, "n_ctx": n_ctx, "init_weights": False, "seed": None}
    fields = fields_of(cfg) | size | {"dtype": cfg.dtype, "device": cfg.device}
    if cfg.attn_types is not None:
        fields["attn_types"] = cfg.attn_types[:n_layers]
    changed = HookedTransformerConfig.from_dict(fields)
    model = NativeForCausalLM.from_cfg(changed)
    changed.init_weights, changed.seed = cfg.init_weights, cfg.seed
    return model


def _rows(positions: Tensor, n_ctx: int) -> Tensor:
    """The first rows; where there are too few (ALiBi's, which nobody reads), zeros."""
    more = torch.zeros(max(n_ctx - len(positions), 0), *positions.shape[1:], dtype=positions.dtype)
    return torch.cat((positions[:n_ctx], more.to(positions.device)))
