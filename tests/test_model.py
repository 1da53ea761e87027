"""Is the facade what TransformerLens' class was: one object to run, hook, train, move, subclass and extend?"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import ActivationCache, HookedRootModule, HookedTransformer, HookPoint
from lensbridge.errors import DisabledPointError, UnknownPointError
from lensbridge.points import FLAG_SETTERS, point_of

DISABLED = {
    "blocks.0.attn.hook_result": "use_attn_result",
    "blocks.0.hook_q_input": "use_split_qkv_input",
    "blocks.1.hook_attn_in": "use_attn_in",
    "blocks.1.hook_mlp_in": "use_hook_mlp_in",
}


def doubled(value: Tensor, hook: HookPoint) -> Tensor:
    return value * 2


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5)


# --- points and flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flag"), DISABLED.items())
def test_a_point_that_is_off_is_an_error_that_names_its_setter(lens: Any, tokens: Tensor, name: str, flag: str) -> None:
    setter = FLAG_SETTERS[flag]
    asks: list[Callable] = [
        lambda: lens.add_hook(name, doubled),
        lambda: lens.add_perma_hook(name, doubled),
        lambda: lens.run_with_hooks(tokens, fwd_hooks=[(name, doubled)]),
        lambda: lens.run_with_cache(tokens, names_filter=name),
        lambda: lens.run_with_cache(tokens, names_filter=["hook_embed", name]),
        lambda: lens.add_caching_hooks(name),
    ]
    for ask in asks:
        with pytest.raises(
            DisabledPointError, match=rf"'{name}' is off, .* call model.{setter}\(True\) first \({flag}\)"
        ):
            ask()
        assert lens.list_hooks() == {}
    assert issubclass(DisabledPointError, KeyError) and issubclass(DisabledPointError, AssertionError)
    assert name not in lens.run_with_cache(tokens)[1]
    lens.add_hook(lambda point: True, lambda value, hook: None)
    assert name not in lens.list_hooks()
    lens.reset_hooks()
    getattr(lens, setter)(True)
    assert name in lens.run_with_cache(tokens)[1]
    assert not torch.allclose(
        lens.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value + 1 + value**2)]), lens(tokens)
    )
    getattr(lens, setter)(False)
    with pytest.raises(DisabledPointError):
        lens.add_hook(name, doubled)


def test_a_hook_that_was_attached_before_its_point_was_turned_off_is_not_silent(lens: Any, tokens: Tensor) -> None:
    lens.set_use_attn_result(True)
    lens.add_hook("blocks.0.attn.hook_result", doubled)
    lens(tokens)
    lens.set_use_attn_result(False)
    with pytest.raises(DisabledPointError, match="set_use_attn_result"):
        lens(tokens)
    lens.reset_hooks()
    lens(tokens)


def test_setters_refuse_what_has_no_meaning(lens: Any) -> None:
    lens.cfg.attn_only = True
    with pytest.raises(AssertionError, match="no MLP"):
        lens.set_use_hook_mlp_in(True)
    lens.cfg.n_key_value_heads = 2
    with pytest.raises(AssertionError, match="grouped-query"):
        lens.set_use_attn_in(True)
    lens.set_ungroup_grouped_query_attention(True)
    assert lens.cfg.ungroup_grouped_query_attention


def test_unknown_points_name_the_closest(lens: Any, tokens: Tensor) -> None:
    with pytest.raises(
        UnknownPointError,
        match="HookedTransformer has no hook point 'blocks.0.resid_pre'. Closest: blocks.0.hook_resid_pre",
    ):
        lens.run_with_hooks(tokens, fwd_hooks=[("blocks.0.resid_pre", doubled)])


def test_per_head_inputs_split_the_stream(lens: Any, tokens: Tensor) -> None:
    lens.set_use_split_qkv_input(True)

    def only_head_two(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        value[:, :, 2] = value[:, :, 2].flip(-1)
        return value

    plain = lens.run_with_cache(tokens)[1]
    for letter in "qkv":
        with lens.hooks([(f"blocks.0.hook_{letter}_input", only_head_two)]):
            edited = lens.run_with_cache(tokens)[1]
        for other in "qkv":
            name = f"blocks.0.attn.hook_{other}"
            same = [torch.allclose(edited[name][:, :, head], plain[name][:, :, head], atol=1e-5) for head in range(4)]
            assert same == [True, True, other != letter, True]


# --- caches ----------------------------------------------------------------------------------------------------------


def test_run_with_cache_gives_a_cache_object_or_a_dict(lens: Any, tokens: Tensor) -> None:
    logits, cache = lens.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache) and cache.has_batch_dim and torch.equal(logits, lens(tokens))
    assert cache["resid_post", -1].shape == (2, 7, 20) and cache.model is lens
    plain = lens.run_with_cache(tokens, return_cache_object=False)[1]
    assert type(plain) is dict and list(plain) == list(cache.keys())
    first = lens.run_with_cache(tokens[:1], remove_batch_dim=True)[1]
    assert not first.has_batch_dim and first["hook_embed"].shape == (7, 20)
    loss, cache = lens.run_with_cache(tokens, return_type="loss", names_filter=["hook_embed"])
    assert loss.shape == () and list(cache.keys()) == ["hook_embed"]


@pytest.mark.parametrize("position", [-1, 2, (1, 4), [0, 3], None])
def test_a_cache_of_some_positions(lens: Any, tokens: Tensor, position: Any) -> None:
    whole, some = lens.run_with_cache(tokens)[1], lens.run_with_cache(tokens, pos_slice=position)[1]
    index = {-1: slice(-1, None), 2: slice(2, 3), (1, 4): slice(1, 4), None: slice(None)}.get(
        position if not isinstance(position, list) else 0, position
    )
    for name in whole:
        axis_three = name.endswith(("hook_q", "hook_k", "hook_v", "hook_z"))
        expected = whole[name][:, index] if axis_three else whole[name][..., index, :]
        assert torch.equal(some[name], expected), name


def test_a_cache_is_filled_the_same_way_beside_hooks(lens: Any, tokens: Tensor) -> None:
    plain = lens.run_with_cache(tokens)[1]
    with lens.hooks([(lambda name: True, lambda value, hook: None)]):
        beside = lens.run_with_cache(tokens)[1]
    # A norm that nobody could have edited is computed in one fused operation, which rounds differently.
    assert all(torch.allclose(plain[name], beside[name], atol=1e-6) for name in plain) and list(plain) == list(beside)
    added = lens.add_caching_hooks()
    lens(tokens)
    lens.reset_hooks()
    assert all(torch.equal(plain[name], added[name]) for name in plain)


@torch.no_grad()
def test_a_cache_keeps_what_later_edits_do_not_reach(lens: Any, raw: Any, tokens: Tensor) -> None:
    """What is cached at one point is not changed by an edit in place at a later one."""

    def spoil(value: Tensor, hook: HookPoint) -> None:
        value.fill_(7.0)

    for model in (lens, raw):
        plain = model.run_with_cache(tokens)[1]
        for index, name in enumerate(plain):
            if name.endswith("ln1.hook_scale"):
                continue  # it fires again after the edit, for keys and values
            with model.hooks([(name, spoil)]):
                cache = model.run_with_cache(tokens)[1]
            changed = [earlier for earlier in list(plain)[:index] if not close(cache[earlier], plain[earlier])]
            assert changed == [], name
            assert bool((cache[name] == 7).all())


def test_a_failed_cached_run_records_nothing_afterwards(lens: Any, tokens: Tensor) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    with lens.hooks([("blocks.1.hook_resid_pre", fail)]), pytest.raises(ZeroDivisionError):
        lens.run_with_cache(tokens)
    _, cache = lens.run_with_cache(tokens, names_filter="hook_embed")
    lens(tokens.flip(0))
    assert torch.equal(cache["hook_embed"], lens.embed(tokens))
    assert list(cache.keys()) == ["hook_embed"]


# --- modules in the place of hook points -----------------------------------------------------------------------------


class Steering(nn.Module):
    """Adds a learned vector, with hook points of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.linspace(-1, 1, 20))
        self.hook_before = HookPoint()
        self.hook_after = HookPoint()

    def forward(self, value: Tensor) -> Tensor:
        return self.hook_after(self.hook_before(value) + self.vector)


