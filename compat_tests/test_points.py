"""Does a full cache hold the same points, in the same order, with the same shapes and values as 3.9.0's?"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compat_tests.comparison import caches_close, close, template
from compat_tests.conftest import Pairs
from compat_tests.rough_models import PROCESSING_FLAGS, PROCESSINGS, SHAPES, TOY_DIR

POINTS: dict[str, Any] = json.loads((Path(__file__).parent / "gpt2_points.json").read_text())
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
FLAG_SETS = [(flag,) for flag in FLAGS] + [("use_split_qkv_input", "use_attn_in"), FLAGS]
COMBINATIONS = [
    tuple(zip(PROCESSING_FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=5)
]


def combination_id(combination: tuple[tuple[str, bool], ...]) -> str:
    return "+".join(name for name, on in combination if on) or "none"


def expand(templates: list[str], n_layers: int) -> list[str]:
    """Fill {l} layer by layer, keeping the blocks together."""
    names: list[str] = []
    for in_blocks, group in itertools.groupby(templates, lambda name: "{l}" in name):
        rows = list(group)
        layers = range(n_layers) if in_blocks else range(1)
        names += [name.replace("{l}", str(layer)) for layer in layers for name in rows]
    return names


def active_points(flags: tuple[str, ...], n_layers: int) -> list[str]:
    needs = POINTS["needs_flag"]
    return expand([name for name in POINTS["order"] if name not in needs or needs[name] in flags], n_layers)


def expected_shape(name: str, flags: tuple[str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    symbols = POINTS["shapes"][template(name)]
    if "use_split_qkv_input" in flags or "use_attn_in" in flags:
        symbols = POINTS["shapes_with_split_inputs"].get(template(name), symbols)
    return tuple(int(sizes.get(symbol, symbol)) for symbol in symbols.split(","))


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_cache(pairs: Pairs, shape: str, processing: str) -> None:
    pair = pairs.get(shape, processing)
    mine, theirs = (model.run_with_cache(pair.tokens()) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_id)
def test_every_combination_of_processing_flags(pairs: Pairs, combination: tuple[tuple[str, bool], ...]) -> None:
    pair = pairs.get("two", combination)
    mine, theirs = (model.run_with_cache(pair.tokens()) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_id)
@pytest.mark.parametrize("flags", [(), *FLAG_SETS], ids="+".join)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "two"])
def test_every_combination_on_every_shape(
    pairs: Pairs, shape: str, flags: tuple[str, ...], combination: tuple[tuple[str, bool], ...]
) -> None:
    pair = pairs.get(shape, combination, flags)
    mine, theirs = (model.run_with_cache(pair.tokens(3, 5)) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("flags", FLAG_SETS, ids="+".join)
def test_points_behind_flags(pairs: Pairs, flags: tuple[str, ...], processing: str) -> None:
    pair = pairs.get("two", processing, flags)
    mine, theirs = (model.run_with_cache(pair.tokens()) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@pytest.mark.parametrize("flags", [(), *FLAG_SETS], ids="+".join)
def test_order_and_shapes_are_the_known_ones(pairs: Pairs, flags: tuple[str, ...]) -> None:
    pair = pairs.get("two", "default", flags)
    sizes = {"batch": 3, "head": 4, "d_head": 5, "d_model": 20, "d_mlp": 80, "d_vocab": 320}
    sizes |= dict.fromkeys(("pos", "query_pos", "key_pos"), 6)
    for model in pair.both:
        _, cache = model.run_with_cache(pair.tokens(3, 6))
        assert list(cache.keys()) == active_points(flags, 2)
        assert {name: tuple(value.shape) for name, value in cache.items()} == {
            name: expected_shape(name, flags, sizes) for name in cache
        }


def test_hook_dict(pairs: Pairs) -> None:
    pair = pairs.get("three")
    for model in pair.both:
        assert list(model.hook_dict) == expand(POINTS["hook_dict_order"], 3)
        assert [point.name for point in model.hook_points()] == list(model.hook_dict)


def test_mod_dict_holds_every_module_of_3_9_0(pairs: Pairs) -> None:
    pair = pairs.get()
    assert set(pair.theirs.mod_dict) <= set(pair.ours.mod_dict)
    for name, point in pair.ours.hook_dict.items():
        assert pair.ours.mod_dict[name] is point


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 24])
def test_batch_sizes_and_lengths(pairs: Pairs, batch: int, length: int) -> None:
    pair = pairs.get()
    tokens = pair.tokens(batch, length)
    mine, theirs = (model.run_with_cache(tokens) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_either_attention_implementation(pairs: Pairs, attention: str, processing: str) -> None:
    pair = pairs.get("two", processing, attention=attention)
    mine, theirs = (model.run_with_cache(pair.tokens()) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(pairs: Pairs, mode: Any) -> None:
    pair = pairs.get()
    with mode():
        mine, theirs = (model.run_with_cache(pair.tokens()) for model in pair.both)
    assert mine[0].requires_grad == theirs[0].requires_grad == (mode is torch.enable_grad)
    caches_close(mine[1], theirs[1])
    assert not any(value.requires_grad for value in mine[1].values())


@pytest.mark.skipif(not (TOY_DIR / "config.json").exists(), reason="the bundled model is not in this checkout")
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_bundled_trained_model(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("toy", processing)
    mine, theirs = (model.run_with_cache(pair.tokens(2, 12)) for model in pair.both)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


def test_masked_scores_are_minus_infinity(pairs: Pairs) -> None:
    pair = pairs.get()
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for model in pair.both:
        _, cache = model.run_with_cache(pair.tokens())
        for layer in range(2):
            scores, pattern = cache["attn_scores", layer], cache["pattern", layer]
            assert (scores[..., future] == -torch.inf).all()
            assert scores[..., ~future].isfinite().all()
            assert (pattern[..., future] == 0).all()
            torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 9))


def test_rough_models_have_attention_far_from_uniform(pairs: Pairs) -> None:
    """Otherwise the comparison would be blind to most of what happens in attention."""
    pair = pairs.get()
    _, cache = pair.theirs.run_with_cache(pair.tokens(4, 16))
    for layer in range(2):
        assert cache["pattern", layer][:, :, 8:].amax(-1).mean() > 0.4


def test_meaning_of_the_points(pairs: Pairs) -> None:
    """The sums that tie the points together hold in the cache itself."""
    pair = pairs.get("three", "default", ("use_attn_result",))
    for model in pair.both:
        _, cache = model.run_with_cache(pair.tokens())
        for layer in range(3):
            attn, mlp, pre = (cache[name, layer] for name in ("attn_out", "mlp_out", "resid_pre"))
            close("identity: resid_mid", pre + attn, cache["resid_mid", layer])
            close("identity: resid_post", pre + attn + mlp, cache["resid_post", layer])
            close("identity: attn_out", cache["result", layer].sum(2) + model.b_O[layer], attn)
            close("identity: mlp_out", cache["post", layer] @ model.W_out[layer] + model.b_out[layer], mlp)
            mixed = torch.einsum("bhqk,bkhd->bqhd", cache["pattern", layer], cache["v", layer])
            close("identity: z", mixed, cache["z", layer])
        close("identity: logits", cache["normalized"] @ model.W_U + model.b_U, cache["unembed.hook_out"])
