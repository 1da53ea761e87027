"""Which activations carry what two prompts differ in?

Activation patching (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"): run the model on a corrupted
prompt, put in one activation of the run on the clean prompt, and measure how much of the clean answer comes back.
Everything here is `generic_activation_patch` with a kind of activation, a grid of indices and a way to put the clean
value in. The patched runs share forward passes (`lensbridge.sweeps`); names and results are those of
``transformer_lens.patching``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import HookError
from .hook_points import HookPoint
from .utils import get_act_name

if TYPE_CHECKING:
    import pandas as pd

    from .activation_cache import ActivationCache
    from .model import HookedTransformer

Logits = torch.Tensor
AxisNames = Literal["layer", "pos", "head_index", "head", "src_pos", "dest_pos"]
CorruptedActivation = torch.Tensor
PatchedActivation = torch.Tensor

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""]]
PatchSetter = Callable[[CorruptedActivation, Sequence[int], Any], PatchedActivation]


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pd.DataFrame:
    """A data frame with one row per combination of indices, each below its column's maximum, the last column fastest.

    Raises:
        ImportError: without pandas.
    """
    rows = list(itertools.product(*map(range, column_max_ranges)))
    return _pandas().DataFrame(rows, columns=list(column_names))


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames of indices need pandas: pip install pandas") from error
    return pandas


# --- the sweep --------------------------------------------------------------------------------------------------------


@overload
def generic_activation_patch(
    model: HookedTransformer,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: Literal[False] = False,
    *,
    batch_size: int | None = None,
    logits_to_keep: int | Int[Tensor, "kept"] = 0,
    progress: bool = True,
) -> Tensor: ...


@overload
def generic_activation_patch(
    model: HookedTransformer,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None,
    index_df: pd.DataFrame | None,
    return_index_df: Literal[True],
    *,
    batch_size: int | None = None,
    logits_to_keep: int | Int[Tensor, "kept"] = 0,
    progress: bool = True,
) -> tuple[Tensor, pd.DataFrame]: ...


def generic_activation_patch(
    model: HookedTransformer,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    batch_size: int | None = None,
    logits_to_keep: int | Int[Tensor, "kept"] = 0,
    progress: bool = True,
) -> Tensor | tuple[Tensor, pd.DataFrame]:
    """Patch one activation per index, each in a run of its own on the corrupted tokens, and measure each run.

    Gives a tensor of metrics with one axis per index axis, or, with ``index_df``, one metric per row. Which indices
    there are is said by exactly one of ``index_axis_names`` and ``index_df``; the first index is the layer.

    Args:
        clean_cache: the cache of the run on the clean tokens.
        patching_metric: from the logits of one patched run to a number.
        patch_setter: called with the corrupted activation, the index and the clean activation; edits the first, or a
            copy, and returns it.
        activation_name: the short name of a point in each layer, as `get_act_name` takes it: "resid_pre", "z", ...
        index_axis_names: the axes to go over: "layer", "pos", "head" (or "head_index"), "src_pos", "dest_pos".
        index_df: a pandas data frame of indices, a row per patch.
        return_index_df: return the pair of (metrics, data frame of indices).
        batch_size: patched runs per forward pass; by default as many as keep the device busy.
        logits_to_keep: give the metric the logits at the last so many positions only, which is faster; 0 is all.
        progress: show a progress bar.

    Raises:
        AssertionError: with both of ``index_axis_names`` and ``index_df``, or none.
        ImportError: for a data frame without pandas.
        KeyError: for an activation that is not in the cache.
        HookError: if the setter's result differs from the activation in shape or dtype (``batch_size=1`` allows it).
    """
    if not callable(patching_metric):
        raise TypeError(f"patching_metric is a function of logits, not a {type(patching_metric).__name__}")
    if (index_df is None) == (index_axis_names is None):
        raise AssertionError("the indices come from index_axis_names or from index_df: give one of them")
    if index_df is not None:
        indices = [row.to_list() for _, row in index_df.iterrows()]
        shape = [len(indices)]
    else:
        assert index_axis_names is not None
        shape = _sizes(model, corrupted_tokens, activation_name, index_axis_names)
        indices = [list(index) for index in itertools.product(*map(range, shape))]
    runs = model.run_sweep(
        corrupted_tokens,
        [_patch(activation_name, index, clean_cache, patch_setter) for index in indices],
        lambda logits: _number(patching_metric(logits)),
        batch_size=batch_size,
        logits_to_keep=logits_to_keep,
        progress=progress,
    )
    patched = torch.tensor(list(runs), dtype=torch.get_default_dtype(), device=model.cfg.device).reshape(shape)
    if not return_index_df:
        return patched
    if index_axis_names is not None:
        index_df = make_df_from_ranges(shape, index_axis_names)
    return patched, index_df


def _number(result: Any) -> float:
    """What a metric gives.

    Raises:
        HookError: (a TypeError and a RuntimeError) it is not one number.
    """
    if isinstance(result, Tensor) and result.numel() == 1:
        return result.item()
    if isinstance(result, (int, float)):
        return result
    found = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else repr(result)
    raise HookError(f"patching_metric has to make one number of the logits [batch, pos, d_vocab]; it gave {found}")


def _sizes(model: Any, tokens: Tensor, activation_name: str, axis_names: Sequence[AxisNames]) -> list[int]:
    heads = model.cfg.n_heads
    if activation_name in ("k", "v") and model.cfg.n_key_value_heads is not None:
        heads = model.cfg.n_key_value_heads
    positions = tokens.shape[-1]
    size = {"layer": model.cfg.n_layers, "pos": positions, "src_pos": positions, "dest_pos": positions}
    size |= {"head": heads, "head_index": heads}
    return [size[name] for name in axis_names]


def _patch(
    activation_name: str, index: list, clean_cache: ActivationCache, patch_setter: PatchSetter
) -> list[tuple[str, Callable]]:
    """The intervention at one index."""
    point = get_act_name(activation_name, layer=index[0])
    clean = clean_cache[point]

    def patch(activation: Tensor, hook: HookPoint) -> Tensor:
        # Setters edit in place, which autograd may not see in a run that is tracked.
        return patch_setter(activation.clone() if activation.requires_grad else activation, index, clean)

    return [(point, patch)]


# --- ways to put the clean value in -----------------------------------------------------------------------------------


def layer_pos_patch_setter(
    corrupted_activation: CorruptedActivation, index: Sequence[int], clean_activation: Tensor
) -> PatchedActivation:
    """Patch ``[batch, pos, ...]`` at ``index = [layer, pos]``."""
    _, pos = _of_length(index, 2)
    corrupted_activation[:, pos] = clean_activation[:, pos]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(
    corrupted_activation: CorruptedActivation, index: Sequence[int], clean_activation: Tensor
) -> PatchedActivation:
    """Patch ``[batch, pos, head, d_head]`` at ``index = [layer, pos, head]``."""
    _, pos, head = _of_length(index, 3)
    corrupted_activation[:, pos, head] = clean_activation[:, pos, head]
    return corrupted_activation


def layer_head_vector_patch_setter(
    corrupted_activation: CorruptedActivation, index: Sequence[int], clean_activation: Tensor
) -> PatchedActivation:
    """Patch ``[batch, pos, head, d_head]`` at ``index = [layer, head]``, at all positions."""
    _, head = _of_length(index, 2)
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


def layer_head_pattern_patch_setter(
    corrupted_activation: CorruptedActivation, index: Sequence[int], clean_activation: Tensor
) -> PatchedActivation:
    """Patch ``[batch, head, dest_pos, src_pos]`` at ``index = [layer, head]``."""
    _, head = _of_length(index, 2)
    corrupted_activation[:, head] = clean_activation[:, head]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: CorruptedActivation, index: Sequence[int], clean_activation: Tensor
) -> PatchedActivation:
    """Patch ``[batch, head, dest_pos, src_pos]`` at ``index = [layer, head, dest_pos]``."""
    _, head, dest_pos = _of_length(index, 3)
    corrupted_activation[:, head, dest_pos] = clean_activation[:, head, dest_pos]
    return corrupted_activation


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: CorruptedActivation, index: Sequence[int], clean_activation: Tensor
) -> PatchedActivation:
    """Patch ``[batch, head, dest_pos, src_pos]`` at ``index = [layer, head, dest_pos, src_pos]``."""
    _, head, dest_pos, src_pos = _of_length(index, 4)
    corrupted_activation[:, head, dest_pos, src_pos] = clean_activation[:, head, dest_pos, src_pos]
    return corrupted_activation


def _of_length(index: Sequence[int], length: int) -> Sequence[int]:
    if len(index) != length:
        raise AssertionError(f"this patch setter takes {length} indices, layer first, not {list(index)}")
    return index


# --- sweeps over one kind of activation -------------------------------------------------------------------------------
# All take (model, corrupted_tokens, clean_cache, patching_metric) and give one axis per index axis.

#: The residual stream before each block, ``[layer, pos]``.
get_act_patch_resid_pre = partial(
    generic_activation_patch,
    patch_setter=layer_pos_patch_setter,
    activation_name="resid_pre",
    index_axis_names=("layer", "pos"),
)
#: The residual stream between attention and MLP, ``[layer, pos]``.
get_act_patch_resid_mid = partial(
    generic_activation_patch,
    patch_setter=layer_pos_patch_setter,
    activation_name="resid_mid",
    index_axis_names=("layer", "pos"),
)
#: What each attention layer adds, ``[layer, pos]``.
get_act_patch_attn_out = partial(
    generic_activation_patch,
    patch_setter=layer_pos_patch_setter,
    activation_name="attn_out",
    index_axis_names=("layer", "pos"),
)
#: What each MLP adds, ``[layer, pos]``.
get_act_patch_mlp_out = partial(
    generic_activation_patch,
    patch_setter=layer_pos_patch_setter,
    activation_name="mlp_out",
    index_axis_names=("layer", "pos"),
)
#: Each head's output ``z``, ``[layer, pos, head]``.
get_act_patch_attn_head_out_by_pos = partial(
    generic_activation_patch,
    patch_setter=layer_pos_head_vector_patch_setter,
    activation_name="z",
    index_axis_names=("layer", "pos", "head"),
)
#: Each head's queries, ``[layer, pos, head]``.
get_act_patch_attn_head_q_by_pos = partial(
    generic_activation_patch,
    patch_setter=layer_pos_head_vector_patch_setter,
    activation_name="q",
    index_axis_names=("layer", "pos", "head"),
)
#: Each key head's keys, ``[layer, pos, head]``.
get_act_patch_attn_head_k_by_pos = partial(
    generic_activation_patch,
    patch_setter=layer_pos_head_vector_patch_setter,
    activation_name="k",
    index_axis_names=("layer", "pos", "head"),
)
#: Each value head's values, ``[layer, pos, head]``.
get_act_patch_attn_head_v_by_pos = partial(
    generic_activation_patch,
    patch_setter=layer_pos_head_vector_patch_setter,
    activation_name="v",
    index_axis_names=("layer", "pos", "head"),
)
#: Each head's attention pattern, row by row, ``[layer, head, dest_pos]``.
get_act_patch_attn_head_pattern_by_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_pos_pattern_patch_setter,
    activation_name="pattern",
    index_axis_names=("layer", "head_index", "dest_pos"),
)
#: Each entry of each head's attention pattern, ``[layer, head, dest_pos, src_pos]``.
get_act_patch_attn_head_pattern_dest_src_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_dest_src_pos_pattern_patch_setter,
    activation_name="pattern",
    index_axis_names=("layer", "head_index", "dest_pos", "src_pos"),
)
#: Each head's output ``z`` at all positions, ``[layer, head]``.
get_act_patch_attn_head_out_all_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_vector_patch_setter,
    activation_name="z",
    index_axis_names=("layer", "head"),
)
#: Each head's queries at all positions, ``[layer, head]``.
get_act_patch_attn_head_q_all_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_vector_patch_setter,
    activation_name="q",
    index_axis_names=("layer", "head"),
)
#: Each key head's keys at all positions, ``[layer, head]``.
get_act_patch_attn_head_k_all_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_vector_patch_setter,
    activation_name="k",
    index_axis_names=("layer", "head"),
)
#: Each value head's values at all positions, ``[layer, head]``.
get_act_patch_attn_head_v_all_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_vector_patch_setter,
    activation_name="v",
    index_axis_names=("layer", "head"),
)
#: Each head's whole attention pattern, ``[layer, head]``.
get_act_patch_attn_head_pattern_all_pos = partial(
    generic_activation_patch,
    patch_setter=layer_head_pattern_patch_setter,
    activation_name="pattern",
    index_axis_names=("layer", "head_index"),
)


# --- several kinds at once --------------------------------------------------------------------------------------------


def get_act_patch_attn_head_all_pos_every(
    model: HookedTransformer,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: ActivationCache,
    metric: Metric,
    **options: Any,
) -> Float[Tensor, "patch_type layer head"]:
    """Patch each head's output, queries, keys, values and pattern (in this order) at all positions.

    With fewer key and value heads than heads, their rows end with zeros. ``options`` are the keyword-only arguments of
    `generic_activation_patch`.
    """
    sweeps = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    results = [sweep(model, corrupted_tokens, clean_cache, metric, **options) for sweep in sweeps]
    return torch.stack([_padded(result, model.cfg.n_heads) for result in results])


def get_act_patch_attn_head_by_pos_every(
    model: HookedTransformer,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: ActivationCache,
    metric: Metric,
    **options: Any,
) -> Float[Tensor, "patch_type layer pos head"]:
    """Patch each head's output, queries, keys, values and pattern rows (in this order) at one position at a time.

    With fewer key and value heads than heads, their rows end with zeros. ``options`` are the keyword-only arguments of
    `generic_activation_patch`.
    """
    sweeps = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_head_pattern_by_pos,
    )
    results = [sweep(model, corrupted_tokens, clean_cache, metric, **options) for sweep in sweeps]
    results[-1] = einops.rearrange(results[-1], "layer head pos -> layer pos head")
    return torch.stack([_padded(result, model.cfg.n_heads) for result in results])


def get_act_patch_block_every(
    model: HookedTransformer,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: ActivationCache,
    metric: Metric,
    **options: Any,
) -> Float[Tensor, "patch_type layer pos"]:
    """Patch the residual stream before each block, the attention's output and the MLP's, one position at a time.

    ``options`` are the keyword-only arguments of `generic_activation_patch`.
    """
    sweeps = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([sweep(model, corrupted_tokens, clean_cache, metric, **options) for sweep in sweeps])


def _padded(result: Tensor, n_heads: int) -> Tensor:
    return torch.nn.functional.pad(result, (0, n_heads - result.shape[-1]))
