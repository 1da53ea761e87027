"""Does ``run_with_cache`` take and honour every argument as in 3.9.0?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.utilities import Slice as TheirSlice

from compat_tests.comparison import caches_close, close
from compat_tests.conftest import Pairs
from compat_tests.rough_models import SUBJECT
from compat_tests.test_points import FLAGS, active_points


def slice_of(model: Any, *arguments: Any) -> Any:
    if SUBJECT == "transformer_lens" or not type(model).__module__.startswith("lensbridge"):
        return TheirSlice(*arguments)
    from lensbridge.utilities import Slice

    return Slice(*arguments)


FILTERS: dict[str, Any] = {
    "none": None,
    "one name": "blocks.1.attn.hook_pattern",
    "a list": ["hook_embed", "blocks.1.hook_resid_post", "blocks.0.attn.hook_q"],
    "an empty list": [],
    "a function": lambda name: name.endswith("hook_z") or "ln" in name,
    "a function that takes nothing": lambda name: False,
}


@pytest.mark.parametrize("names", FILTERS)
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_names_filter(pairs: Pairs, processing: str, names: str) -> None:
    pair = pairs.get("two", processing)
    results = [model.run_with_cache(pair.tokens(), names_filter=FILTERS[names]) for model in pair.both]
    close("logits", results[0][0], results[1][0])
    caches_close(results[0][1], results[1][1])


@pytest.mark.parametrize("names", [("hook_embed",), {"hook_embed"}, 5], ids=repr)
def test_names_filter_of_another_type(model: Any, pairs: Pairs, names: Any) -> None:
    with pytest.raises(ValueError, match="names_filter"):
        model.run_with_cache(pairs.get().tokens(), names_filter=names)
    assert model.list_hooks() == {}


@pytest.mark.parametrize("name", active_points((), 2))
@pytest.mark.parametrize("processing", ["raw", "default", "refactored"])
def test_each_point_alone(pairs: Pairs, processing: str, name: str) -> None:
    """Asked for alone a point must have the same value as in a full cache."""
    pair = pairs.get("two", processing)
    results = [model.run_with_cache(pair.tokens(), names_filter=name)[1] for model in pair.both]
    caches_close(*results)


@pytest.mark.parametrize("remove_batch_dim", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_remove_batch_dim(pairs: Pairs, batch: int, remove_batch_dim: bool) -> None:
    """Row 0 of every entry, silently, also of a larger batch."""
    pair = pairs.get()
    results = [model.run_with_cache(pair.tokens(batch), remove_batch_dim=remove_batch_dim)[1] for model in pair.both]
    caches_close(*results)
    assert results[0].has_batch_dim == results[1].has_batch_dim == (not remove_batch_dim)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=repr)
def test_device(pairs: Pairs, device: Any) -> None:
    pair = pairs.get()
    results = [model.run_with_cache(pair.tokens(), device=device)[1] for model in pair.both]
    caches_close(*results)


def test_device_only_moves_the_cached_copies(pairs: Pairs) -> None:
    """The meta device stands in for a second device: values are dropped, the run itself goes on."""
    pair = pairs.get()
    for model in pair.both:
        logits, cache = model.run_with_cache(pair.tokens(), device="meta")
        assert {value.device.type for value in cache.values()} == {"meta"}
        assert torch.equal(logits, model.run_with_cache(pair.tokens())[0])


def test_return_cache_object(model: Any, pairs: Pairs) -> None:
    _, cache = model.run_with_cache(pairs.get().tokens(), return_cache_object=False)
    assert type(cache) is dict
    _, cache = model.run_with_cache(pairs.get().tokens())
    assert type(cache).__name__ == "ActivationCache"
    assert cache.model is model


POSITIONS: list[Any] = [
    None,
    0,
    -1,
    3,
    (2,),
    (1, 4),
    (1, 8, 3),
    (None, -2),
    [0, 2, 5],
    [4],
    np.array([1, 3]),
    torch.tensor([0, 6]),
    slice(2, 5),
    slice(None, None, 2),
]


@pytest.mark.parametrize("position", POSITIONS, ids=repr)
def test_pos_slice(pairs: Pairs, position: Any) -> None:
    """An int drops no dimension here, and scores and pattern are sliced along the queries."""
    pair = pairs.get()
    results = [model.run_with_cache(pair.tokens(), pos_slice=position)[1] for model in pair.both]
    caches_close(*results)
    with_object = [model.run_with_cache(pair.tokens(), pos_slice=slice_of(model, position))[1] for model in pair.both]
    caches_close(*with_object)


@pytest.mark.parametrize("flags", [*((flag,) for flag in FLAGS), FLAGS], ids="+".join)
@pytest.mark.parametrize("position", [1, (0, 2), [0, 3]], ids=repr)
def test_pos_slice_with_flags(pairs: Pairs, position: Any, flags: tuple[str, ...]) -> None:
    """Split inputs and the norms after them are sliced along the heads, as in 3.9.0."""
    pair = pairs.get("two", "default", flags)
    results = [model.run_with_cache(pair.tokens(), pos_slice=position)[1] for model in pair.both]
    caches_close(*results)


@pytest.mark.parametrize("position", [2, (1, 4), [0, 2]], ids=repr)
def test_pos_slice_of_gradients(pairs: Pairs, position: Any) -> None:
    pair = pairs.get()
    results = [
        model.run_with_cache(pair.tokens(), pos_slice=position, return_type="loss", incl_bwd=True)[1]
        for model in pair.both
    ]
    caches_close(*results, order=False)


def test_pos_slice_with_remove_batch_dim(pairs: Pairs) -> None:
    pair = pairs.get()
    for position in (1, (2, 5), [0, 3]):
        arguments = {"pos_slice": position, "remove_batch_dim": True}
        results = [model.run_with_cache(pair.tokens(1), **arguments)[1] for model in pair.both]
        caches_close(*results)


def test_is_caching_ends_with_the_run(model: Any, pairs: Pairs) -> None:
    model.run_with_cache(pairs.get().tokens())
    assert model.is_caching is False


def test_reset_hooks_end_false_keeps_the_caching_hooks(model: Any, pairs: Pairs) -> None:
    tokens = pairs.get().tokens()
    _, cache = model.run_with_cache(tokens, names_filter="hook_embed", reset_hooks_end=False, return_cache_object=False)
    assert list(model.list_hooks()) == ["hook_embed"]
    first = cache["hook_embed"]
    model(pairs.get().tokens(seed=4))
    assert not torch.equal(cache["hook_embed"], first)
    model.reset_hooks()


def test_add_caching_hooks(pairs: Pairs) -> None:
    pair = pairs.get()
    caches = []
    for model in pair.both:
        cache = model.add_caching_hooks(["blocks.0.attn.hook_v", "hook_embed"])
        assert cache == {}
        model(pair.tokens())
        caches.append(cache)
        model.reset_hooks()
    caches_close(*caches)
    for model in pair.both:
        with pytest.raises(AssertionError):
            model.add_caching_hooks(("hook_embed",))


def test_add_caching_hooks_with_gradients(pairs: Pairs) -> None:
    pair = pairs.get()
    caches = []
    for model in pair.both:
        cache = model.add_caching_hooks(lambda name: "hook_resid" in name, incl_bwd=True)
        model(pair.tokens(), return_type="loss").backward()
        caches.append(cache)
        model.reset_hooks()
    caches_close(*caches, order=False)


def test_get_caching_hooks(pairs: Pairs) -> None:
    pair = pairs.get()
    caches = []
    for model in pair.both:
        cache, forward, backward = model.get_caching_hooks(["hook_embed", "blocks.1.hook_mlp_out"], pos_slice=-1)
        assert backward == []
        model.run_with_hooks(pair.tokens(), fwd_hooks=forward)
        caches.append(cache)
    caches_close(*caches)


def test_what_was_cached_does_not_change_later(model: Any, pairs: Pairs) -> None:
    """Another run with edits in place must not reach back into an old cache."""
    tokens = pairs.get().tokens()
    _, cache = model.run_with_cache(tokens)
    kept = {name: value.clone() for name, value in cache.items()}

    def overwrite(value: torch.Tensor, hook: Any) -> None:
        value[:] = 7.0

    with torch.no_grad():
        for name in ("hook_embed", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_q", "blocks.1.mlp.hook_post"):
            model.run_with_hooks(tokens, fwd_hooks=[(name, overwrite)])
    assert all(torch.equal(cache[name], value) for name, value in kept.items())


def test_writing_into_a_cache_does_not_change_the_model(model: Any, pairs: Pairs) -> None:
    tokens = pairs.get().tokens()
    logits, cache = model.run_with_cache(tokens)
    kept = logits.detach().clone()
    for value in cache.values():
        value.zero_()
    assert torch.equal(model(tokens), kept)


def test_a_prompt_as_text(pairs: Pairs) -> None:
    pair = pairs.get()
    for text in ("The cat sat", ["The cat", "a"]):
        caches_close(*(model.run_with_cache(text)[1] for model in pair.both))


@pytest.mark.ours_only
def test_unknown_arguments_are_refused(pairs: Pairs) -> None:
    with pytest.raises(TypeError):
        pairs.get().ours.run_with_cache(pairs.get().tokens(), name_filter="hook_embed")
    assert pairs.get().ours.list_hooks() == {}
