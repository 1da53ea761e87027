"""How are the weights of a native model processed?

TransformerLens' five options change the basis in which values are expressed and leave the function alone
(`lensbridge.processing` says what each does). A HuggingFace model is left as it is and shown in the new basis; a native
model is one of our own, so its weights are really rewritten, as TransformerLens does, and its norms replaced by ones
without gain and bias. An option that cannot be carried out without changing the function is left out, with a warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..components.abstract_attention import CONSTANTS
from ..components.transformer_block import POST_NORM, norm_for
from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from ..processing import Processing, refactor_attention
from ..utilities.activation_functions import softcap_enabled
from .body import LEARNED_POSITIONS, NativeBody, final_norm

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
    dtypes = {name: value.dtype for name, value in state_dict.items()}
    half = (torch.float16, torch.bfloat16)
    state = {name: value.float() if value.dtype in half else value.clone() for name, value in state_dict.items()}
    centres = options.center_writing_weights
    if options.fold_ln:
        _fold_norms(state, cfg)
    if centres:
        _center_writers(state, cfg)
    if options.center_unembed:
        state["unembed.W_U"] -= state["unembed.W_U"].mean(-1, keepdim=True)
        state["unembed.b_U"] -= state["unembed.b_U"].mean()
    for layer in range(cfg.n_layers):
        attn = f"blocks.{layer}.attn."
        if options.fold_value_biases:
            _move_value_biases(state, attn)
            if centres:
                state[attn + "b_O"] -= state[attn + "b_O"].mean()
        if options.refactor_factored_attn_matrices:
            names = [f"{kind}_{part}" for kind in "Wb" for part in "QKVO"]
            new = refactor_attention({name: state[attn + name] for name in names})
            state |= {attn + name: new[name] for name in names}
    return {name: value.to(dtypes[name]) for name, value in state.items()}


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
        "positions are added for queries and keys alone": cfg.positional_embedding_type == "shortformer",
        "clip_qkv is set": cfg.clip_qkv is not None,
        "attention sinks keep patterns from summing to one": cfg.use_attention_sinks,
    }
    found = [obstacle for obstacle, there in obstacles.items() if there]
    if found:
        raise UnsupportedModelError(f"refactor_factored_attn_matrices would change the model: {'; '.join(found)}")


# --- the options ------------------------------------------------------------------------------------------------------


def _fold_norms(state: State, cfg: HookedTransformerConfig) -> None:
    centres = cfg.normalization_type in ("LN", "LNPre")
    group = "" if cfg.n_key_value_heads is None else "_"
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        keys_and_values = [(f"{group}W_{part}", f"{group}b_{part}") for part in "KV"]
        readers = {f"{block}.attn.{w}": f"{block}.attn.{b}" for w, b in [("W_Q", "b_Q"), *keys_and_values]}
        _fold(state, f"{block}.ln1", readers, centres)
        if not cfg.attn_only:
            _fold(state, f"{block}.ln2", _mlp_readers(cfg, f"{block}.mlp."), centres)
            # The norm of the activations has the width of the MLP.
            _fold(state, f"{block}.mlp.ln", {f"{block}.mlp.W_out": f"{block}.mlp.b_out"}, centres)
    _fold(state, "ln_final", {"unembed.W_U": "unembed.b_U"}, centres and not cfg.final_rms)


def _mlp_readers(cfg: HookedTransformerConfig, mlp: str) -> dict[str, str | None]:
    """The weights that read an MLP's input, with the bias that can take over a norm's."""
    if cfg.num_experts:
        experts = [f"{mlp}experts.{number}.{name}" for number in range(cfg.num_experts) for name in ("W_in", "W_gate")]
        return {f"{name}.weight": None for name in (f"{mlp}W_gate", *experts)}
    if cfg.gated_mlp:
        return {f"{mlp}W_in": None, f"{mlp}W_gate": None}
    return {f"{mlp}W_in": f"{mlp}b_in"}


def _fold(state: State, norm: str, readers: Mapping[str, str | None], centres: bool) -> None:
    """Fold one norm into the weights that read it, and make those ignore the mean that it takes out."""
    gain, shift = state.pop(f"{norm}.w", None), state.pop(f"{norm}.b", None)
    if gain is None:
        return
    for name, bias in readers.items():
        # nn.Linear has its weights the other way round.
        turned = name.endswith(".weight")
        weight = state[name].T if turned else state[name]
        if shift is not None and bias is not None:
            state[bias] = state[bias] + (weight * shift[:, None]).sum(-2)
        weight = weight * gain[:, None]
        if centres:
            weight = weight - weight.mean(-2, keepdim=True)
        state[name] = weight.T if turned else weight


def _center_writers(state: State, cfg: HookedTransformerConfig) -> None:
    for name in _writers(cfg):
        if name in state:
            along = 0 if name.endswith("W_out.weight") else -1
            state[name] = state[name] - state[name].mean(along, keepdim=True)


def _writers(cfg: HookedTransformerConfig) -> Iterator[str]:
    """Everything that is added to the residual stream, by name; not all of it is in every model."""
    yield "embed.W_E"
    if cfg.positional_embedding_type in LEARNED_POSITIONS:
        yield "pos_embed.W_pos"
    for layer in range(cfg.n_layers):
        yield from (f"blocks.{layer}.attn.{name}" for name in ("W_O", "b_O"))
        yield from (f"blocks.{layer}.mlp.{name}" for name in ("W_out", "b_out"))
        for expert in range(cfg.num_experts or 0):
            yield from (f"blocks.{layer}.mlp.experts.{expert}.W_out.{name}" for name in ("weight", "bias"))


def _move_value_biases(state: State, attn: str) -> None:
    weight, name = state[attn + "W_O"], attn + ("_b_V" if attn + "_b_V" in state else "b_V")
    biases = state[name].repeat_interleave(len(weight) // len(state[name]), dim=0)
    state[attn + "b_O"] = state[attn + "b_O"] + torch.einsum("hd,hdm->m", biases, weight)
    state[name] = torch.zeros_like(state[name])


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
