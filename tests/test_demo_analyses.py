"""Do the demo's analyses measure what they say, on cases whose answer is known beforehand?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lensbridge import HookedTransformer
from lensbridge.assets.prompts import ioi_prompts, repeated_tokens
from lensbridge.demo.analyses import DEMO_TEMPLATES, QUICK, prompt_groups, random_rows, run_demo
from lensbridge.demo.heads import Head, all_heads, ranked_heads, zero_hooks
from lensbridge.demo.induction import diagonal_scores, half_losses, run_induction, uniform_score
from lensbridge.demo.ioi import logit_difference, run_ioi
from lensbridge.demo.layout import PromptGroup, group_prompts, single_token_names
from lensbridge.demo.page import CODE
from lensbridge.demo.patching_sweep import run_sweep
from lensbridge.errors import UnsupportedModelError
from lensbridge.utils import get_act_name

PERIOD = 5


def without_tokenizer(directory: Path, n_ctx: int) -> HookedTransformer:
    """A random model of two layers of three heads; its name is an empty directory, where no tokenizer is found."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=24, n_head=3, n_positions=n_ctx, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    return HookedTransformer.from_pretrained(str(directory), hf_model=GPT2LMHeadModel(config).eval(), device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    """A random model without a tokenizer."""
    return without_tokenizer(tmp_path_factory.mktemp("tiny"), n_ctx=20)


@pytest.fixture(scope="module")
def toy() -> HookedTransformer:
    """The bundled model."""
    return HookedTransformer.from_pretrained("toy", device="cpu")


@pytest.fixture(scope="module")
def groups(toy: HookedTransformer) -> list[PromptGroup]:
    """Prompts of the demo's quick size, laid out for the bundled model."""
    return prompt_groups(toy, QUICK, seed=0)[0]


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Random tokens twice, for the tiny model."""
    return repeated_tokens(40, 3, PERIOD, None, torch.Generator().manual_seed(1))


# --- induction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("shift", "expected"), [(PERIOD - 1, [1, 0, 0]), (1, [0, 1, 0]), (PERIOD, [0, 0, 1])])
def test_a_pattern_that_is_one_diagonal_has_one_score_of_exactly_one(
    start: int, shift: int, expected: list[float]
) -> None:
    length = start + 2 * PERIOD
    pattern = torch.zeros(2, 1, length, length)
    for query in range(shift, length):
        pattern[:, 0, query, query - shift] = 1.0
    assert diagonal_scores(pattern, PERIOD, start)[:, 0].tolist() == expected


def test_even_attention_scores_what_uniform_score_says() -> None:
    length = 1 + 2 * PERIOD
    even = torch.ones(length, length).tril()
    even = (even / even.sum(-1, keepdim=True))[None, None]
    assert float(diagonal_scores(even, PERIOD, 1)[0]) == pytest.approx(uniform_score(PERIOD, 1), abs=1e-6)


@pytest.mark.parametrize("start", [0, 1])
def test_the_first_token_of_a_copy_counts_in_neither_half(start: int) -> None:
    # Entry p scores the token at p + 1: the first tokens of the copies are scored at start - 1 and start + period - 1.
    loss = torch.full((2, start + 2 * PERIOD - 1), 100.0)
    loss[:, start : start + PERIOD - 1] = 3.0
    loss[:, start + PERIOD :] = 2.0
    assert half_losses(loss, PERIOD, start) == (3.0, 2.0)


def test_heads_are_ranked_and_named() -> None:
    table = torch.tensor([[0.1, 0.5], [0.9, 0.5]])
    assert ranked_heads(table, 3) == [Head(1, 0), Head(0, 1), Head(1, 1)]
    assert str(Head(1, 0)) == "L1H0"


def test_zero_hooks_silence_these_heads_and_no_other(tiny: HookedTransformer, rows: torch.Tensor) -> None:
    with tiny.hooks(fwd_hooks=zero_hooks([Head(0, 2), Head(1, 0), Head(1, 1)])):
        _, cache = tiny.run_with_cache(rows)
    silent = [[bool((cache["z", layer][:, :, head] == 0).all()) for head in range(3)] for layer in range(2)]
    assert silent == [[False, False, True], [True, True, False]]


def test_induction_on_a_random_model(tiny: HookedTransformer, rows: torch.Tensor) -> None:
    result = run_induction(tiny, rows, PERIOD, n_controls=2)
    assert result.scores.induction.shape == result.scores.duplicate_token.shape == (2, 3)
    assert result.loss_by_position.shape == (2 * PERIOD - 1,)
    assert result.example_pattern.shape == (2 * PERIOD, 2 * PERIOD)
    assert result.example_tokens == [str(token) for token in rows[0].tolist()]
    assert result.heads == [] and result.strongest == ranked_heads(result.scores.induction)[0]
    assert len(result.ablations) == 1 and len(result.ablations[0].controls) == 2
    assert all(result.strongest not in control for control in result.ablations[0].controls)
    _, cache = tiny.run_with_cache(rows)
    table = torch.stack([diagonal_scores(cache["pattern", layer], PERIOD, 0)[0] for layer in range(2)])
    torch.testing.assert_close(result.scores.induction, table)


def test_the_ablated_loss_is_that_of_the_model_without_the_heads(tiny: HookedTransformer, rows: torch.Tensor) -> None:
    result = run_induction(tiny, rows, PERIOD, threshold=0.0)
    assert result.heads == ranked_heads(result.scores.induction)
    together = result.ablations[1]
    assert together.heads == result.heads
    assert together.controls == [], "no head is left to compare with"

    def silence(z: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.zeros_like(z)

    all_z = [(lambda name: name.endswith("hook_z"), silence)]
    with torch.no_grad():
        loss = tiny.run_with_hooks(rows, return_type="loss", loss_per_token=True, fwd_hooks=all_z)
    assert together.loss == pytest.approx(float(loss[:, PERIOD:].mean()), rel=1e-5)


def test_the_same_seed_draws_the_same_heads(tiny: HookedTransformer, rows: torch.Tensor) -> None:
    first, again, other = (run_induction(tiny, rows, PERIOD, seed=seed).ablations[0].controls for seed in (3, 3, 4))
    assert first == again != other


def test_rows_hold_no_special_token_but_the_first(toy: HookedTransformer) -> None:
    tokens, period = random_rows(toy, QUICK, seed=0)
    assert tokens.shape == (QUICK.rows, 1 + 2 * period)
    bos = toy.tokenizer.bos_token_id
    assert (tokens == bos).sum() == QUICK.rows and (tokens[:, 0] == bos).all()
    assert torch.equal(tokens[:, 1 : 1 + period], tokens[:, 1 + period :])
    assert int(tokens.max()) < len(toy.tokenizer)


# --- indirect objects ------------------------------------------------------------------------------------------------


def test_prompts_of_a_group_are_laid_out_alike(toy: HookedTransformer, groups: list[PromptGroup]) -> None:
    assert sum(map(len, groups)) == QUICK.prompts
    for group in groups:
        first, second, giver = group.name_positions
        assert group.clean.shape == group.swapped.shape == (len(group), len(group.position_labels))
        assert (group.clean != group.swapped).nonzero()[:, 1].tolist() == [giver] * len(group)
        assert torch.equal(group.clean[:, giver], group.s) and torch.equal(group.swapped[:, giver], group.io)
        both = group.clean[:, [first, second]].sort(-1).values
        assert torch.equal(both, torch.stack([group.io, group.s], -1).sort(-1).values)
        assert group.position_labels[giver] == "giver (S2)" and group.position_labels[-1] == "to (END)"
        assert toy.to_string(group.clean[0, 1:]) == group.prompts[0].prompt


def test_groups_come_largest_first_and_can_be_cut(groups: list[PromptGroup]) -> None:
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    cut = groups[0].first(2)
    assert len(cut) == 2 and cut.clean.shape[0] == cut.io.shape[0] == 2


def test_prompts_that_do_not_name_two_people_as_meant_are_left_out(toy: HookedTransformer) -> None:
    good, other = ioi_prompts(2, seed=0, templates=DEMO_TEMPLATES[:1])
    names = single_token_names(toy)
    thrice = replace(good, prompt=good.prompt.replace(f" {good.io} ", f" {good.s} "))
    longer = replace(good, swapped=good.swapped + " the")
    assert [group.prompts for group in group_prompts(toy, [good, thrice, longer], names)] == [[good]]
    assert sum(map(len, group_prompts(toy, [good, other], names))) == 2


def test_only_names_of_one_token_are_used(toy: HookedTransformer) -> None:
    names = single_token_names(toy, ["Mary", "Mxyzptlk"])
    assert names == {"Mary": toy.to_single_token(" Mary")}


def test_logit_difference_is_taken_at_the_last_position(groups: list[PromptGroup]) -> None:
    group = groups[0].first(2)
    logits = torch.zeros(2, group.clean.shape[1], 2000)
    logits[:, 0] = 7.0
    logits[[0, 1], -1, group.io] = torch.tensor([3.0, 1.0])
    logits[[0, 1], -1, group.s] = torch.tensor([1.0, 2.0])
    assert logit_difference(logits, group).tolist() == [2.0, -1.0]


def test_attributions_add_up_to_the_logit_difference(toy: HookedTransformer, groups: list[PromptGroup]) -> None:
    result = run_ioi(toy, groups)
    n_layers, n_heads = toy.cfg.n_layers, toy.cfg.n_heads
    assert result.n_prompts == QUICK.prompts
    assert result.explained == pytest.approx(result.logit_difference, abs=1e-3)
    assert result.head_attribution.shape == (n_layers, n_heads)
    assert result.attention.shape == (n_layers, n_heads, 3)
    # The stream before layer k is what the parts below it add up to: the two embeddings, then two outputs a layer.
    for layer in range(n_layers):
        running = float(result.component_attribution[: 2 + 2 * layer].sum())
        assert float(result.accumulated[result.accumulated_labels.index(f"{layer}_pre")]) == pytest.approx(
            running, abs=1e-3
        )
    assert all(result.head_attribution[head] > 0 for head in result.writers)
    assert all(result.head_attribution[head] < 0 for head in result.opponents)


def test_attention_of_a_head_goes_to_the_roles_it_is_said_to(toy: HookedTransformer, groups: list[PromptGroup]) -> None:
    group = groups[0]

    def look_at_io(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        io_position = (group.clean == group.io[:, None]).int().argmax(-1)
        pattern = torch.zeros_like(pattern)
        pattern[torch.arange(len(group)), :, -1, io_position] = 1.0
        return pattern

    with toy.hooks(fwd_hooks=[(get_act_name("pattern", 1), look_at_io)]):
        result = run_ioi(toy, [group])
    assert result.attention[1].tolist() == [[1.0, 0.0, 0.0]] * toy.cfg.n_heads


def test_accuracy_counts_prompts(toy: HookedTransformer, groups: list[PromptGroup]) -> None:
    group = groups[0]
    with torch.no_grad():
        right = logit_difference(toy(group.clean), group) > 0
    result = run_ioi(toy, [group])
    assert result.accuracy == pytest.approx(float(right.float().mean()))
    backwards = run_ioi(toy, [replace(group, io=group.s, s=group.io)])
    assert backwards.accuracy == pytest.approx(1 - result.accuracy)
    assert backwards.logit_difference == pytest.approx(-result.logit_difference, rel=1e-5)


# --- patching --------------------------------------------------------------------------------------------------------


def test_patching_everything_that_differs_brings_everything_back(
    toy: HookedTransformer, groups: list[PromptGroup]
) -> None:
    result = run_sweep(toy, groups[0].first(4))
    assert result.meaningful
    n_layers, giver = toy.cfg.n_layers, result.giver_position
    assert result.resid.shape == (n_layers + 1, groups[0].clean.shape[1])
    assert result.heads.shape == (n_layers, toy.cfg.n_heads)
    # Before layer 0 prompts differ in the giver alone, and after the last layer nothing but the last position is read.
    assert float(result.resid[0, giver]) == pytest.approx(1.0, abs=1e-3)
    assert float(result.resid[-1, -1]) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(
        result.resid[0, giver + 1 :], torch.zeros_like(result.resid[0, giver + 1 :]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(result.resid[-1, :-1], torch.zeros_like(result.resid[-1, :-1]), atol=1e-3, rtol=0)
    assert not result.resid[:, :giver].any()


def test_patching_a_head_is_what_a_hook_by_hand_does(toy: HookedTransformer, groups: list[PromptGroup]) -> None:
    group = groups[0].first(4)
    result = run_sweep(toy, group)
    layer, head = result.carriers[0]
    name = get_act_name("z", layer)
    with torch.no_grad():
        _, cache = toy.run_with_cache(group.clean)

        def patch(z: torch.Tensor, hook: object) -> None:
            z[:, :, head] = cache[name][:, :, head]

        patched = logit_difference(toy.run_with_hooks(group.swapped, fwd_hooks=[(name, patch)]), group).mean()
    gap = result.clean_difference - result.corrupted_difference
    assert float(result.heads[layer, head]) == pytest.approx(
        float((patched - result.corrupted_difference) / gap), abs=1e-4
    )


def test_prompts_that_do_not_differ_are_not_divided_by(toy: HookedTransformer, groups: list[PromptGroup]) -> None:
    group = groups[0].first(2)
    result = run_sweep(toy, replace(group, swapped=group.clean))
    assert not result.meaningful
    assert result.resid.isnan().all() and result.heads.isnan().all()


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_model_without_tokenizer_gets_induction_only(tiny: HookedTransformer) -> None:
    result = run_demo(tiny, "tiny", quick=True)
    assert result.ioi is None and result.sweep is None
    assert "no tokenizer" in result.left_out
    assert result.induction.period == 10 and result.induction.start == 0
    assert result.about.n_heads == 3 and result.about.model == "tiny"


def test_a_context_too_short_for_anything_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="n_ctx=3"):
        run_demo(without_tokenizer(tmp_path, n_ctx=3), "short")


def test_too_few_usable_names_are_explained(toy: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lensbridge.demo.analyses.single_token_names", lambda model: {"Mary": 1})
    groups, unusable, reason = prompt_groups(toy, QUICK, seed=0)
    assert groups == [] and unusable == 0
    assert "Only 1 of the demo's names" in reason


def test_prompts_longer_than_the_context_are_explained(toy: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.cfg, "n_ctx", 8)
    groups, unusable, reason = prompt_groups(toy, QUICK, seed=0)
    assert groups == [] and unusable == QUICK.prompts
    assert "within 8 tokens" in reason


def test_the_code_on_the_page_runs() -> None:
    names: dict[str, object] = {}
    exec(CODE.format(name="toy"), names)
    assert names["cache"]["pattern", 0].shape[1] == names["model"].cfg.n_heads  # type: ignore[index,attr-defined]


def test_the_bundled_model_has_the_circuits(toy: HookedTransformer) -> None:
    result = run_demo(toy, "toy", quick=True)
    assert result.ioi is not None and result.sweep is not None and not result.left_out
    assert result.induction.heads and result.induction.first_loss - result.induction.second_loss > 1
    assert result.ioi.accuracy > 0.9
    assert result.sweep.meaningful
    assert set(result.induction.heads) <= set(all_heads(toy))
