"""How is a whole state dict in TransformerLens' names processed?

`processing.py` says what each option does to the weights of one branch; here the branches are found in a state dict, by
name, and the new weights go where the old ones were. The argument is left as it is: what comes back is a new dict, in
which the tensors that no option touches are the same objects.

Names that begin with an underscore (``_W_K``: keys and values that several query heads share) and weights that lie the
other way round (those of an ``nn.Linear``, whose names end in ``.weight``) are told by their names and shapes. A state
dict in other names is read through an *adapter*; `adapted_weights.py` says what that is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import adapted_weights
from .adapted_weights import component_path
from .processing import (
    ATTENTION_READERS,
    MLP_READERS,
    UNEMBED_READERS,
    Weights,
    center,
    fold_norm_into,
    move_value_bias,
    refactor_attention,
)
from .utilities.tensors import filter_dict_by_prefix

#: Models whose norms stand behind attention and MLP, so that the first attention reads the embedding as it is.
POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
#: Position embeddings that have no weight that is added to the residual stream.
NO_POSITIONS = ("rotary", "alibi", "none")
#: Where d_model is in the matrices that may lie the other way round.
_WIDTH_AXIS = {"W_in": -2, "W_gate": -2, "W_U": -2, "W_out": -1}

Change = Callable[[Weights], Weights]


class ProcessWeights:
    """TransformerLens' five processing options on state dicts (TransformerLens' class of the same name).

    Every method takes tensors or a state dict and returns new ones. ``cfg`` is any object with the fields of a config;
    those that it lacks have the defaults of `HookedTransformerConfig`.
    """

    # --- single weights -----------------------------------------------------------------------------------------------

    @staticmethod
    def fold_layer_norm_bias_single(w_tensor: Tensor, b_tensor: Tensor, ln_bias: Tensor) -> Tensor:
        """The bias, [heads, d_head], of a projection that takes over a norm's bias, [d_model]."""
        return fold_norm_into({"W": w_tensor, "b": b_tensor, **_norm(None, ln_bias)}, {"W": "b"})["b"]

    @staticmethod
    def fold_layer_norm_weight_single(w_tensor: Tensor, ln_weight: Tensor) -> Tensor:
        """The weight, [heads, d_model, d_head], of a projection that takes over a norm's gain, [d_model]."""
        return fold_norm_into({"W": w_tensor, **_norm(ln_weight)}, {"W": "b"}, center_weights=False)["W"]

    @staticmethod
    def center_weight_single(w_tensor: Tensor) -> Tensor:
        """The weight, [heads, d_model, d_head], of a projection that ignores the mean of what it reads."""
        return fold_norm_into({"W": w_tensor}, {"W": "b"})["W"]

    @staticmethod
    def fold_layer_norm_biases(
        wq_tensor: Tensor,
        wk_tensor: Tensor,
        wv_tensor: Tensor,
        bq_tensor: Tensor | None,
        bk_tensor: Tensor | None,
        bv_tensor: Tensor | None,
        ln_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`fold_layer_norm_bias_single` for queries, keys and values; a bias that is None counts as zero."""
        weights = {"W_Q": wq_tensor, "W_K": wk_tensor, "W_V": wv_tensor}
        biases = {"b_Q": bq_tensor, "b_K": bk_tensor, "b_V": bv_tensor}
        there = {name: bias for name, bias in biases.items() if bias is not None}
        new = fold_norm_into({**weights, **there, **_norm(None, ln_bias)}, ATTENTION_READERS)
        return new["b_Q"], new["b_K"], new["b_V"]

    @staticmethod
    def fold_layer_norm_weights(
        wq_tensor: Tensor, wk_tensor: Tensor, wv_tensor: Tensor, ln_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`fold_layer_norm_weight_single` for queries, keys and values."""
        fold = ProcessWeights.fold_layer_norm_weight_single
        return fold(wq_tensor, ln_weight), fold(wk_tensor, ln_weight), fold(wv_tensor, ln_weight)

    @staticmethod
    def center_attention_weights(
        wq_tensor: Tensor, wk_tensor: Tensor, wv_tensor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`center_weight_single` for queries, keys and values."""
        centre = ProcessWeights.center_weight_single
        return centre(wq_tensor), centre(wk_tensor), centre(wv_tensor)

    # --- state dicts --------------------------------------------------------------------------------------------------

    @staticmethod
    def fold_layer_norm(
        state_dict: Weights, cfg: Any, fold_biases: bool = True, center_weights: bool = True, adapter: Any = None
    ) -> Weights:
        """Every norm folded into the weights that read it; the norms' own parameters become ones and zeros.

        For RMS norms both flags should be off, as `process_weights` has it; for a last one (``cfg.final_rms``) among
        layer norms they are. Experts take over a gain only: a norm with a bias in front of them stays as it is.

        Raises:
            ValueError: if a layer has ``W_Q`` and lacks ``W_K`` or ``W_V``.
        """

        def change(state: Weights) -> Weights:
            for layer in range(cfg.n_layers):
                _fold_layer(state, cfg, layer, fold_biases, center_weights)
            if "ln_final.w" in state:
                # An RMS norm has no bias and leaves the mean in.
                layer_norm = not getattr(cfg, "final_rms", False)
                last = _folding(UNEMBED_READERS, fold_biases and layer_norm, center_weights and layer_norm)
                _on(state, cfg, "ln_final.", "unembed.", last)
            return state

        return adapted_weights.through(adapter, state_dict, cfg, change)

    @staticmethod
    def center_writing_weights(state_dict: Weights, cfg: Any, adapter: Any = None) -> Weights:
        """Everything that writes to the residual stream, centred over d_model.

        Embeddings of models without norms before attention (OLMo 2 and 3) stay as they are.

        Raises:
            KeyError: if an embedding that the config asks for is not in the state dict.
        """

        def change(state: Weights) -> Weights:
            if getattr(cfg, "original_architecture", None) not in POST_NORM:
                _center_embeddings(state, cfg)
            for layer in range(cfg.n_layers):
                _on(state, cfg, None, f"blocks.{layer}.attn.", lambda w: center(w, ("W_O", "b_O")))
                if not getattr(cfg, "attn_only", False):
                    _on(state, cfg, None, f"blocks.{layer}.mlp.", lambda w: center(w, _writers(w)))
            return state

        return adapted_weights.through(adapter, state_dict, cfg, change)

    @staticmethod
    def center_unembed(state_dict: Weights, cfg: Any = None, adapter: Any = None) -> Weights:
        """The unembedding, centred over the vocabulary.

        Raises:
            KeyError: if the state dict has no unembedding.
        """

        def change(state: Weights) -> Weights:
            _require(state, "unembed.W_U")
            _on(state, cfg, None, "unembed.", lambda w: center(w, ("W_U", "b_U")))
            return state

        return adapted_weights.through(adapter, state_dict, cfg, change)

    @staticmethod
    def fold_value_biases(state_dict: Weights, cfg: Any, adapter: Any = None) -> Weights:
        """Every ``b_V`` carried into its layer's ``b_O``, which is made where there is none.

        Raises:
            ValueError: if the heads of ``b_V`` and ``W_O`` do not match.
        """

        def change(state: Weights) -> Weights:
            for layer in range(cfg.n_layers):
                _on(state, cfg, None, f"blocks.{layer}.attn.", lambda w: move_value_bias(w) if "b_V" in w else w)
            return state

        return adapted_weights.through(adapter, state_dict, cfg, change)

    @staticmethod
    def refactor_factored_attn_matrices(state_dict: Weights, cfg: Any, adapter: Any = None) -> Weights:
        """Every head's QK and OV circuits rewritten by their singular value decomposition.

        Raises:
            AssertionError: with rotary positions (QK depends on the distance), or if a bias is missing.
            ValueError: if heads share keys and values, or a weight of a layer is missing.
        """
        if getattr(cfg, "positional_embedding_type", "standard") == "rotary":
            raise AssertionError("refactor_factored_attn_matrices: with rotary positions, QK depends on the distance")

        def change(state: Weights) -> Weights:
            for layer in range(cfg.n_layers):
                if f"blocks.{layer}.attn.W_Q" in state:
                    _check_refactoring(state, f"blocks.{layer}.attn.")
                    _on(state, cfg, None, f"blocks.{layer}.attn.", refactor_attention)
            return state

        return adapted_weights.through(adapter, state_dict, cfg, change)

    @staticmethod
    def process_weights(
        state_dict: Weights,
        cfg: Any,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
        adapter: Any = None,
    ) -> Weights:
        """All the options that are on, in TransformerLens' order, computed in float32 at least.

        What only layer norms allow (biases, centring) is left out for other norms, and centring of what is written
        also where ``cfg.final_rms`` says that the last norm sees the mean.
        """
        half = {name: w.dtype for name, w in state_dict.items() if w.dtype in (torch.float16, torch.bfloat16)}
        state = {name: w.float() if name in half else w for name, w in state_dict.items()}
        norm = getattr(cfg, "normalization_type", "LN")
        layer_norms = norm in ("LN", "LNPre")
        if _allowed(fold_ln, adapter, "fold_ln") and (layer_norms or norm in ("RMS", "RMSPre")):
            state = ProcessWeights.fold_layer_norm(state, cfg, layer_norms, layer_norms, adapter)
        centres = _allowed(center_writing_weights, adapter, "center_writing_weights")
        if centres and layer_norms and not getattr(cfg, "final_rms", False):
            state = ProcessWeights.center_writing_weights(state, cfg, adapter)
        if center_unembed:
            state = ProcessWeights.center_unembed(state, cfg, adapter)
        if fold_value_biases:
            # Centred W_O leaves b_O centred.
            state = ProcessWeights.fold_value_biases(state, cfg, adapter)
        if refactor_factored_attn_matrices:
            state = ProcessWeights.refactor_factored_attn_matrices(state, cfg, adapter)
        made = next(iter(half.values())) if len(half) == len(state_dict) else None
        return {name: w.to(half.get(name, w.dtype if name in state_dict else made)) for name, w in state.items()}

    # --- adapters -----------------------------------------------------------------------------------------------------

    @staticmethod
    def extract_attention_tensors_for_folding(
        state_dict: Weights, cfg: Any, layer: int, adapter: Any
    ) -> dict[str, Tensor | None | dict[str, str]]:
        """One layer's attention weights and norm, in TransformerLens' shapes: ``wq``, ``bq``, ..., ``ln1_w``, ``ln1_b``
        (None for what is missing), and under ``keys`` where in the state dict each was looked for."""
        keys = {}
        for name in ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V"):
            plain, grouped = f"blocks.{layer}.attn.{name}", f"blocks.{layer}.attn._{name}"
            keys[name] = component_path(plain) if adapter else plain if plain in state_dict else grouped
        for name in ("w", "b"):
            plain = f"blocks.{layer}.ln1.{name}"
            keys[f"ln1_{name}"] = component_path(plain) if adapter else plain
        found = {name: state_dict.get(key) for name, key in keys.items()}
        if adapter:
            found |= adapted_weights.attention(state_dict, cfg, layer, adapter)
        out: dict[str, Any] = {name.replace("_", "").lower(): found[name] for name in ATTENTION_READERS}
        out |= {name.replace("_", "").lower(): found[name] for name in ATTENTION_READERS.values()}
        return out | {"ln1_b": found["ln1_b"], "ln1_w": found["ln1_w"], "keys": keys}

    @staticmethod
    def convert_tensor_to_tl_format(
        param_name: str,
        model_state_dict: Weights,
        tensor: Tensor | None,
        cfg: Any,
        adapter: Any = None,
        layer_idx: int | None = None,
    ) -> Tensor | None:
        """A weight in TransformerLens' shape, by the adapter's conversion for its name; as it is without one."""
        return adapted_weights.to_transformer_lens(param_name, model_state_dict, tensor, adapter)

    @staticmethod
    def convert_tensor_to_hf_format(
        param_name: str, tensor: Tensor | None, cfg: Any, adapter: Any = None, layer_idx: int | None = None
    ) -> Tensor | None:
        """The inverse of `convert_tensor_to_tl_format`; None stays None."""
        return adapted_weights.from_transformer_lens(param_name, tensor, adapter)

    @staticmethod
    def distribute_weights_to_components(
        state_dict: Weights, component_mapping: Mapping[str, Any], verbose: bool = False
    ) -> None:
        """Hand every component the weights below its name, through its ``set_processed_weights(weights, verbose=)``.

        Args:
            state_dict: weights by component, such as ``"blocks.0.attn.q.weight"``.
            component_mapping: name -> (path in the original model, the component or a list of them).
            verbose: print what goes where.

        Raises:
            ValueError: if the mapping holds something else than such a pair.
        """
        for name, pair in component_mapping.items():
            if not isinstance(pair, tuple):
                raise ValueError(f"component {name!r} must come as (path, component), not as {type(pair).__name__}")
            path, component = pair
            mine = filter_dict_by_prefix(state_dict, name)
            numbered = enumerate(component) if isinstance(component, list) else [(None, component)]
            for index, instance in numbered:
                weights = mine if index is None else filter_dict_by_prefix(mine, str(index))
                if verbose:
                    print(
                        f"{name}{'' if index is None else f'.{index}'} ({path}): {', '.join(weights) or 'no weights'}"
                    )
                if weights:
                    instance.set_processed_weights(weights, verbose=verbose)


# --- branches of a state dict -----------------------------------------------------------------------------------------


def _norm(gain: Tensor | None, shift: Tensor | None = None) -> Weights:
    """A norm of which only one part matters, as `fold_norm_into` takes it."""
    if gain is None:
        assert shift is not None
        return {"ln.w": torch.ones_like(shift), "ln.b": shift}
    return {"ln.w": gain}


def _on(
    state: Weights,
    cfg: Any,
    norm: str | Mapping[str, Tensor] | None,
    prefix: str,
    change: Change,
) -> None:
    """Replace the weights below ``prefix`` in ``state``, with the norm before them, by what ``change`` makes of them.

    Args:
        state: is changed.
        cfg: for the width of the model, and for whether gains are stored less one.
        norm: the prefix of the norm; or a norm that something else takes over, as ``{"w": ..., "b": ...}``.
        prefix: of the weights.
        change: given and returning names without prefix, with the norm's as ``ln.w`` and ``ln.b``.
    """
    keys = {key[len(prefix) :].removeprefix("_"): key for key in state if key.startswith(prefix)}
    keys = {short: key for short, key in keys.items() if not short.startswith("ln.")}
    here = {short: state[key] for short, key in keys.items()}
    flipped = {short for short, w in here.items() if _lies_flipped(short, w, getattr(cfg, "d_model", None))}
    before = {short: w.T if short in flipped else w for short, w in here.items()}
    if not keys:
        return
    parts = {part: f"{norm}{part}" for part in "wb"} if isinstance(norm, str) else {}
    gains = {part: state[key] for part, key in parts.items() if key in state}
    if isinstance(norm, Mapping):
        gains = dict(norm)
    offset = 1.0 if getattr(cfg, "rmsnorm_uses_offset", False) else 0.0
    before |= {f"ln.{part}": gain + offset if part == "w" and offset else gain for part, gain in gains.items()}
    for short, new in change(before).items():
        if new is before.get(short):
            continue
        if short.startswith("ln."):
            if parts:
                state[parts[short[-1]]] = new - offset if short == "ln.w" and offset else new
        else:
            state[keys.get(short) or _new_key(prefix, short, keys)] = new.T if short in flipped else new


def _new_key(prefix: str, bias: str, keys: Mapping[str, str]) -> str:
    """Where a bias goes that was not there before: it is named as its weight is."""
    weight = keys.get("W" + bias[1:], "")
    return prefix + ("_" if weight.startswith(f"{prefix}_") else "") + bias


def _lies_flipped(short: str, weight: Tensor, d_model: int | None) -> bool:
    """Whether a matrix is [out, in]: an ``nn.Linear``'s is, and one that has the model's width on the other side."""
    axis = _WIDTH_AXIS.get(short.removesuffix(".weight").rpartition(".")[2])
    if axis is None or weight.ndim != 2:
        return False
    return short.endswith(".weight") or (weight.shape[axis] != d_model and weight.shape[-3 - axis] == d_model)


# --- folding ----------------------------------------------------------------------------------------------------------


def _folding(readers: Mapping[str, str], fold_biases: bool, center_weights: bool) -> Change:
    return lambda w: fold_norm_into(w, readers, fold_biases, center_weights)


def _fold_layer(state: Weights, cfg: Any, layer: int, fold_biases: bool, center_weights: bool) -> None:
    block = f"blocks.{layer}."
    first = {part: state[f"{block}ln1.{part}"] for part in "wb" if f"{block}ln1.{part}" in state}
    if f"{block}attn.W_Q" in state or f"{block}attn._W_Q" in state:
        _check_folding(state, f"{block}attn.")
        _on(state, cfg, f"{block}ln1.", f"{block}attn.", _folding(ATTENTION_READERS, fold_biases, center_weights))
    elif "b" not in first or not fold_biases or f"{block}conv.b_in" in state:
        # A short convolution in the place of attention (LFM 2).
        _on(state, cfg, f"{block}ln1.", f"{block}conv.", _folding({"W_in": "b_in"}, fold_biases, False))
    if getattr(cfg, "attn_only", False):
        return
    shares = getattr(cfg, "parallel_attn_mlp", False) and first and f"{block}ln2.w" not in state
    norm = first if shares else f"{block}ln2."
    if getattr(cfg, "num_experts", None):
        _on(state, cfg, norm, f"{block}mlp.", _fold_experts)
        return
    _on(state, cfg, norm, f"{block}mlp.", _folding(MLP_READERS, fold_biases, center_weights))
    if (getattr(cfg, "act_fn", None) or "").startswith("solu") and f"{block}mlp.ln.w" in state:
        _on(state, None, f"{block}mlp.ln.", f"{block}mlp.", _folding({"W_out": "b_out"}, fold_biases, center_weights))


def _fold_experts(w: Weights) -> Weights:
    """All experts and their router read the same norm; without the experts' weights it has to stay."""
    readers = [name for name in w if name.removesuffix(".weight").rpartition(".")[2] in ("W_in", "W_gate")]
    if ("ln.b" in w and w["ln.b"].any()) or not any("experts." in name for name in readers):
        return w
    return fold_norm_into(w, dict.fromkeys(readers, ""), fold_biases=False, center_weights=False)


def _writers(w: Weights) -> tuple[str, ...]:
    """The weights of an MLP, or of its experts, that write to the residual stream."""
    names = {name: name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for name in w}
    return tuple(name for name, last in names.items() if last in ("W_out", "b_out"))


def _center_embeddings(state: Weights, cfg: Any) -> None:
    names = ["embed.W_E"]
    if getattr(cfg, "positional_embedding_type", "standard") not in NO_POSITIONS:
        names.append("pos_embed.W_pos")
    _require(state, *names)
    state.update(center({name: state[name] for name in names}, tuple(names)))


# --- refusals ---------------------------------------------------------------------------------------------------------


def _require(state: Weights, *names: str) -> None:
    for name in names:
        if name not in state:
            raise KeyError(f"{name!r} is not in the state dict, which has {', '.join(list(state)[:10])}, ...")


def _check_folding(state: Weights, prefix: str) -> None:
    missing = [name for name in ATTENTION_READERS if prefix + name not in state and f"{prefix}_{name}" not in state]
    if missing:
        raise ValueError(f"{prefix}W_Q is in the state dict, but {', '.join(missing)} of the same layer is not")


def _check_refactoring(state: Weights, prefix: str) -> None:
    missing = [name for name in ("W_K", "W_V", "W_O") if prefix + name not in state]
    if missing:
        raise ValueError(
            f"{prefix}W_Q is in the state dict, but {', '.join(missing)} of the same layer is not (under this name: "
            "keys and values that heads share cannot be refactored)"
        )
    biases = [name for name in ("b_Q", "b_K", "b_V", "b_O") if prefix + name not in state]
    if biases:
        raise AssertionError(f"refactoring needs the biases of {prefix[:-1]}: {', '.join(biases)} missing")


def _allowed(wanted: bool, adapter: Any, option: str) -> bool:
    """Whether an option is on and the adapter, if there is one, does not rule it out."""
    if not wanted or adapter is None or getattr(adapter, f"supports_{option}", True):
        return wanted
    warnings.warn(f"{type(adapter).__name__} does not support {option}, which is left out", UserWarning, stacklevel=3)
    return False
