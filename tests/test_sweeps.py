"""Does an intervention do in a sweep what it does alone, for whatever hooks, inputs and models, and in less work?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge.errors import DisabledPointError, HookError, UnknownPointError
from lensbridge.hook_points import HookPoint
from lensbridge.points import names
from lensbridge.sweeps import sharing
from lensbridge.sweeps.interventions import Intervention, layer_of

Hook = Callable[..., Any]
Pairs = list[tuple[Any, Hook]]

PRE = "blocks.{}.hook_resid_pre"
Z = "blocks.{}.attn.hook_z"


def halve(value: Tensor, hook: HookPoint) -> Tensor:
    return value * 0.5


def in_place(value: Tensor, hook: HookPoint) -> None:
    value[:, 1:] = 0.75


def shift(value: Tensor, hook: HookPoint, by: float) -> Tensor:
    value += by
    return value


def close(mine: Tensor, alone: Tensor) -> None:
    """Equal up to the rounding of float32, in relation to the largest value."""
    assert mine.shape == alone.shape
    assert mine.dtype == alone.dtype
    finite = alone.isfinite()
    assert torch.equal(mine.isfinite(), finite)
    scale = alone[finite].abs().max().item() if finite.any() else 1.0
    torch.testing.assert_close(mine, alone, rtol=0, atol=3e-5 * max(scale, 1e-3))


def alone(model: Any, input: Any, interventions: Sequence[Pairs], **arguments: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model.run_with_hooks(input, fwd_hooks=pairs, **arguments) for pairs in interventions]


def same_as_alone(
    model: Any, input: Any, interventions: Sequence[Pairs], batch_size: int = 5, **arguments: Any
) -> None:
    expected = alone(model, input, interventions, **arguments)
    for metric in (None, lambda logits: logits.clone()):
        found = list(model.run_sweep(input, interventions, metric, batch_size=batch_size, **arguments))
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            close(mine, theirs)


def all_on(model: Any) -> Any:
    for flag in ("attn_result", "split_qkv_input", "hook_mlp_in", "attn_in"):
        getattr(model, f"set_use_{flag}")(True)
    return model


@pytest.fixture
def deep(new_hf: Callable[..., Any], new_lens: Callable[..., Any]) -> Any:
    """Four layers."""
    return new_lens(new_hf(n_layers=4))


@pytest.fixture
def passes(deep: Any) -> list[str]:
    """Which modules of ``deep`` have run: "model", and the number of a layer for each attention."""
    assert deep.interior.engine.order  # which is measured by a pass of its own
    seen: list[str] = []
    deep.hf_model.register_forward_pre_hook(lambda *_: seen.append("model"))
    for layer, block in enumerate(deep.hf_model.transformer.h):
        block.attn.register_forward_pre_hook(lambda *_, layer=layer: seen.append(str(layer)))
    return seen


# --- the same as alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processing", ["raw", "default", "refactored"])
def test_every_point(new_lens: Callable[..., Any], tokens: Tensor, processing: str) -> None:
    refactored = {"refactor_factored_attn_matrices": True} if processing == "refactored" else {}
    model = all_on(new_lens(raw=processing == "raw", **refactored))
    edits = (halve, in_place, partial(shift, by=0.3))
    interventions = [[(name, edit)] for name in names(2) for edit in edits]
    same_as_alone(model, tokens, interventions, batch_size=7)


@torch.no_grad()
def test_a_hook_sees_what_it_would_see_alone(new_lens: Callable[..., Any], tokens: Tensor) -> None:
    model = all_on(new_lens())
    layers: list[int] = []

    def seeing(edit: str, seen: list[tuple[str, Tensor]]) -> Pairs:
        def look(value: Tensor, hook: HookPoint) -> None:
            assert hook is model.hook_dict[hook.name]
            if hook.name.startswith("blocks"):
                layers.append(hook.layer())
            seen.append((hook.name, value.clone()))

        return [(edit, halve), (lambda name: True, look)]

    edited = ["hook_embed", PRE.format(0), "blocks.0.attn.hook_pattern", Z.format(1), PRE.format(1), "unembed.hook_in"]
    expected: list[list[tuple[str, Tensor]]] = [[] for _ in edited]
    found: list[list[tuple[str, Tensor]]] = [[] for _ in edited]
    alone(model, tokens, [seeing(name, seen) for name, seen in zip(edited, expected, strict=True)])
    once = sorted(layers)
    list(model.run_sweep(tokens, [seeing(name, seen) for name, seen in zip(edited, found, strict=True)], batch_size=4))
    assert sorted(layers) == sorted(2 * once)
    for mine, theirs in zip(found, expected, strict=True):
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        for (_, value), (_, other) in zip(mine, theirs, strict=True):
            close(value, other)


def test_interventions_of_every_kind_share_runs(deep: Any, tokens: Tensor) -> None:
    same_as_alone(
        deep,
        tokens,
        [
            [],
            [(Z.format(3), halve), (Z.format(1), in_place)],
            [(lambda name: name.endswith("hook_mlp_out"), halve)],
            [(PRE.format(2), halve), (PRE.format(2), in_place), (PRE.format(2), partial(shift, by=-1.0))],
            [("ln_final.hook_scale", halve)],
            [("hook_pos_embed", halve), ("unembed.hook_out", partial(shift, by=2.0))],
            [(lambda name: False, halve)],
            [(PRE.format(2), lambda value, hook: None)],
        ],
    )


def test_what_a_hook_returns_may_share_memory_with_what_it_was_given(lens: Any) -> None:
    square = torch.randint(1, 200, (2, 4))
    views: list[Hook] = [
        lambda value, hook: value.transpose(-1, -2),
        lambda value, hook: value.transpose(1, 2),
        lambda value, hook: value.detach(),
        lambda value, hook: value[:1].expand_as(value),
    ]
    same_as_alone(lens, square, [[("blocks.1.attn.hook_pattern", view)] for view in views])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_left(new_hf: Callable[..., Any], new_lens: Callable[..., Any], attention: str) -> None:
    model = new_lens(new_hf(n_layers=3, attention=attention))
    texts = ["The cat sat on the mat", "the dog", "Mary saw John a drink."]
    points = (PRE, Z, "blocks.{}.attn.hook_attn_scores", "blocks.{}.attn.hook_pattern", "blocks.{}.hook_mlp_out")
    interventions = [
        [(point.format(layer), edit)] for layer in (2, 1) for edit in (halve, in_place) for point in points
    ]
    same_as_alone(model, texts, interventions, padding_side="left", prepend_bos=False)
    plain = model(texts, padding_side="left", prepend_bos=False)
    assert not torch.allclose(plain, model(texts, padding_side="right", prepend_bos=False)[:, : plain.shape[1]])


def test_an_attention_mask(deep: Any, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 4] = 0
    interventions = [[(PRE.format(layer), halve)] for layer in (3, 1, 2)]
    same_as_alone(deep, tokens, interventions, attention_mask=mask)


def test_one_row_of_tokens_and_texts(deep: Any) -> None:
    interventions = [[(Z.format(layer), halve)] for layer in range(4)]
    same_as_alone(deep, torch.tensor([5, 6, 7]), interventions)
    same_as_alone(deep, "the dog saw Mary", interventions, prepend_bos=True)


def test_in_inference_mode(deep: Any, tokens: Tensor) -> None:
    with torch.inference_mode():
        same_as_alone(deep, tokens, [[(PRE.format(layer), edit)] for layer in (1, 3) for edit in (in_place, halve)])


def test_caching_hooks_as_interventions(deep: Any, tokens: Tensor) -> None:
    caches, wanted = zip(*[deep.get_caching_hooks(PRE.format(layer))[:2] for layer in range(4)], strict=True)
    deep.is_caching = False
    list(deep.run_sweep(tokens, wanted))
    _, expected = deep.run_with_cache(tokens)
    for layer, cache in enumerate(caches):
        assert list(cache) == [PRE.format(layer)]
        close(cache[PRE.format(layer)], expected[PRE.format(layer)])


# --- hooks that the model has anyway ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_hooks_on_the_model_act_in_every_run(deep: Any, tokens: Tensor, layer: int) -> None:
    seen: list[Tensor] = []

    def look_and_double(value: Tensor, hook: HookPoint) -> Tensor:
        seen.append(value.clone())
        return value * 2

    interventions = [[(PRE.format(at), edit)] for at in (2, 3, 2) for edit in (halve, in_place)]
    deep.add_hook(PRE.format(layer), look_and_double, is_permanent=True)
    with deep.hooks([(Z.format(layer), in_place)]):
        expected = alone(deep, tokens, interventions)
        before = seen.copy()
        seen.clear()
        found = list(deep.run_sweep(tokens, interventions, batch_size=4))
        assert len(deep.hook_dict[PRE.format(layer)].fwd_hooks) == 1
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs)
    assert [value.shape for value in seen] == [(2, 7, deep.cfg.d_model)] * len(interventions)
    for mine, theirs in zip(seen, before, strict=True):
        close(mine, theirs)


def test_a_cache_on_the_model_is_filled_by_the_last_run(deep: Any, tokens: Tensor) -> None:
    cache = deep.add_caching_hooks([PRE.format(3), PRE.format(1)])
    list(deep.run_sweep(tokens, [[(PRE.format(2), halve)], [(PRE.format(2), in_place)]]))
    mine = dict(cache)
    alone(deep, tokens, [[(PRE.format(2), in_place)]])
    assert list(mine) == [PRE.format(1), PRE.format(3)]
    for name, value in mine.items():
        close(value, cache[name])
    deep.reset_hooks()


def test_the_hooks_of_the_moment_act(deep: Any, tokens: Tensor) -> None:
    """A hook that comes while a sweep is under way acts from the next run on, below what was computed before too."""
    interventions = [[(PRE.format(3), halve)]] * 2
    results = deep.run_sweep(tokens, interventions, batch_size=1)
    close(next(results), alone(deep, tokens, interventions)[0])
    with deep.hooks([(PRE.format(1), in_place)]):
        close(next(results), alone(deep, tokens, interventions)[0])


class Doubled(HookPoint):
    """Takes a hook point's place, and has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2)


