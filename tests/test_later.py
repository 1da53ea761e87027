"""When is a cached value computed, and does everybody who takes one out of a cache find a tensor?"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.later import Later, LaterDict, Source


class Counted:
    """Doubles, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


@pytest.fixture
def doubled() -> Counted:
    return Counted()


@pytest.fixture
def cache(doubled: Counted) -> LaterDict:
    cache = LaterDict()
    cache["now"] = torch.ones(2)
    cache.put_off("later", Later(doubled, torch.ones(2, requires_grad=True)))
    return cache


def test_a_value_is_computed_at_the_first_look_and_once(cache: LaterDict, doubled: Counted) -> None:
    assert "later" in cache and list(cache) == ["now", "later"] and len(cache) == 2 and doubled.calls == 0
    first = cache["later"]
    assert cache["later"] is first and doubled.calls == 1
    assert torch.equal(first, torch.full((2,), 2.0)) and not first.requires_grad


def test_entries_that_share_a_value_share_the_tensor(doubled: Counted) -> None:
    cache, value = LaterDict(), Later(doubled, torch.ones(2))
    cache.put_off("post of one block", value)
    cache.put_off("pre of the next", value)
    assert cache["post of one block"] is cache["pre of the next"] and doubled.calls == 1


LOOKS: dict[str, Callable[[LaterDict], Any]] = {
    "get": lambda cache: cache.get("later"),
    "pop": lambda cache: cache.pop("later"),
    "popitem": lambda cache: cache.popitem()[1],
    "setdefault": lambda cache: cache.setdefault("later", torch.zeros(2)),
    "items": lambda cache: [value for key, value in cache.items() if key == "later"][0],
    "values": lambda cache: list(cache.values())[1],
    "dict": lambda cache: dict(cache)["later"],
    "copy": lambda cache: cache.copy()["later"],
    "unpacking": lambda cache: {**cache}["later"],
    "update": lambda cache: _updated({}, cache)["later"],
    "or": lambda cache: (cache | {})["later"],
    "reversed or": lambda cache: ({} | cache)["later"],
    "copy.copy": lambda cache: copy.copy(cache)["later"],
    "deepcopy": lambda cache: copy.deepcopy(cache)["later"],
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache))["later"],
    "torch.save": lambda cache: _saved(cache)["later"],
    "keywords": lambda cache: (lambda **values: values)(**cache)["later"],
}


def _updated(into: dict, cache: LaterDict) -> dict:
    into.update(cache)
    return into


def _saved(cache: LaterDict) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whoever_takes_a_value_out_finds_a_tensor(cache: LaterDict, look: Callable[[LaterDict], Any]) -> None:
    value = look(cache)
    assert isinstance(value, Tensor) and torch.equal(value, torch.full((2,), 2.0))


def test_comparison_and_print_see_tensors(cache: LaterDict) -> None:
    assert "tensor([2., 2.])" in repr(cache) and "Later" not in repr(cache)
    single = LaterDict()
    single.put_off("x", Later(lambda x: x + 1, torch.zeros(())))
    assert single == {"x": torch.ones(())}


def test_what_is_not_there_is_a_key_error(cache: LaterDict) -> None:
    with pytest.raises(KeyError):
        cache["nothing"]
    assert cache.get("nothing") is None and cache.pop("nothing", 3) == 3
    del cache["later"]
    assert "later" not in cache


def test_a_cache_holds_what_was_there_whatever_happens_to_the_model(lens: Any, tokens: Tensor) -> None:
    now = {name: value.clone() for name, value in lens.run_with_cache(tokens)[1].items()}
    later = lens.run_with_cache(tokens)[1]
    with torch.no_grad():
        for parameter in lens.hf_model.parameters():
            parameter.mul_(1.5)
    lens.process_weights_(fold_ln=False, center_writing_weights=False, center_unembed=False)
    lens.to(torch.bfloat16, print_details=False)
    assert all(torch.equal(later[name], value) for name, value in now.items())


def test_one_entry_does_not_keep_its_neighbours_alive(lens: Any, tokens: Tensor) -> None:
    """Queries, keys and values are slices of one tensor of the HF model."""
    for letter in "qkv":
        name = f"blocks.0.attn.hook_{letter}"
        value = lens.run_with_cache(tokens, names_filter=name)[1][name]
        assert value.untyped_storage().nbytes() == value.nbytes


def test_values_come_without_the_models_biases_of_then(new_lens: Any, tokens: Tensor) -> None:
    lens = new_lens(fold_ln=False)
    now = {name: value.clone() for name, value in lens.run_with_cache(tokens)[1].items()}
    later = lens.run_with_cache(tokens)[1]
    with torch.no_grad():
        for parameter in lens.hf_model.parameters():
            parameter.add_(1)
    assert all(torch.equal(later[name], value) for name, value in now.items())


def test_a_first_look_in_inference_mode_serves_training_too(lens: Any, tokens: Tensor) -> None:
    cache = lens.run_with_cache(tokens)[1]
    with torch.inference_mode():
        assert all(not value.is_inference() for value in cache.values())


@pytest.mark.parametrize("start", [None, 1])
def test_an_edit_of_one_entry_leaves_the_others(raw: Any, lens: Any, tokens: Tensor, start: int | None) -> None:
    for model in (raw, lens):
        given = tokens if start is None else model(tokens, stop_at_layer=1)
        now = {n: v.clone() for n, v in model.run_with_cache(given, start_at_layer=start)[1].items()}
        later = model.run_with_cache(given, start_at_layer=start)[1]
        if start is not None:
            given.zero_()
        later["blocks.1.hook_resid_pre"].zero_()
        norms = [name for name in now if name.endswith(("hook_scale", "hook_normalized", "hook_v", "hook_z"))]
        assert all(torch.equal(later[name], now[name]) for name in norms)


