"""Does every lens equal its formula, written out over `run_with_cache` or over HuggingFace's own outputs?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lensbridge import lenses
from lensbridge.lenses import AttentionSummary, attention_summary, logit_lens

LAYERS = [0, 1, 2, -1, None]
PROMPT = "The cat sat on"


def stream_of(lens: Any, tokens: Any, layer: int | None) -> torch.Tensor:
    _, cache = lens.run_with_cache(tokens)
    return cache["resid_pre", layer] if layer in (0, 1) else cache["resid_post", 1]


# --- the stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_the_residual_stream_at_a_layer(either: Any, tokens: torch.Tensor, layer: int | None) -> None:
    found = lenses.residual_stream(either, tokens, layer)
    torch.testing.assert_close(found, stream_of(either, tokens, layer))


def test_a_text_or_a_row_of_tokens_is_a_batch_of_one(lens: Any) -> None:
    row = lens.to_tokens(PROMPT)[0]
    assert torch.equal(lenses.residual_stream(lens, PROMPT, 1), lenses.residual_stream(lens, row, 1))


@pytest.mark.parametrize("layer", [3, -2])
def test_a_layer_that_does_not_exist(lens: Any, tokens: torch.Tensor, layer: int) -> None:
    with pytest.raises(IndexError, match=f"no layer {layer}: give 0 to 1"):
        lenses.residual_stream(lens, tokens, layer)


# --- logit lens -------------------------------------------------------------------------------------------------------


def test_logit_lens_is_huggingfaces_norm_and_head_on_every_hidden_state(raw: Any, tokens: torch.Tensor) -> None:
    hf = raw.hf_model
    with torch.no_grad():
        output = hf(tokens, output_hidden_states=True)
        # HF's last hidden state has been through the final norm already.
        *before, last = output.hidden_states
        expected = torch.stack([hf.lm_head(hf.transformer.ln_f(state)) for state in before] + [hf.lm_head(last)])
    found = logit_lens(raw, tokens)
    assert found.shape == (3, 2, 7, raw.cfg.d_vocab)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[-1], output.logits, rtol=1e-4, atol=1e-4)


def test_logit_lens_ends_in_the_models_own_logits(either: Any, tokens: torch.Tensor) -> None:
    torch.testing.assert_close(logit_lens(either, tokens)[-1], either(tokens), rtol=1e-4, atol=1e-4)


def test_logit_lens_of_a_cache(either: Any, tokens: torch.Tensor) -> None:
    _, cache = either.run_with_cache(tokens)
    stack, labels = cache.accumulated_resid(apply_ln=True, incl_mid=True, return_labels=True)
    found, names = logit_lens(either, cache, incl_mid=True, return_labels=True)
    torch.testing.assert_close(found, stack @ either.W_U + either.b_U)
    assert names == labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    torch.testing.assert_close(logit_lens(either, tokens, incl_mid=True), found, rtol=1e-4, atol=1e-4)


def test_logit_lens_as_probabilities(lens: Any, tokens: torch.Tensor) -> None:
    logits = logit_lens(lens, tokens)
    torch.testing.assert_close(logit_lens(lens, tokens, return_type="probs"), logits.softmax(-1))
    torch.testing.assert_close(logit_lens(lens, tokens, return_type="log_probs"), logits.log_softmax(-1))
    with pytest.raises(ValueError, match="'probs' or 'log_probs', not 'probabilities'"):
        logit_lens(lens, tokens, return_type="probabilities")  # type: ignore[call-overload]


def test_logit_lens_at_some_positions(lens: Any, tokens: torch.Tensor) -> None:
    whole = logit_lens(lens, tokens)
    torch.testing.assert_close(logit_lens(lens, tokens, pos_slice=-1), whole[:, :, -1])
    torch.testing.assert_close(logit_lens(lens, tokens, pos_slice=(2, 5)), whole[:, :, 2:5])


def test_logit_lens_squashes_logits_where_the_model_does(lens: Any, tokens: torch.Tensor) -> None:
    plain = logit_lens(lens, tokens)
    lens.cfg.output_logits_soft_cap = 2.0
    torch.testing.assert_close(logit_lens(lens, tokens), 2 * torch.tanh(plain / 2))


def test_logit_lens_needs_every_layer_in_the_cache(lens: Any, tokens: torch.Tensor) -> None:
    _, cache = lens.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(KeyError, match="resid_pre"):
        logit_lens(lens, cache)


# --- patchscope -------------------------------------------------------------------------------------------------------


def patched_by_hand(lens: Any, target: torch.Tensor, state: torch.Tensor, layer: Any, position: int) -> torch.Tensor:
    name = f"blocks.{layer}.hook_resid_pre" if layer in (0, 1) else "blocks.1.hook_resid_post"

    def put(resid: torch.Tensor, hook: Any) -> None:
        resid[:, position] = state

    return lens.run_with_hooks(target, fwd_hooks=[(name, put)])


@pytest.mark.parametrize("target_layer", LAYERS)
@pytest.mark.parametrize("source_layer", [0, 2])
def test_patchscope_by_hand(lens: Any, tokens: torch.Tensor, source_layer: int, target_layer: int | None) -> None:
    source, target = tokens, tokens.flip(0)[:, :5]
    found = lenses.patchscope(
        lens,
        source,
        target,
        source_layer=source_layer,
        source_position=3,
        target_layer=target_layer,
        target_position=-2,
    )
    state = stream_of(lens, source, source_layer)[:, 3]
    expected = patched_by_hand(lens, target, state, target_layer, 3)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, lens(target))


def test_a_state_put_back_where_it_was_changes_nothing(either: Any, tokens: torch.Tensor) -> None:
    for layer in (0, 1, 2):
        found = lenses.patchscope(either, tokens, tokens, source_layer=layer, target_layer=layer)
        torch.testing.assert_close(found, either(tokens), rtol=1e-4, atol=1e-4)


def test_at_the_end_of_the_model_patchscope_is_the_logit_lens(lens: Any, tokens: torch.Tensor) -> None:
    found = lenses.patchscope(lens, tokens, tokens[:1], source_layer=1, target_layer=None)
    torch.testing.assert_close(found[:, -1], logit_lens(lens, tokens)[1, :, -1], rtol=1e-4, atol=1e-4)


def test_patchscope_maps_the_state_and_takes_another_model(
    lens: Any, new_lens: Any, new_hf: Any, tokens: torch.Tensor
) -> None:
    other = new_lens(new_hf(seed=5, n_layers=3))
    layers = {"source_layer": 1, "target_layer": 2}
    found = lenses.patchscope(lens, tokens, tokens, **layers, mapping=lambda h: 2 * h, target_model=other)
    state = 2 * stream_of(lens, tokens, 1)[:, -1]

    def put(resid: torch.Tensor, hook: Any) -> None:
        resid[:, -1] = state

    torch.testing.assert_close(found, other.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_pre", put)]))


def test_patchscope_text_is_the_greedy_continuation_of_the_patched_prompt(lens: Any, tokens: torch.Tensor) -> None:
    target = "Mary gave"
    layers = {"source_layer": 1, "target_layer": 0}
    found = lenses.patchscope_text(lens, tokens, target, **layers, max_new_tokens=4)
    for row, text in zip(tokens, found, strict=True):
        prompt = lens.to_tokens(target)
        position = prompt.shape[1] - 1
        state = stream_of(lens, row[None], 1)[:, -1]
        new: list[int] = []
        while len(new) < 4:
            best = int(patched_by_hand(lens, prompt, state, 0, position)[0, -1].argmax())
            new.append(best)
            prompt = torch.cat([prompt, torch.tensor([[best]])], dim=1)
        assert text == lens.tokenizer.decode(new, skip_special_tokens=True)


def test_patchscope_text_ends_at_the_end_of_text(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = lens.run_with_hooks

    def counted(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        runs.append(tokens.shape[1])
        logits = run(tokens, **options)
        logits[:, -1, lens.tokenizer.eos_token_id] = 1e6 if len(runs) > 1 else -1e6
        return logits

    monkeypatch.setattr(lens, "run_with_hooks", counted)
    lenses.patchscope_text(lens, "The cat", "Mary", source_layer=1, target_layer=1, max_new_tokens=9)
    assert len(runs) == 2


def test_positions_outside_a_prompt_are_refused(lens: Any, tokens: torch.Tensor) -> None:
    layers = {"source_layer": 1, "target_layer": 1}
    with pytest.raises(IndexError, match="source_position 7 is outside the prompt, which has 7 tokens"):
        lenses.patchscope(lens, tokens, tokens, **layers, source_position=7)
    with pytest.raises(IndexError, match="position -8 is outside"):
        lenses.patchscope(lens, tokens, tokens, **layers, target_position=-8)


# --- steering ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def direction(lens: Any) -> torch.Tensor:
    return torch.randn(lens.cfg.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", [None, 2, -1, slice(0, 3), [1, 4]])
def test_steering_by_hand(either: Any, tokens: torch.Tensor, direction: torch.Tensor, positions: Any) -> None:
    def add(resid: torch.Tensor, hook: Any) -> None:
        if positions is None:
            resid += 3 * direction
        elif isinstance(positions, list):
            for position in positions:
                resid[:, position] += 3 * direction
        else:
            resid[:, positions] += 3 * direction

    expected = either.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", add)])
    found = lenses.steered(either, tokens, direction, layer=1, coefficient=3, positions=positions)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, either(tokens))


def test_steering_acts_inside_its_context_only(
    lens: Any, tokens: torch.Tensor, direction: torch.Tensor, assert_untouched: Any
) -> None:
    plain = lens(tokens)
    with lenses.steer(lens, direction, layer=1) as model:
        assert model is lens
        first, second = model(tokens), model(tokens)
    assert torch.equal(first, second) and not torch.allclose(first, plain)
    assert torch.equal(lens(tokens), plain)
    assert_untouched(lens.hf_model, lens)


def test_steering_contexts_add_up_and_cancel(lens: Any, tokens: torch.Tensor, direction: torch.Tensor) -> None:
    with lenses.steer(lens, direction, layer=1), lenses.steer(lens, direction, layer=1, coefficient=-1):
        torch.testing.assert_close(lens(tokens), lens.run_with_hooks(tokens), rtol=1e-4, atol=1e-4)
        cancelled = lens(tokens)
    torch.testing.assert_close(cancelled, lens(tokens), rtol=1e-4, atol=1e-4)


def test_steering_at_several_layers(lens: Any, tokens: torch.Tensor, direction: torch.Tensor) -> None:
    with lenses.steer(lens, direction, layer=0), lenses.steer(lens, direction, layer=None):
        expected = lens(tokens)
    torch.testing.assert_close(lenses.steered(lens, tokens, direction, layer=[0, 2]), expected)


def test_activation_addition_has_a_direction_for_each_position(lens: Any, tokens: torch.Tensor) -> None:
    """Turner et al.: the streams of two prompts, subtracted, at the first positions of a third."""
    difference = (stream_of(lens, tokens[:1], 1) - stream_of(lens, tokens[1:], 1))[0, :3]

    def add(resid: torch.Tensor, hook: Any) -> None:
        resid[:, :3] += 2 * difference

    expected = lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", add)])
    found = lenses.steered(lens, tokens, difference, layer=1, coefficient=2, positions=slice(0, 3))
    torch.testing.assert_close(found, expected)


def test_forward_arguments_go_on(lens: Any, tokens: torch.Tensor, direction: torch.Tensor) -> None:
    loss = lenses.steered(lens, tokens, direction, layer=1, return_type="loss")
    logits = lenses.steered(lens, tokens, direction, layer=1)
    torch.testing.assert_close(loss, lens.loss_fn(logits, tokens))


def test_gradients_reach_the_direction(lens: Any, tokens: torch.Tensor, direction: torch.Tensor) -> None:
    direction.requires_grad_()
    lenses.steered(lens, tokens, direction, layer=1, return_type="loss").backward()
    assert direction.grad is not None and direction.grad.abs().sum() > 0


@pytest.mark.parametrize(("cached", "positions"), [(True, None), (False, None), (False, slice(0, 3))])
def test_steering_acts_in_every_step_of_generation(
    lens: Any, tokens: torch.Tensor, direction: torch.Tensor, cached: bool, positions: Any
) -> None:
    options = {"layer": [0, 1], "coefficient": 9.0, "positions": positions}
    expected = tokens
    for _ in range(4):
        best = lenses.steered(lens, expected, direction, **options)[:, -1].argmax(-1)
        expected = torch.cat([expected, best[:, None]], dim=1)
    greedy = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with lenses.steer(lens, direction, **options):
        found = lens.generate(tokens, **greedy, use_past_kv_cache=cached)
    assert torch.equal(found, expected)
    assert not torch.equal(found, lens.generate(tokens, **greedy))


def test_a_direction_of_another_width_is_refused(lens: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="d_model=20, but this is \\(7,\\)"):
        lenses.steered(lens, tokens, torch.ones(7), layer=1)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("position", [-1, 1])
def test_mean_difference_by_hand(either: Any, layer: int, position: int) -> None:
    positive, negative = ["The cat sat", "John saw the dog and"], ["Mary", "a drink", "the mat and"]
    mine = lenses.mean_difference(either, positive, negative, layer=layer, position=position)

    def mean(texts: list[str]) -> torch.Tensor:
        return torch.stack([stream_of(either, text, layer)[0, position] for text in texts]).mean(0)

    torch.testing.assert_close(mine, mean(positive) - mean(negative))
    assert not mine.requires_grad


def test_mean_difference_takes_rows_of_tokens(lens: Any, tokens: torch.Tensor) -> None:
    found = lenses.mean_difference(lens, tokens, tokens[:1], layer=1)
    stream = stream_of(lens, tokens, 1)[:, -1]
    torch.testing.assert_close(found, (stream[1] - stream[0]) / 2, rtol=1e-4, atol=1e-5)


def test_mean_difference_refuses_what_is_no_collection_of_prompts(lens: Any) -> None:
    with pytest.raises(ValueError, match="there are no negative prompts"):
        lenses.mean_difference(lens, ["a"], [], layer=1)
    with pytest.raises(TypeError, match="positive is a collection of prompts"):
        lenses.mean_difference(lens, "a", ["a"], layer=1)
    with pytest.raises(IndexError, match="position 5 is outside"):
        lenses.mean_difference(lens, ["a"], ["a"], layer=1, position=5)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def repeated() -> torch.Tensor:
    """Two rows with tokens that come again, in a row of which one token comes twice in a row."""
    return torch.tensor([[7, 8, 9, 7, 8, 10, 7], [5, 5, 6, 7, 8, 9, 5]])


def summed_by_hand(lens: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every number of the summary, with loops."""
    _, cache = lens.run_with_cache(tokens)
    batch, length = tokens.shape
    values: dict[str, list[list[torch.Tensor]]] = {}
    for layer in range(2):
        for name in AttentionSummary.__dataclass_fields__:
            values.setdefault(name, []).append([])
        pattern = cache["pattern", layer]
        for row in range(batch):
            for q in range(1, length):
                p = pattern[row, :, q]
                before = [k for k in range(q) if tokens[row, k] == tokens[row, q]]
                following = [k + 1 for k in before if k + 1 < q]
                values["entropy"][layer].append(-(p[:, : q + 1] * p[:, : q + 1].log()).sum(-1))
                values["previous_token"][layer].append(p[:, q - 1])
                values["first_token"][layer].append(p[:, 0])
                values["current_token"][layer].append(p[:, q])
                if before:
                    values["duplicate_token"][layer].append(p[:, before].sum(-1))
                if following:
                    values["induction"][layer].append(p[:, following].sum(-1))
    return {name: torch.stack([torch.stack(column).mean(0) for column in columns]) for name, columns in values.items()}