def test_a_module_put_in_a_hook_points_place_runs_on_the_activation(hf: Any, lens: Any, tokens: Tensor) -> None:
    added = torch.linspace(-1, 1, 20)
    expected = lens.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value + added)])
    plain = lens.run_with_cache(tokens)[1]
    spliced = Steering()
    lens.blocks[0].hook_mlp_out = spliced
    lens.setup()
    assert torch.allclose(lens(tokens), expected, atol=1e-5)
    logits, cache = lens.run_with_cache(tokens)
    inner = {"blocks.0.hook_mlp_out.hook_before", "blocks.0.hook_mlp_out.hook_after"}
    assert torch.allclose(logits, expected, atol=1e-5)
    assert set(cache.keys()) == set(plain) - {"blocks.0.hook_mlp_out"} | inner
    assert torch.allclose(cache["blocks.0.hook_mlp_out.hook_before"], plain["blocks.0.hook_mlp_out"], atol=1e-5)
    half = [("blocks.0.hook_mlp_out.hook_after", lambda value, hook: value - added)]
    assert torch.allclose(
        lens.run_with_hooks(tokens, fwd_hooks=half), lens.run_with_hooks(tokens, fwd_hooks=half), atol=1e-5
    )
    lens(tokens, return_type="loss").backward()
    assert spliced.vector.grad is not None and spliced.vector.grad.any()
    with pytest.raises(TypeError, match="is a Steering, not a hook point"):
        lens.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", doubled)])
    lens.blocks[0].hook_mlp_out = HookPoint()
    lens.setup()
    assert torch.equal(lens(tokens), lens.run_with_cache(tokens)[0])


