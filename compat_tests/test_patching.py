"""Does every patching sweep give the numbers of TransformerLens 3.9.0's, which runs the model once per patch?"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from transformer_lens import patching as theirs

from compat_tests.comparison import close, outcome, same_outcome
from compat_tests.conftest import Pair, Pairs
from compat_tests.edits import halve, noise
from compat_tests.rough_models import PROCESSINGS, SUBJECT

ours = importlib.import_module(f"{SUBJECT}.patching")

SWEEPS = sorted(name for name in vars(theirs) if name.startswith("get_act_patch_"))
SETTERS = sorted(name for name in vars(theirs) if name.endswith("_patch_setter"))
LENGTH = 5


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 7] - logits[0, -1, 11]


def everything(logits: torch.Tensor) -> torch.Tensor:
    """Depends on each row and position."""
    return (
        logits.log_softmax(-1)[..., 3] * torch.arange(1.0, 1 + logits[..., 0].numel()).view_as(logits[..., 0])
    ).sum()


def results(pair: Pair, sweep: str, metric: Callable[..., Any], **arguments: Any) -> list[Any]:
    """What the sweep gives on either side, clean and corrupted tokens being the same."""
    clean, corrupted = pair.tokens(length=LENGTH, seed=1), pair.tokens(length=LENGTH, seed=2)
    found = []
    for model, module in zip(pair.both, (ours, theirs), strict=True):
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
        found.append(getattr(module, sweep)(model, corrupted, cache, metric, **arguments))
    return found


# --- every function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweep(pairs: Pairs, sweep: str, processing: str) -> None:
    mine, other = results(pairs.get(processing=processing), sweep, difference)
    close(f"patching.{sweep}", mine, other)
    # Every axis matters: nothing here is one number repeated.
    for axis in range(other.dim()):
        assert other.diff(dim=axis).abs().max() > 1e-3


@pytest.mark.parametrize("sweep", ["get_act_patch_block_every", "get_act_patch_attn_head_all_pos_every"])
@pytest.mark.parametrize("shape", ["three", "exact gelu", "one"])
def test_other_shapes_and_a_metric_of_all_logits(pairs: Pairs, sweep: str, shape: str) -> None:
    close(f"patching.{sweep}", *results(pairs.get(shape), sweep, everything))


def test_attention_that_is_not_eager(pairs: Pairs) -> None:
    close("patching.sdpa", *results(pairs.get(attention="sdpa"), "get_act_patch_attn_head_all_pos_every", everything))


@pytest.mark.parametrize("name", SETTERS)
def test_setters(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    corrupted, clean = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    for length in range(1, 6):
        index = [1, 2, 1, 2, 0][:length]
        mine, other = (
            outcome(lambda module=module, index=index: getattr(module, name)(corrupted.clone(), index, clean))
            for module in (ours, theirs)
        )
        same_outcome(name, mine, other)


@pytest.mark.parametrize("name", [name for name in SWEEPS if not name.endswith("_every")])
def test_what_a_sweep_is_made_of(name: str) -> None:
    mine, other = getattr(ours, name).keywords, getattr(theirs, name).keywords
    assert {key: getattr(value, "__name__", value) for key, value in mine.items()} == {
        key: getattr(value, "__name__", value) for key, value in other.items()
    }


# --- indices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranges", "names"), [([2, 3], ["layer", "pos"]), ([2, 1, 3], ("a", "b", "c")), ([0], ["x"])])
def test_the_data_frame_of_ranges(ranges: list[int], names: Any) -> None:
    mine, other = (module.make_df_from_ranges(ranges, names) for module in (ours, theirs))
    assert list(mine.columns) == list(other.columns)
    assert mine.to_numpy().tolist() == other.to_numpy().tolist()
    assert list(mine.dtypes) == list(other.dtypes)
    assert list(mine.index) == list(other.index)


@pytest.mark.parametrize("rows", [slice(None), [7, 0, 3, 9, 9], [4]], ids=str)
def test_indices_given_as_a_data_frame(pairs: Pairs, rows: Any) -> None:
    frame = theirs.make_df_from_ranges([2, LENGTH], ["layer", "pos"]).iloc[rows]
    arguments = {"patch_setter": theirs.layer_pos_patch_setter, "activation_name": "attn_out"}
    mine, other = results(
        pairs.get(), "generic_activation_patch", difference, index_df=frame, return_index_df=True, **arguments
    )
    close("patching.index_df", mine[0], other[0])
    assert mine[1].equals(other[1])


def test_the_data_frame_of_a_grid(pairs: Pairs) -> None:
    mine, other = results(pairs.get(), "get_act_patch_resid_mid", difference, return_index_df=True)
    close("patching.grid", mine[0], other[0])
    assert mine[1].equals(other[1])


@pytest.mark.parametrize("given", ["none", "both"])
def test_indices_are_given_in_one_way(pairs: Pairs, given: str) -> None:
    frame = theirs.make_df_from_ranges([1, 1], ["layer", "pos"])
    indices = {} if given == "none" else {"index_df": frame, "index_axis_names": ("layer", "pos")}
    tokens = pairs.get().tokens(length=LENGTH)
    mine, other = (
        outcome(partial(module.generic_activation_patch, model, tokens, {}, difference, None, "z", **indices))
        for model, module in zip(pairs.get().both, (ours, theirs), strict=True)
    )
    same_outcome("indices", mine, other)


@pytest.mark.parametrize(("name", "axes"), [("z", ("layer", "heads")), ("resid_past", ("layer", "pos"))])
def test_axes_and_activations_that_do_not_exist(pairs: Pairs, name: str, axes: tuple[str, ...]) -> None:
    tokens = pairs.get().tokens(length=LENGTH)
    mine, other = (
        outcome(
            partial(
                module.generic_activation_patch,
                model,
                tokens,
                model.run_with_cache(tokens)[1],
                difference,
                module.layer_pos_patch_setter,
                name,
                axes,
            )
        )
        for model, module in zip(pairs.get().both, (ours, theirs), strict=True)
    )
    assert other.error is not None
    same_outcome("unknown", mine, other)


# --- setters, hooks, padding ------------------------------------------------------------------------------------------


def mixed(corrupted: torch.Tensor, index: list[int], clean: torch.Tensor) -> torch.Tensor:
    """Returns a new tensor."""
    return torch.lerp(corrupted, clean, 0.1 * (1 + index[-1]))


@pytest.mark.parametrize("name", ["resid_pre", "q", "attn_scores", "pattern", "post", "scale0ln1", "normalized1ln2"])
def test_a_setter_of_ones_own(pairs: Pairs, name: str) -> None:
    pair = pairs.get()
    # A layer in the name is the one that counts.
    axes = ("pos",) if "ln" in name else ("layer", "pos")
    arguments = {"patch_setter": mixed, "activation_name": name, "index_axis_names": axes}
    close(f"patching.{name}", *results(pair, "generic_activation_patch", everything, **arguments))


@contextmanager
def hooked(pair: Pair, hooks: list[tuple[str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in pair.both:
            stack.enter_context(model.hooks(hooks))
        yield


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hooks_that_are_on_the_model(pairs: Pairs, layer: int) -> None:
    pair = pairs.get("three")
    with hooked(pair, [(f"blocks.{layer}.attn.hook_z", noise), (f"blocks.{layer}.hook_resid_pre", halve)]):
        close("patching.hooked", *results(pair, "get_act_patch_block_every", everything))


def test_padding_on_the_left(pairs: Pairs) -> None:
    pair = pairs.get("three", tokenizer="own pad")
    clean, corrupted = pair.tokens(3, 7, seed=3), pair.tokens(3, 7, seed=4)
    for tokens in (clean, corrupted):
        tokens[0, :3] = tokens[2, :1] = 1
    found = []
    for model, module in zip(pair.both, (ours, theirs), strict=True):
        before = model.tokenizer.padding_side
        model.tokenizer.padding_side = "left"
        try:
            with torch.no_grad():
                _, cache = model.run_with_cache(clean)
            found.append(
                [
                    getattr(module, f"get_act_patch_{sweep}")(model, corrupted, cache, lambda x: x[:, 3:, 9].sum())
                    for sweep in ("resid_pre", "attn_head_q_all_pos", "attn_head_out_all_pos")
                ]
            )
            plain = model(corrupted)
        finally:
            model.tokenizer.padding_side = before
        assert not torch.allclose(plain[0, 3:], model(corrupted)[0, 3:], atol=1e-2)
    for mine, other in zip(*found, strict=True):
        # Patches at positions that are padding in some row reach TransformerLens' other values there.
        real = slice(3, None) if mine.shape[-1] == 7 else slice(None)
        close("patching.padded", mine[:, real], other[:, real])


def test_gradients_may_be_on(pairs: Pairs) -> None:
    assert torch.is_grad_enabled()
    mine, other = results(pairs.get(), "get_act_patch_attn_head_v_all_pos", difference)
    assert not mine.requires_grad
    assert not other.requires_grad
    close("patching.grad", mine, other)


# --- sweeps of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.ours_only
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_run_sweep_is_transformer_lens_loop(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("three", processing)
    tokens = pair.tokens()
    points = [name for name in pair.theirs.hook_dict if "_input" not in name and pair.ours._is_on(name)]
    interventions = [
        [(name, halve), (other, noise)] for name, other in zip(points, [*points[9:], *points[:9]], strict=True)
    ]
    with torch.no_grad():
        for pairs_of_hooks, mine in zip(interventions, pair.ours.run_sweep(tokens, interventions), strict=True):
            close("patching.sweep", mine, pair.theirs.run_with_hooks(tokens, fwd_hooks=pairs_of_hooks))
