"""How is a state dict in another model's names read and written in TransformerLens' names and shapes?

By an *adapter*: an object with ``weight_processing_conversions``, a dict from the path of a weight, with ``{i}`` for
the layer, to the conversion of its tensor (a `ParamProcessingConversion`, or anything with its ``convert`` and
``revert``). The paths are those of components: ``blocks.0.attn.W_Q`` is ``blocks.0.attn.q.weight``. This is the
protocol that TransformerLens 3.9.0's bridge adapters follow, as far as weight processing uses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .conversion_utils.conversion_steps import BaseTensorConversion, ChainTensorConversion, SplitTensorConversion
from .processing import Weights

#: The last part of a weight's name -> of a component's path.
_WORDS = {"W": "weight", "b": "bias"}
_PATHS = {
    **{f"{kind}_{part}": f"{part.lower()}.{word}" for part in "QKVO" for kind, word in _WORDS.items()},
    **{f"{kind}_{part}": f"{part}.{word}" for part in ("in", "gate", "out") for kind, word in _WORDS.items()},
    **{f"{kind}_{part}": word for part in ("E", "pos", "U") for kind, word in _WORDS.items()},
    "w": "weight",
    "b": "bias",
}
_ATTENTION = tuple(f"{kind}_{part}" for part in "QKVO" for kind in "Wb")
_MLP = tuple(f"{kind}_{part}" for part in ("in", "gate", "out") for kind in "Wb")


def component_path(name: str) -> str:
    """``"blocks.0.attn.W_Q"`` -> ``"blocks.0.attn.q.weight"``; names that are no weight's stay."""
    base, dot, last = name.rpartition(".")
    path = _PATHS.get(last.removeprefix("_")) if dot else None
    return f"{base}.{path}" if path else name


def through(adapter: Any, state_dict: Weights, cfg: Any, change: Callable[[Weights], Weights]) -> Weights:
    """A new state dict, in the names of ``state_dict``, with ``change`` made in TransformerLens' names and shapes.

    ``change`` is given a dict of its own. Only what it replaces is written back.
    """
    if adapter is None:
        return change(dict(state_dict))
    before = _in_our_names(state_dict, cfg, adapter)
    out = dict(state_dict)
    for name, value in change(dict(before)).items():
        if value is not before.get(name):
            path = component_path(name)
            new = from_transformer_lens(path, value, adapter)
            old = state_dict.get(path)
            assert new is not None
            # A bias that the adapter leaves flat was given its heads here.
            out[path] = new.reshape(old.shape) if old is not None and old.numel() == new.numel() else new
    return out


def attention(state_dict: Weights, cfg: Any, layer: int, adapter: Any) -> Weights:
    """The attention weights of one layer, without prefix, in TransformerLens' shapes."""
    prefix = f"blocks.{layer}.attn."
    found: Weights = {}
    for name in _ATTENTION:
        path = component_path(prefix + name)
        value = to_transformer_lens(path, state_dict, state_dict.get(path), adapter)
        if value is not None:
            found[name] = value
    for part in "QKV":
        weight, bias = found.get(f"W_{part}"), found.get(f"b_{part}")
        if weight is not None and bias is not None and weight.ndim == 3 and bias.ndim == 1:
            found[f"b_{part}"] = bias.reshape(len(weight), -1)
    return found


def _in_our_names(state_dict: Weights, cfg: Any, adapter: Any) -> Weights:
    """Everything that processing knows, under TransformerLens' names and in its shapes."""
    n_layers = getattr(cfg, "n_layers", 0)
    names = ["embed.W_E", "pos_embed.W_pos", "ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"]
    for layer in range(n_layers):
        block = f"blocks.{layer}."
        names += [block + norm + part for norm in ("ln1.", "ln2.", "mlp.ln.") for part in "wb"]
        names += [f"{block}mlp.{name}" for name in _MLP]
        names += [f"{block}conv.{name}" for name in ("W_in", "b_in")]
    out: Weights = {}
    for name in names:
        path = component_path(name)
        value = to_transformer_lens(path, state_dict, state_dict.get(path), adapter)
        if value is not None:
            out[name] = value
    for layer in range(n_layers):
        out |= {f"blocks.{layer}.attn.{name}": w for name, w in attention(state_dict, cfg, layer, adapter).items()}
    return out


# --- single weights ---------------------------------------------------------------------------------------------------


def _conversion(path: str, adapter: Any) -> Any:
    """The adapter's conversion for the weight at a component's path, or None; a string in its place counts as None."""
    conversions = getattr(adapter, "weight_processing_conversions", None) or {}
    pattern = re.sub(r"blocks\.\d+\.", "blocks.{i}.", path)
    found = conversions.get(pattern, conversions.get(pattern.removesuffix(".weight")))
    return None if isinstance(found, str) else found


def to_transformer_lens(path: str, state_dict: Weights, tensor: Tensor | None, adapter: Any) -> Tensor | None:
    """The weight at ``path``, or the part of another that its conversion takes, in TransformerLens' shape."""
    conversion = None if adapter is None else _conversion(path, adapter)
    if conversion is None or (tensor is None and path not in state_dict):
        return tensor
    source = getattr(conversion, "source_key", None)
    if source is not None and tensor is not None and conversion._resolve_key(path, source) not in state_dict:
        # It was cut out of the other weight before.
        uncut = _without_splits(conversion.tensor_conversion)
        return uncut.convert(tensor, state_dict)
    return conversion.convert(state_dict, path)


def from_transformer_lens(path: str, tensor: Tensor | None, adapter: Any) -> Tensor | None:
    """The inverse of `to_transformer_lens`. What was cut out of another weight stays by itself."""
    conversion = None if adapter is None else _conversion(path, adapter)
    if conversion is None or tensor is None:
        return tensor
    whole = getattr(conversion, "tensor_conversion", None)
    if isinstance(whole, ChainTensorConversion):
        return _without_splits(whole).revert(tensor)
    return conversion.revert(tensor)


def _without_splits(conversion: BaseTensorConversion) -> BaseTensorConversion:
    if not isinstance(conversion, ChainTensorConversion):
        return conversion
    return ChainTensorConversion([c for c in conversion.conversions if not isinstance(c, SplitTensorConversion)])