def test_a_module_that_passes_the_value_on_changes_nothing(lens: Any, tokens: Tensor) -> None:
    expected = lens(tokens)
    lens.blocks[1].attn.hook_z = nn.Identity()
    lens.setup()
    assert torch.equal(lens(tokens), expected)


# --- subclasses ------------------------------------------------------------------------------------------------------


class Counting(HookedTransformer):
    """A subclass as users write them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.probe = nn.Linear(20, 1)
        self.hook_probe = HookPoint()
        self.setup()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_a_subclass_works_through_from_pretrained(new_lens: Callable, hf: Any, lens: Any, tokens: Tensor) -> None:
    mine = new_lens(hf, cls=Counting)
    assert type(mine) is Counting and isinstance(mine, HookedRootModule)
    assert torch.equal(mine(tokens), lens(tokens)) and torch.equal(mine.run_with_cache(tokens)[0], lens(tokens))
    mine.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", doubled)])
    assert mine.calls == 3 and "hook_probe" in mine.hook_dict and point_of("hook_probe") is None
    # A point of its own is its own business: hooks there neither disturb a run nor are lost.
    seen = []
    with mine.hooks([("hook_probe", lambda value, hook: seen.append(value))]):
        assert torch.equal(mine(tokens), lens(tokens))
        mine.hook_probe(mine.probe(torch.ones(20)))
    assert len(seen) == 1


def test_a_subclass_with_arguments_of_its_own(new_lens: Callable, tokens: Tensor) -> None:
    class Renamed(HookedTransformer):
        def __init__(self, config: Any, *, tokenizer: Any = None, **rest: Any) -> None:
            super().__init__(config, tokenizer, **rest)
            self.nickname = "mine"

    with pytest.raises(TypeError):
        new_lens(cls=Renamed)  # its tokenizer is keyword-only, and the loader passes it by position

    class Wide(HookedTransformer):
        def __init__(self, cfg: Any, tokenizer: Any = None, *args: Any, depth: int = 3, **kwargs: Any) -> None:
            super().__init__(cfg, tokenizer, *args, **kwargs)
            self.depth = depth

    model = new_lens(cls=Wide)
    assert model.depth == 3 and model(tokens).shape == (2, 7, 290)


def test_modules_of_a_subclass_are_trained_moved_and_saved(new_lens: Callable, new_hf: Callable) -> None:
    mine, other = (new_lens(new_hf(seed=seed), raw=True, cls=Counting) for seed in (0, 1))
    assert {"probe.weight", "probe.bias"} <= {name for name, _ in mine.named_parameters()}
    state = {name: value.clone() for name, value in other.state_dict().items()}
    assert torch.equal(state["probe.weight"], other.probe.weight)
    mine.load_state_dict(state)
    assert torch.equal(mine.probe.weight, other.probe.weight) and torch.equal(mine.W_E, other.W_E)
    with pytest.raises(RuntimeError, match="missing .'probe.bias'."):
        mine.load_state_dict({name: value for name, value in state.items() if name != "probe.bias"})
    with pytest.raises(RuntimeError, match=r"probe.bias: \(3,\) instead of \(1,\)"):
        mine.load_state_dict(state | {"probe.bias": torch.zeros(3)})
    assert mine.double().probe.weight.dtype == torch.float64


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processed", [False, True])
def test_training_through_the_facade_is_training_the_hf_model(
    new_hf: Callable, new_lens: Callable, tokens: Tensor, processed: bool
) -> None:
    alone, hooked = new_hf(), new_hf()
    lens = new_lens(hooked, raw=not processed)
    losses: list[list[float]] = []
    for parameters, loss_of in (
        (alone.parameters(), lambda: alone(tokens, labels=tokens).loss),
        (lens.parameters(), lambda: lens(tokens, return_type="loss")),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] < losses[0][0]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone.parameters(), hooked.parameters(), strict=True))


def test_parameters_are_the_hf_models(hf: Any, lens: Any) -> None:
    names = [name for name, _ in hf.named_parameters()]
    assert [name for name, _ in lens.named_parameters()] == names
    assert all(a is b for a, b in zip(lens.parameters(), hf.parameters(), strict=True))
    assert [name for name, _ in lens.named_parameters(prefix="m")] == [f"m.{name}" for name in names]
    lens.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in hf.parameters())
    lens.requires_grad_()
    lens(torch.tensor([[1, 2]]), return_type="loss").backward()
    lens.zero_grad()
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_training_mode(hf: Any, lens: Any) -> None:
    assert lens.train() is lens and hf.training and lens.training and lens.blocks[0].training
    assert lens.eval() is lens and not hf.training and not lens.training


# --- places and types ------------------------------------------------------------------------------------------------


def test_to_casts_and_moves_the_hf_model(hf: Any, lens: Any, tokens: Tensor, capsys: Any) -> None:
    assert lens.to(torch.float64) is lens
    assert hf.dtype == torch.float64 and lens.cfg.dtype == torch.float64 and lens.W_E.dtype == torch.float64
    assert lens(tokens).dtype == torch.float64 and lens.run_with_cache(tokens)[1]["hook_embed"].dtype == torch.float64
    assert "Changing model dtype to torch.float64" in capsys.readouterr().out
    lens.to("meta", print_details=False)
    assert hf.device.type == "meta" and lens.cfg.device == "meta" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64), ("float", torch.float32)],
)
def test_casts_by_name(hf: Any, lens: Any, cast: str, dtype: torch.dtype) -> None:
    assert getattr(lens, cast)() is lens
    assert hf.dtype == lens.cfg.dtype == lens.b_U.dtype == dtype


def test_moves_by_name(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[Any] = []
    monkeypatch.setattr(type(lens), "to", lambda self, place, print_details=True: moves.append(place) or self)
    assert lens.cpu() is lens.cuda() is lens.cuda(1) is lens.cuda("cuda:2") is lens.mps() is lens
    assert moves == ["cpu", "cuda", torch.device("cuda", 1), "cuda:2", "mps"]


def test_move_model_modules_to_device(hf: Any, lens: Any) -> None:
    lens.cfg.device = "meta"
    hf.hf_device_map = {"": "cpu"}
    lens.move_model_modules_to_device()
    assert hf.device.type == "cpu"
    del hf.hf_device_map
    lens.move_model_modules_to_device()
    assert hf.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_keep_norms_in_float32(
    new_hf: Callable, new_lens: Callable, tokens: Tensor, dtype: torch.dtype
) -> None:
    hf = new_hf().to(dtype)
    lens = new_lens(hf)
    logits, cache = lens.run_with_cache(tokens)
    wide = {name for name, value in cache.items() if value.dtype == torch.float32}
    assert wide == {name for name in cache if name.endswith(("hook_scale", "hook_normalized"))}
    assert logits.dtype == dtype and {v.dtype for n, v in cache.items() if n not in wide} == {dtype}
    for name in cache:
        lens.run_with_hooks(tokens, fwd_hooks=[(name, doubled)])
    exact = new_lens(new_hf())(tokens)
    assert (logits - exact).abs().max().item() < 0.1 * exact.abs().max().item()


# --- the rest --------------------------------------------------------------------------------------------------------


def test_the_hf_model_is_no_part_of_the_facade(hf: Any, lens: Any) -> None:
    assert lens.hf_model is hf and not any(module is hf for module in lens.modules())
    assert set(lens.mod_dict) == {name for name, _ in lens.named_modules() if name}
    assert "hf_model" not in repr(lens) and "blocks.1.hook_resid_post" in repr(lens)
    with pytest.raises(AttributeError):
        lens.hf_model = None


def test_loss_fn(lens: Any, tokens: Tensor) -> None:
    logits = lens(tokens)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(lens.loss_fn(logits, tokens), expected)
    assert lens.loss_fn(logits, tokens, per_token=True).shape == (2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    assert not lens.loss_fn(logits, tokens, mask, per_token=True)[0, 0]


def test_backward_hooks_in_a_run_warn(lens: Any, tokens: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lens.run_with_hooks(tokens, bwd_hooks=[("hook_embed", doubled)])
    assert "removes its backward hooks" in caplog.text and lens.list_hooks() == {}


def test_gradients_are_cached(lens: Any, tokens: Tensor) -> None:
    lens.double()
    loss, cache = lens.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    names = [name for name in cache if not name.endswith("_grad")]
    assert set(cache.keys()) == set(names) | {f"{name}_grad" for name in names}
    # The derivative of the loss along the last residual stream, by a small step.
    direction = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_at(step: float) -> float:
        hooks = [("blocks.1.hook_resid_post", lambda value, hook: value + step * direction)]
        return lens.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss").item()

    expected = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert float((cache["blocks.1.hook_resid_post_grad"] * direction).sum()) == pytest.approx(expected, rel=1e-5)
    assert lens.list_hooks() == {}


def test_hooks_are_found_however_they_came_and_went(lens: Any, tokens: Tensor) -> None:
    plain, point, seen = lens(tokens), lens.blocks[0].hook_resid_post, []
    twin = copy.deepcopy(lens)
    handle = point.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    lens(tokens)
    handle.remove()
    lens.add_hook(point.name, lambda value, hook: value * 0)
    assert len(seen) == 1 and not torch.equal(lens(tokens), plain)
    point.fwd_hooks = []
    assert torch.equal(lens(tokens), plain)
    twin.blocks[0].hook_resid_post.fwd_hooks = []
    twin.add_hook(point.name, lambda value, hook: value * 0)
    assert not torch.equal(twin(tokens), plain) and torch.equal(lens(tokens), plain)