def _double_input(module: Any, args: tuple) -> None:
    args[0].mul_(2)


def test_what_was_overwritten_is_an_error(lens: Any, tokens: Tensor) -> None:
    # What the forward pass itself overwrites is found out in the first run, and kept as a copy.
    lens.run_with_cache(tokens)
    handle = lens.hf_model.transformer.h[1].register_forward_pre_hook(_double_input)
    with torch.no_grad():
        cache = lens.run_with_cache(tokens, names_filter="blocks.0.hook_resid_post")[1]
    handle.remove()
    with pytest.raises(RuntimeError, match="overwritten in place"):
        cache["blocks.0.hook_resid_post"]


def test_functions_on_containers_go_into_it(cache: LaterDict) -> None:
    doubled = torch.utils._pytree.tree_map(lambda value: value * 2, cache)
    assert type(doubled) is dict and torch.equal(doubled["later"], torch.full((2,), 4.0))


def test_a_slice_is_copied_in_other_runs_too(lens: Any, tokens: Tensor) -> None:
    name = "blocks.0.attn.hook_q"
    with lens.hooks([("blocks.1.hook_resid_post", lambda value, hook: None)]):
        value = lens.run_with_cache(tokens, names_filter=name)[1][name]
    assert value.untyped_storage().nbytes() == value.nbytes


# --- values that follow from others ----------------------------------------------------------------------------------


def storages(values: Iterable[Tensor]) -> dict[int, int]:
    """The memory behind some tensors, once each: where it is and how much."""
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in values}


@pytest.mark.parametrize("which", ["raw", "lens"])
def test_a_cache_of_everything_holds_little_more_than_half_of_what_it_shows(
    request: pytest.FixtureRequest, which: str, tokens: Tensor
) -> None:
    logits, cache = request.getfixturevalue(which).run_with_cache(tokens)
    held, without = storages(cache.cache_dict.held()), storages([logits])
    shown = storages(cache.values())
    assert held.keys() & without.keys()
    assert sum(n for at, n in held.items() if at not in without) <= 0.62 * sum(
        n for at, n in shown.items() if at not in without
    )
    # When everything has been looked at, nothing is kept besides.
    assert storages(cache.cache_dict.held()) == shown


def test_what_follows_from_others_is_what_was_there(raw: Any, tokens: Tensor) -> None:
    everything = raw.run_with_cache(tokens)[1]
    for name in everything:
        alone = raw.run_with_cache(tokens, names_filter=name)[1]
        assert torch.equal(alone[name], everything[name]), name


def test_a_stream_that_is_no_sum_is_kept_as_it_is(new_lens: Any, tokens: Tensor) -> None:
    """Hooks of PyTorch's own on HuggingFace's modules, which no point sees."""
    raw = new_lens(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    block = raw.hf_model.transformer.h[0]
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].clone()})

    handles = [
        block.attn.register_forward_hook(lambda module, args, output: (output[0] + 1, *output[1:])),
        block.mlp.act.register_forward_hook(lambda module, args, output: output + 1),
        block.ln_2.register_forward_pre_hook(see("blocks.0.hook_resid_mid")),
        block.mlp.c_proj.register_forward_pre_hook(see("blocks.0.mlp.hook_post")),
    ]
    try:
        cache = raw.run_with_cache(tokens)[1]
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2 and all(torch.equal(cache[name], value) for name, value in seen.items())


def test_another_function_in_the_mlp_afterwards_changes_no_cache(new_lens: Any, tokens: Tensor) -> None:
    lens = new_lens()
    now = lens.run_with_cache(tokens, names_filter="blocks.0.mlp.hook_post")[1]["blocks.0.mlp.hook_post"]
    cache = lens.run_with_cache(tokens)[1]
    lens.hf_model.transformer.h[0].mlp.act = torch.nn.ReLU()
    assert torch.equal(cache["blocks.0.mlp.hook_post"], now)


def test_a_look_under_autocast_sees_what_the_run_computed(raw: Any, tokens: Tensor) -> None:
    now = {name: value.clone() for name, value in raw.run_with_cache(tokens)[1].items()}
    later = raw.run_with_cache(tokens)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(later[name], value) for name, value in now.items())
        mixed = raw.run_with_cache(tokens)[1]
    alone = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_mid"):
            alone[name] = raw.run_with_cache(tokens, names_filter=name)[1][name]
    assert all(torch.equal(mixed[name], value) and mixed[name].dtype == value.dtype for name, value in alone.items())


def test_who_takes_out_what_others_wait_for_gets_a_copy() -> None:
    tensor = torch.ones(3)
    source = Source(tensor)
    itself, double = Later(None, source), Later(lambda x: 2 * x, source)
    taken = itself()
    taken.zero_()
    assert taken is not tensor and double().tolist() == [2, 2, 2]
    # The last one to take it may have it.
    assert Later(None, source)() is tensor


def test_a_sum_is_made_when_it_is_asked_for() -> None:
    first, second = Source(torch.ones(2)), Source(torch.ones(2))
    total = Source(None, torch.add, (first, second))
    value = Later(lambda x: x + 1, total)
    assert sum(storages(value.tensors()).values()) == 16 and (first.waiting, total.depth) == (1, 1)
    assert value().tolist() == [3, 3] and first.waiting == 0
    assert list(value.tensors())[0] is value()
