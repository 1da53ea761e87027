"""How are the weights of a native model processed?

TransformerLens' five options change the basis in which values are expressed and leave the function alone. A HuggingFace
model is left as it is and shown in the new basis; a native model is one of our own, so its weights are really
rewritten (by `weight_processing.py`), as TransformerLens does, and its norms replaced by ones without gain and bias.
Here is what belongs to a model: which options it allows, what a state dict may lack, and the norms that are left. An
option that cannot be carried out without changing the function is left out, with a warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace

from torch import Tensor

from ..components.abstract_attention import CONSTANTS
from ..components.transformer_block import POST_NORM, norm_for
from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from ..processing import Processing
from ..utilities.activation_functions import softcap_enabled
from ..weight_processing import ProcessWeights
from .body import NativeBody, final_norm

State = dict[str, Tensor]
#: ``normalization_type`` -> that of the norms that are left when gain and bias are folded.
FOLDED: dict[str | None, str] = {"LN": "LNPre", "RMS": "RMSPre"}
#: Gain and bias of the norms that can be folded.
NORM_WEIGHT = re.compile(r"(^|\.)(ln1|ln2|ln_final|mlp\.ln)\.[wb]$")


def process_weights(
    model: NativeBody, options: Processing, state_dict: Mapping[str, Tensor] | None = None
) -> Processing:
    """Rewrite the weights of ``model`` in place; returns the options that were carried out.

    Args:
        model: a native model.
        options: the options wanted.
        state_dict: unprocessed weights to take instead of the model's own; missing ones are kept as they are.

    Raises:
        UnsupportedModelError: (a ValueError) ``refactor_factored_attn_matrices`` where queries and keys are more than
            linear maps of the stream, or shared by heads.
        AssertionError: the same with rotary positions.
        ValueError: ``state_dict`` lacks a weight matrix of a block, or has norms to fold that are not to be folded
            while those of the model were.
    """
    own = model.state_dict()  # type: ignore[attr-defined]
    folded = model.cfg.normalization_type in FOLDED.values()
    state = own if state_dict is None else completed(state_dict, own, folded)
    gains = [name for name in state if name not in own]
    if gains and not options.fold_ln:
        raise ValueError(f"norms that were folded cannot take over {', '.join(gains)}: fold these too (fold_ln=True)")
    options = possible(options, model.cfg, state)
    state = processed(state, model.cfg, options)
    if options.fold_ln and not gains:
        _drop_gains(model)
    model.load_state_dict(state)  # type: ignore[attr-defined]
    return options


def completed(given: Mapping[str, Tensor], own: Mapping[str, Tensor], folded: bool = False) -> State:
    """The weights of ``own`` with those that are given in their place; old state dicts lack constants and biases.

    With ``folded`` the model's norms have lost gain and bias, which are taken over where they are given.

    Raises:
        ValueError: a weight matrix of a block is missing, which is never right.
    """
    missing = [name for name in own if name not in given and not name.endswith(CONSTANTS)]
    matrices = [name for name in missing if "W_" in name]
    if any(name.startswith("blocks.") for name in matrices):
        raise ValueError(f"the state dict lacks weight matrices: {', '.join(matrices)}")
    if matrices:
        logging.warning("missing from the state dict, kept as they are: %s", ", ".join(matrices))
    norms = {name: value for name, value in given.items() if folded and name not in own and NORM_WEIGHT.search(name)}
    unknown = [name for name in given if name not in {*own, *norms} and not name.endswith(CONSTANTS)]
    if unknown:
        logging.warning("in the state dict, but not in the model: %s", ", ".join(unknown))
    return {name: given.get(name, value) for name, value in own.items()} | norms


def possible(options: Processing, cfg: HookedTransformerConfig, state: Mapping[str, Tensor]) -> Processing:
    """The options without those that would change what this model computes; each one left out is warned of."""
    reasons = {
        "fold_ln": _why_not_fold(cfg, state),
        "center_writing_weights": _why_not_center(cfg),
        "center_unembed": _why_not_center_unembed(cfg),
        "fold_value_biases": _why_not_move_biases(cfg),
    }
    left_out = {name: reason for name, reason in reasons.items() if reason and getattr(options, name)}
    for name, reason in left_out.items():
        logging.warning("%s is left out: %s", name, reason)
    if options.refactor_factored_attn_matrices:
        _check_refactoring(cfg)
    return replace(options, **dict.fromkeys(left_out, False))


def processed(state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig, options: Processing) -> State:
    """A state dict rewritten by these options; norms that were folded are no longer in it."""
    state = ProcessWeights.process_weights(dict(state_dict), cfg, **asdict(options))
    # A gate gets a bias there, which is zero (`possible` sees to that) and has no place in the model.
    kept = [name for name in state_dict if not (options.fold_ln and NORM_WEIGHT.search(name))]
    return {name: state[name] for name in kept}


# --- what stands in the way -------------------------------------------------------------------------------------------


def _why_not_fold(cfg: HookedTransformerConfig, state: Mapping[str, Tensor]) -> str | None:
    folded_now = cfg.normalization_type in FOLDED.values() and "ln_final.w" in state
    if cfg.normalization_type not in FOLDED and not folded_now:
        return f"norms of type {cfg.normalization_type!r} have no gain to fold"
    if cfg.original_architecture in POST_NORM:
        return "the norms stand behind attention and MLP, so no weight reads them"
    if cfg.positional_embedding_type == "shortformer":
        return "positions are added between the norm and the weights that read it"
    if not cfg.attn_only and (cfg.gated_mlp or cfg.num_experts):
        shifts = (state.get(f"blocks.{layer}.ln2.b") for layer in range(cfg.n_layers))
        if any(shift is not None and shift.any() for shift in shifts):
            return "the gate has no bias that could take over the norm's"
    return None


def _why_not_center(cfg: HookedTransformerConfig) -> str | None:
    if cfg.normalization_type not in ("LN", "LNPre"):
        return "only layer norms make the mean of the residual stream irrelevant"
    if cfg.final_rms:
        return "the last norm is an RMS norm, which sees the mean"
    if cfg.positional_embedding_type == "shortformer":
        return "positions are read without a norm"
    if cfg.original_architecture in POST_NORM:
        return "the residual stream is read without a norm"
    return None


def _why_not_center_unembed(cfg: HookedTransformerConfig) -> str | None:
    if softcap_enabled(cfg.output_logits_soft_cap):
        return "the softcap on logits does not commute with adding a constant"
    return None


def _why_not_move_biases(cfg: HookedTransformerConfig) -> str | None:
    if cfg.use_attention_sinks:
        return "with attention sinks patterns do not sum to one"
    if cfg.clip_qkv is not None:
        return "values are clipped after their bias was added"
    return None


def _check_refactoring(cfg: HookedTransformerConfig) -> None:
    if cfg.positional_embedding_type == "rotary":
        raise AssertionError("refactor_factored_attn_matrices: with rotary positions, QK depends on the distance")
    obstacles = {
        "heads share keys and values": cfg.n_key_value_heads is not None,
        "queries and keys are normed": cfg.use_qk_norm or cfg.original_architecture in POST_NORM,
        "clip_qkv is set": cfg.clip_qkv is not None,
        "attention sinks keep patterns from summing to one": cfg.use_attention_sinks,
    }
    found = [obstacle for obstacle, there in obstacles.items() if there]
    if found:
        raise UnsupportedModelError(f"refactor_factored_attn_matrices would change the model: {'; '.join(found)}")


# --- the model --------------------------------------------------------------------------------------------------------


def _drop_gains(model: NativeBody) -> None:
    """Put norms without gain and bias in the place of those that were folded; hooks on those are gone."""
    cfg = model.cfg
    cfg.normalization_type = FOLDED[cfg.normalization_type]
    device = model.embed.W_E.device
    for block in model.blocks:
        block.normalization_type = cfg.normalization_type
        block.ln1 = norm_for(cfg).to(device)
        if not cfg.attn_only:
            block.ln2 = norm_for(cfg).to(device)
            if "ln" in block.mlp._modules:
                block.mlp.select_activation_norm()
    model.ln_final = final_norm(cfg).to(device)