class Plain(nn.Module):
    """Takes a hook point's place without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_inner = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 2
        return self.hook_inner(x * 2)


def test_modules_in_a_hook_points_place(deep: Any, tokens: Tensor) -> None:
    deep.blocks[1].hook_mlp_out = Plain()
    deep.setup()
    own = [("blocks.1.hook_mlp_out.hook_inner", halve)]
    same_as_alone(
        deep, tokens, [[(PRE.format(2), halve)], own, [(PRE.format(3), in_place)], [*own, (Z.format(0), halve)]]
    )


# --- gradients, dropout -----------------------------------------------------------------------------------------------


def test_shared_runs_have_no_gradients(deep: Any, tokens: Tensor) -> None:
    assert all(not logits.requires_grad for logits in deep.run_sweep(tokens, [[(Z.format(1), halve)]] * 3))
    assert torch.is_grad_enabled()


def test_with_backward_hooks_each_runs_alone_with_gradients(deep: Any, tokens: Tensor, passes: list[str]) -> None:
    gradients: list[Tensor] = []

    def backward(logits: Tensor) -> float:
        loss = logits[0, -1, 3]
        loss.backward()
        return loss.item()

    with deep.hooks(bwd_hooks=[(PRE.format(1), lambda gradient, hook: gradients.append(gradient.clone()))]):
        found = list(deep.run_sweep(tokens, [[(PRE.format(2), halve)], [(PRE.format(3), in_place)]], backward))
    assert len(found) == 2
    assert passes.count("model") == 2
    assert [gradient.shape for gradient in gradients] == [(2, 7, deep.cfg.d_model)] * 2
    assert not torch.equal(*gradients)


def test_with_dropout_each_runs_alone(new_hf: Callable[..., Any], new_lens: Callable[..., Any], tokens: Tensor) -> None:
    model = new_lens(new_hf(resid_pdrop=0.5))
    model.train()
    interventions: list[Pairs] = [[(PRE.format(1), halve)], [(PRE.format(0), halve)]]
    torch.manual_seed(0)
    expected = alone(model, tokens, interventions)
    torch.manual_seed(0)
    for mine, theirs in zip(model.run_sweep(tokens, interventions), expected, strict=True):
        assert torch.equal(mine, theirs)


# --- the work that is saved -------------------------------------------------------------------------------------------


def test_interventions_share_runs_from_the_first_layer_they_touch(deep: Any, tokens: Tensor, passes: list[str]) -> None:
    interventions = [[(PRE.format(layer), halve)] for layer in (3, 1, 3, 1)]
    list(deep.run_sweep(tokens, interventions, lambda logits: 0.0, batch_size=2))
    # The stream before layer 1, two interventions from there on, the stream before layer 3, two interventions.
    assert passes == ["model", "0", "model", "1", "2", "3", "model", "1", "2", "model", "3"]


def test_without_a_metric_only_neighbours_share_runs(deep: Any, tokens: Tensor, passes: list[str]) -> None:
    list(deep.run_sweep(tokens, [[(Z.format(layer), halve)] for layer in (2, 0, 3, 3)], batch_size=2))
    # The first two from the tokens, the stream before layer 3, the last two.
    assert passes == "model 0 1 2 3 model 0 1 2 model 3".split()


def test_results_come_when_they_are_known(deep: Any, tokens: Tensor, passes: list[str]) -> None:
    results = deep.run_sweep(tokens, [[(Z.format(0), halve)]] * 5, lambda logits: len(passes), batch_size=2)
    assert passes == []
    assert [next(results), next(results), len(passes), next(results)] == [5, 5, 5, 10]


def test_the_metric_is_called_with_the_logits_of_one_intervention(deep: Any, tokens: Tensor) -> None:
    def ruin(logits: Tensor) -> tuple[int, ...]:
        logits.fill_(torch.nan)
        return tuple(logits.shape)

    found = list(deep.run_sweep(tokens, [[(Z.format(1), halve)]] * 3, ruin))
    assert found == [(2, 7, deep.cfg.d_vocab)] * 3


def test_kept_results_do_not_keep_their_whole_run(deep: Any, tokens: Tensor) -> None:
    first = next(deep.run_sweep(tokens, [[(Z.format(1), halve)]] * 3, batch_size=3))
    assert first.untyped_storage().nbytes() == first.numel() * first.itemsize


def test_logits_of_one_run_are_held_at_a_time(deep: Any, tokens: Tensor) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def alive(logits: Tensor) -> int:
        if all(ref() is not logits._base for ref in seen):
            seen.append(weakref.ref(logits._base))
        return sum(ref() is not None for ref in seen)

    assert list(deep.run_sweep(tokens, [[(Z.format(1), halve)]] * 6, alive, batch_size=2)) == [1] * 6
    assert len(seen) == 3


def test_a_sweep_over_nothing(deep: Any, tokens: Tensor) -> None:
    assert list(deep.run_sweep(tokens, [])) == []


@pytest.mark.parametrize("keep", [1, 3, 20, torch.tensor([4, 0]), torch.tensor([-1])])
def test_logits_at_some_positions(deep: Any, tokens: Tensor, keep: int | Tensor) -> None:
    points = (PRE.format(2), Z.format(0), "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out")
    interventions: list[Pairs] = [[(name, edit)] for name in points for edit in (halve, in_place)]
    expected = alone(deep, tokens, interventions)
    found = deep.run_sweep(tokens, interventions, batch_size=3, logits_to_keep=keep)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs[:, keep] if isinstance(keep, Tensor) else theirs[:, -keep:])


def test_logits_that_are_not_kept_are_not_computed(deep: Any, tokens: Tensor) -> None:
    assert deep.interior.engine.order  # which is measured by a pass of its own
    shapes: list[tuple[int, ...]] = []
    deep.hf_model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    list(deep.run_sweep(tokens, [[(Z.format(3), halve)]] * 3, logits_to_keep=1))
    assert shapes == [(6, 1, deep.cfg.d_vocab)]


def test_progress_counts_interventions(deep: Any, tokens: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    list(deep.run_sweep(tokens, [[(Z.format(3), halve)]] * 3))
    assert capsys.readouterr().err == ""
    list(deep.run_sweep(tokens, [[(Z.format(3), halve)]] * 3, progress=True))
    assert "3/3" in capsys.readouterr().err


# --- which share a run, and how many ----------------------------------------------------------------------------------


def at(*starts: int, alone: Sequence[int] = (), kinds: Sequence[tuple[str, ...]] = ()) -> list[Intervention]:
    kinds = kinds or [()] * len(starts)
    return [Intervention(i, [], {}, start, i in alone, kinds[i]) for i, start in enumerate(starts)]


def grouped(items: list[Intervention], limit: int = 3, enough: int = 1, in_order: bool = False) -> list[list[int]]:
    return [[item.index for item in group] for group in sharing.batches(items, limit, enough, in_order)]


def test_groups_begin_at_one_layer_and_have_a_limit() -> None:
    assert grouped(at(1, 0, 1, 1, 0, 1)) == [[1, 4], [0, 2, 3], [5]]
    assert grouped(at(1, 0, 1, 1, 0, 1), in_order=True) == [[0], [1], [2, 3], [4], [5]]


def test_small_groups_are_filled_up() -> None:
    assert grouped(at(0, 1, 2, 3, 3), enough=2) == [[0, 1], [2, 3, 4]]
    assert grouped(at(0, 1, 2, 3), enough=9, limit=9) == [[0, 1, 2, 3]]


def test_some_do_not_share() -> None:
    assert grouped(at(0, 0, 0, 0, alone=[1])) == [[0], [1], [2, 3]]
    assert grouped(at(0, 0, 0, 0, kinds=[("a",), (), ("a",), ()])) == [[1, 3], [0, 2]]


def test_the_layer_of_a_point() -> None:
    expected = {"hook_embed": 0, "hook_pos_embed": 0, "ln_final.hook_scale": 12, "unembed.hook_out": 12}
    assert {name: layer_of(name, 12) for name in expected} == expected
    assert [layer_of(name, 12) for name in names(12) if name.startswith("blocks")] == [
        layer for layer in range(12) for _ in range(sum(name.startswith("blocks.0.") for name in names(12)))
    ]


def test_a_cpu_is_kept_busy_and_no_more(deep: Any) -> None:
    cpu = torch.device("cpu")
    assert [sharing.most_at_once(deep.cfg, batch, 16, 16, cpu) for batch in (1, 3, 16, 17)] == [16, 6, 1, 1]


def test_on_an_accelerator_the_free_memory_counts_too(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    found = []
    for memory in (0, 1 << 23, 1 << 40):
        monkeypatch.setattr(sharing, "free_memory", lambda device, memory=memory: memory)
        found.append(sharing.most_at_once(deep.cfg, 1, 16, 16, gpu))
    assert found[0] == 1 < found[1] < found[2] == 512
    monkeypatch.setattr(sharing, "free_memory", lambda device: 1 << 23)
    assert sharing.most_at_once(deep.cfg, 2, 16, 16, gpu) == found[1] // 2
    assert sharing.most_at_once(deep.cfg, 1, 16, 1, gpu) > found[1]


def test_the_free_memory_of_a_gpu_has_what_torch_holds_and_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert sharing.free_memory(torch.device("cuda")) == 130
    assert sharing.free_memory(torch.device("mps")) > 1 << 20


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_wrong_points_are_found_before_anything_runs(deep: Any, tokens: Tensor, passes: list[str]) -> None:
    good: Pairs = [(PRE.format(0), halve)]
    with pytest.raises(UnknownPointError, match="Closest: blocks.0.hook_resid_pre"):
        deep.run_sweep(tokens, [good, [("blocks.0.hook_resid_pr", halve)]])
    with pytest.raises(DisabledPointError, match="set_use_attn_result"):
        deep.run_sweep(tokens, [good, [("blocks.0.attn.hook_result", halve)]])
    with pytest.raises(TypeError, match="no hook point|not a hook point"):
        deep.run_sweep(tokens, [good, [("blocks.0.attn", halve)]])
    with pytest.raises(TypeError, match="a list of interventions"):
        deep.run_sweep(tokens, good)
    with pytest.raises(ValueError, match="batch_size"):
        deep.run_sweep(tokens, [good], batch_size=0)
    with pytest.raises(ValueError, match="how many of the last positions"):
        deep.run_sweep(tokens, [good], logits_to_keep=-1)
    assert passes == []


def test_a_hook_that_fails_leaves_nothing_behind(lens: Any, hf: Any, tokens: Tensor, assert_untouched: Any) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ArithmeticError("no")

    interventions = [[(PRE.format(1), halve)], [(PRE.format(1), halve), (PRE.format(1), fail)], [(Z.format(1), halve)]]
    with pytest.raises(ArithmeticError, match="no"):
        list(lens.run_sweep(tokens, interventions))
    assert_untouched(hf, lens)
    same_as_alone(lens, tokens, interventions[::2])


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda value: value[:1], r"\[1, 7, 20\] float32.*\[2, 7, 20\] float32"),
        (lambda value: value.double(), "float64"),
        (lambda value: 3, "returned int"),
    ],
)
def test_other_shapes_need_a_run_of_their_own(
    lens: Any, hf: Any, tokens: Tensor, assert_untouched: Any, result: Hook, words: str
) -> None:
    interventions = [[(PRE.format(1), lambda value, hook: result(value))]] * 2
    with pytest.raises(HookError, match=words):
        list(lens.run_sweep(tokens, interventions))
    assert_untouched(hf, lens)


def test_in_a_run_of_its_own_a_hook_may_change_the_shape(lens: Any, tokens: Tensor) -> None:
    same_as_alone(lens, tokens, [[(PRE.format(1), lambda value, hook: value[:1])]] * 2, batch_size=1)


# --- runs within runs -------------------------------------------------------------------------------------------------


def test_hooks_and_metrics_may_run_the_model(deep: Any, tokens: Tensor) -> None:
    plain = deep(tokens).detach()

    def look_elsewhere(value: Tensor, hook: HookPoint) -> Tensor:
        return value + deep(tokens.flip(1), stop_at_layer=1).detach()

    def metric(logits: Tensor) -> Tensor:
        close(deep(tokens).detach(), plain)
        return logits

    interventions = [[(PRE.format(layer), look_elsewhere)] for layer in (2, 3)]
    expected = alone(deep, tokens, interventions)
    for mine, theirs in zip(deep.run_sweep(tokens, interventions, metric), expected, strict=True):
        close(mine, theirs)


def test_a_hook_may_remove_the_hooks_of_its_context(deep: Any, tokens: Tensor) -> None:
    def leave(value: Tensor, hook: HookPoint) -> Tensor:
        hook.remove_hooks(level=deep.context_level)
        return value * 0.5

    same_as_alone(deep, tokens, [[(PRE.format(2), leave), (PRE.format(2), in_place)]] * 2)