def test_attention_summary_by_hand(lens: Any, repeated: torch.Tensor) -> None:
    found = attention_summary(lens, repeated)
    for name, expected in summed_by_hand(lens, repeated).items():
        assert expected.shape == (2, 4)
        torch.testing.assert_close(getattr(found, name), expected)


def test_a_cache_saves_the_run(lens: Any, repeated: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention_summary(lens, repeated)
    single = attention_summary(lens, repeated[:1])
    _, cache = lens.run_with_cache(repeated)
    _, one = lens.run_with_cache(repeated[:1], remove_batch_dim=True)
    monkeypatch.setattr(lens, "run_with_hooks", None)
    for name in AttentionSummary.__dataclass_fields__:
        torch.testing.assert_close(getattr(attention_summary(lens, repeated, cache), name), getattr(found, name))
        torch.testing.assert_close(getattr(attention_summary(lens, repeated[:1], one), name), getattr(single, name))


def test_attention_that_is_known(lens: Any) -> None:
    """Heads 0 and 1 are made to look at the token before and evenly, for tokens that all differ."""
    length = 5

    def replace(pattern: torch.Tensor, hook: Any) -> None:
        pattern[:, 0] = torch.ones(length - 1).diag(-1)
        pattern[:, 1] = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]

    with lens.hooks(fwd_hooks=[(lambda name: name.endswith("hook_pattern"), replace)]):
        found = attention_summary(lens, torch.arange(3, 3 + length))
    assert found.previous_token[:, 0].tolist() == [1, 1]
    assert found.entropy[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(found.first_token[0, 0], torch.tensor(0.25))
    torch.testing.assert_close(found.entropy[0, 1], torch.tensor(sum(math.log(n) for n in range(2, 6)) / 4))
    assert found.duplicate_token.isnan().all() and found.induction.isnan().all()
    layer, head, score = found.top("previous_token", 1)[0]
    assert (head, score) == (0, 1.0)
    assert layer in (0, 1)


def test_top_is_in_falling_order_and_knows_its_fields(lens: Any, repeated: torch.Tensor) -> None:
    found = attention_summary(lens, repeated)
    best = found.top("induction", 3)
    assert [score for *_, score in best] == sorted(found.induction.flatten().tolist(), reverse=True)[:3]
    assert all(found.induction[layer, head] == score for layer, head, score in best)
    with pytest.raises(ValueError, match="no 'inductive' .* previous_token"):
        found.top("inductive")


def test_a_prompt_of_one_token_is_refused(lens: Any) -> None:
    with pytest.raises(ValueError, match="two or more"):
        attention_summary(lens, torch.tensor([[3]]))


def test_the_induction_heads_of_the_bundled_model_are_found() -> None:
    from lensbridge import HookedTransformer

    toy = HookedTransformer.from_pretrained("toy")
    half = torch.randint(100, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    found = attention_summary(toy, torch.cat([half, half], dim=1))
    assert found.top("induction", 1)[0][2] > 0.8
    assert found.top("previous_token", 1)[0][2] > 0.4
