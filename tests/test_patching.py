"""Does a patching sweep put the clean value in where it says, and is it the loop that it stands for?"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lensbridge import patching
from lensbridge.errors import HookError, UnknownPointError

SWEEPS = sorted(name for name in vars(patching) if name.startswith("get_act_patch_"))
EVERY = [name for name in SWEEPS if name.endswith("_every")]


@pytest.fixture
def clean(lens: Any, tokens: Tensor) -> Any:
    return lens.run_with_cache(tokens)[1]


@pytest.fixture
def corrupted(tokens: Tensor) -> Tensor:
    return tokens.flip(1)


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 3] - logits[1, 2, 5]


@pytest.mark.parametrize("name", [name for name in SWEEPS if name not in EVERY])
def test_each_entry_is_one_patched_run(lens: Any, clean: Any, corrupted: Tensor, name: str) -> None:
    sweep = getattr(patching, name)
    mine = sweep(lens, corrupted, clean, metric, progress=False)
    setter, short = sweep.keywords["patch_setter"], sweep.keywords["activation_name"]
    assert mine.dim() == len(sweep.keywords["index_axis_names"])
    different = 0
    for index in torch.randint(1 << 20, (16, mine.dim()), generator=torch.Generator().manual_seed(1)).tolist():
        index = [i % size for i, size in zip(index, mine.shape, strict=True)]
        point = patching.get_act_name(short, index[0])

        def patch(value: Tensor, hook: Any, index: list[int] = index, point: str = point) -> Tensor:
            return setter(value.clone(), index, clean[point])

        with torch.no_grad():
            expected = metric(lens.run_with_hooks(corrupted, fwd_hooks=[(point, patch)]))
            different += int((expected - metric(lens(corrupted))).abs() > 1e-3)
        torch.testing.assert_close(mine[tuple(index)], expected, rtol=0, atol=1e-4)
    assert different


@pytest.mark.parametrize(
    ("setter", "index", "where"),
    [
        (patching.layer_pos_patch_setter, [0, 2], (slice(None), 2)),
        (patching.layer_pos_head_vector_patch_setter, [0, 2, 1], (slice(None), 2, 1)),
        (patching.layer_head_vector_patch_setter, [0, 1], (slice(None), slice(None), 1)),
        (patching.layer_head_pattern_patch_setter, [0, 1], (slice(None), 1)),
        (patching.layer_head_pos_pattern_patch_setter, [0, 1, 2], (slice(None), 1, 2)),
        (patching.layer_head_dest_src_pos_pattern_patch_setter, [0, 1, 2, 0], (slice(None), 1, 2, 0)),
    ],
)
def test_setters_put_in_one_part(setter: Callable[..., Tensor], index: list[int], where: tuple) -> None:
    corrupted, clean = torch.zeros(2, 3, 4, 5), torch.arange(1.0, 121).reshape(2, 3, 4, 5)
    result = setter(corrupted, index, clean)
    assert result is corrupted
    assert torch.equal(result[where], clean[where])
    assert (result != 0).sum() == clean[where].numel()
    with pytest.raises(AssertionError, match="indices, layer first"):
        setter(corrupted, [*index, 0], clean)


def test_every_stacks_the_single_sweeps(lens: Any, clean: Any, corrupted: Tensor) -> None:
    arguments = (lens, corrupted, clean, metric)
    block = patching.get_act_patch_block_every(*arguments, progress=False)
    assert block.shape == (3, 2, 7)
    for row, name in zip(block, ("resid_pre", "attn_out", "mlp_out"), strict=True):
        torch.testing.assert_close(row, getattr(patching, f"get_act_patch_{name}")(*arguments, progress=False))
    heads = ("out", "q", "k", "v", "pattern")
    for suffix, shape in (("all_pos", (5, 2, 4)), ("by_pos", (5, 2, 7, 4))):
        every = getattr(patching, f"get_act_patch_attn_head_{suffix}_every")(*arguments, progress=False)
        assert every.shape == shape
        for row, name in zip(every, heads, strict=True):
            one = getattr(patching, f"get_act_patch_attn_head_{name}_{suffix}")(*arguments, progress=False)
            one = one.transpose(1, 2) if (name, suffix) == ("pattern", "by_pos") else one
            torch.testing.assert_close(row, one)


def test_indices_from_a_data_frame(lens: Any, clean: Any, corrupted: Tensor) -> None:
    whole = patching.get_act_patch_resid_pre(lens, corrupted, clean, metric, progress=False)
    frame = patching.make_df_from_ranges([2, 7], ["layer", "pos"]).iloc[[9, 3, 8]]
    found, same = patching.generic_activation_patch(
        lens,
        corrupted,
        clean,
        metric,
        patching.layer_pos_patch_setter,
        "resid_pre",
        index_df=frame,
        return_index_df=True,
        progress=False,
    )
    assert same is frame
    torch.testing.assert_close(found, whole[[1, 0, 1], [2, 3, 1]])


def test_the_data_frame_of_a_grid(lens: Any, clean: Any, corrupted: Tensor) -> None:
    values, frame = patching.get_act_patch_resid_pre(
        lens, corrupted, clean, metric, return_index_df=True, progress=False
    )
    assert values.shape == (2, 7)
    assert list(frame.columns) == ["layer", "pos"]
    assert frame.to_numpy().tolist() == [[layer, pos] for layer in range(2) for pos in range(7)]


def test_the_indices_are_given_once(lens: Any, clean: Any, corrupted: Tensor) -> None:
    frame = patching.make_df_from_ranges([1, 1], ["layer", "pos"])
    arguments = (lens, corrupted, clean, metric, patching.layer_pos_patch_setter, "resid_pre")
    with pytest.raises(AssertionError, match="index_axis_names or from index_df"):
        patching.generic_activation_patch(*arguments)
    with pytest.raises(AssertionError, match="give one of them"):
        patching.generic_activation_patch(*arguments, ("layer", "pos"), frame)


def test_only_data_frames_need_pandas(
    lens: Any, clean: Any, corrupted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert patching.get_act_patch_attn_head_out_all_pos(lens, corrupted, clean, metric, progress=False).shape == (2, 4)
    with pytest.raises(ImportError, match="pip install pandas"):
        patching.make_df_from_ranges([2], ["layer"])


def test_options_reach_the_sweep(lens: Any, clean: Any, corrupted: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = []

    def last(logits: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        return logits[0, -1, 3]

    plain = patching.get_act_patch_block_every(lens, corrupted, clean, last, progress=False)
    assert capsys.readouterr().err == ""
    kept = patching.get_act_patch_block_every(lens, corrupted, clean, last, batch_size=4, logits_to_keep=1)
    assert capsys.readouterr().err.count("14/14") == 3
    torch.testing.assert_close(kept, plain)
    assert shapes == [(2, 7, lens.cfg.d_vocab)] * 42 + [(2, 1, lens.cfg.d_vocab)] * 42


def test_a_setter_may_return_another_tensor(lens: Any, clean: Any, corrupted: Tensor) -> None:
    def run(setter: Callable[..., Tensor], **options: Any) -> Tensor:
        arguments = (lens, corrupted, clean, lambda logits: logits[0, -1, 3], setter, "resid_pre", ("layer",))
        return patching.generic_activation_patch(*arguments, progress=False, **options)

    expected = lens(corrupted.flip(1))[0, -1, 3].detach().expand(2)
    torch.testing.assert_close(run(lambda value, index, source: source), expected, atol=1e-4, rtol=0)
    with pytest.raises(HookError, match="batch_size=1"):
        run(lambda value, index, source: source[:1])
    one_row = run(lambda value, index, source: source[:1], batch_size=1)
    torch.testing.assert_close(one_row, expected, atol=1e-4, rtol=0)


def test_a_value_that_was_not_cached_is_named(lens: Any, tokens: Tensor) -> None:
    _, cache = lens.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(KeyError, match="hook_mlp_out"):
        patching.get_act_patch_mlp_out(lens, tokens, cache, metric, progress=False)


def test_a_point_that_is_no_point_is_named(lens: Any, tokens: Tensor) -> None:
    cache = {f"blocks.{layer}.hook_zz": tokens for layer in range(2)}
    arguments = (lens, tokens, cache, metric, patching.layer_pos_patch_setter, "zz")
    with pytest.raises(UnknownPointError, match="hook_zz"):
        patching.generic_activation_patch(*arguments, ("layer",), progress=False)


class CountingModel:
    """Has four heads and two key heads; its n-th patched run measures n."""

    cfg = SimpleNamespace(n_layers=2, n_heads=4, n_key_value_heads=2, device="cpu")

    def run_sweep(self, tokens: Tensor, interventions: list, metric: Any, **options: Any) -> list[float]:
        return [1.0 + index for index in range(len(interventions))]


def test_with_fewer_key_heads_the_rows_end_with_zeros() -> None:
    model: Any = CountingModel()
    cache: Any = defaultdict(lambda: torch.zeros(1, 3, 2, 5))
    tokens = torch.zeros(1, 3, dtype=torch.long)
    all_pos = patching.get_act_patch_attn_head_all_pos_every(model, tokens, cache, metric)
    assert all_pos[:, 1].tolist() == [[5, 6, 7, 8], [5, 6, 7, 8], [3, 4, 0, 0], [3, 4, 0, 0], [5, 6, 7, 8]]
    by_pos = patching.get_act_patch_attn_head_by_pos_every(model, tokens, cache, metric)
    assert by_pos[2, 1].tolist() == [[7, 8, 0, 0], [9, 10, 0, 0], [11, 12, 0, 0]]
    assert by_pos[4, 1].tolist() == [[13, 16, 19, 22], [14, 17, 20, 23], [15, 18, 21, 24]]


def test_names_of_axes_are_transformer_lens() -> None:
    assert get_args(patching.AxisNames) == ("layer", "pos", "head_index", "head", "src_pos", "dest_pos")
