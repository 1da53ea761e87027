"""Does generation draw the same tokens as TransformerLens 3.9.0, and do its hooks see the same at every step?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from compat_tests.comparison import close, outcome, same_outcome, same_value
from compat_tests.conftest import Pair, Pairs
from compat_tests.rough_models import PROCESSINGS
from compat_tests.test_forward import kv_cache

QUIET = {"verbose": False}
PROMPT = "The cat sat on"
TEXTS = ["The dog saw Mary", "Hello", "John gave a"]

#: Ways to choose the next token.
CHOICES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "greedy": {"do_sample": False},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.1},
    "temperature 0": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_k before top_p": {"top_k": 40, "top_p": 0.5},
    "frequencies": {"freq_penalty": 1.5, "temperature": 0.7},
    "frequencies and top_p": {"freq_penalty": 3.0, "top_p": 0.9},
    "frequencies are nothing to greedy": {"freq_penalty": 3.0, "do_sample": False},
}


def seeded(call: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return call()


def both(pair: Pair, name: str, *args: Any, method: str = "generate", seed: int = 0, **kwargs: Any) -> None:
    """The same call on both models, with the same seed, comes out the same."""
    mine, theirs = (
        outcome(lambda m=model: seeded(lambda: getattr(m, method)(*args, **(QUIET | kwargs)), seed))
        for model in pair.both
    )
    same_outcome(name, mine, theirs)


# --- the next token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_tokens(pairs: Pairs, processing: str, choice: str, use_past_kv_cache: bool) -> None:
    pair = pairs.get("two", processing)
    for seed, (batch, length) in enumerate([(1, 4), (3, 6)]):
        arguments = CHOICES[choice] | {"max_new_tokens": 12, "use_past_kv_cache": use_past_kv_cache}
        both(pair, choice, pair.tokens(batch, length, seed), seed=seed, stop_at_eos=False, **arguments)


@pytest.mark.parametrize("choice", ["defaults", "greedy", "top_k", "frequencies"])
@pytest.mark.parametrize("seed", range(3))
def test_text(pairs: Pairs, choice: str, seed: int) -> None:
    both(pairs.get(), choice, PROMPT, seed=seed, **CHOICES[choice])


def test_the_defaults(pairs: Pairs) -> None:
    pair = pairs.get()
    mine, theirs = (seeded(lambda m=model: m.generate(PROMPT)) for model in pair.both)
    assert mine == theirs


@pytest.mark.parametrize("tokenizer", ["gpt2", "own pad", "no bos"])
@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("prepend_bos", [None, False])
def test_several_texts(pairs: Pairs, tokenizer: str, use_past_kv_cache: bool, prepend_bos: bool | None) -> None:
    pair = pairs.get("two", tokenizer=tokenizer)
    for choice in ("greedy", "frequencies"):
        arguments = CHOICES[choice] | {"use_past_kv_cache": use_past_kv_cache, "prepend_bos": prepend_bos}
        both(pair, "texts", TEXTS, **arguments)
        both(pair, "tokens", TEXTS, return_type="tokens", **arguments)


def test_padded_tokens(pairs: Pairs) -> None:
    pair = pairs.get("two", tokenizer="own pad")
    left = torch.tensor([[1, 1, 20, 21, 22, 23], [24, 25, 26, 27, 28, 29]])
    both(pair, "left", left, do_sample=False, padding_side="left")
    # The side matters only to what is padding: here pads on the left are text.
    both(pair, "left as text", left, do_sample=False, padding_side="right")


@pytest.mark.parametrize("toy_prompt", ["When Mary and John went to the store, John gave a drink to", "Once"])
def test_the_bundled_model(pairs: Pairs, toy_prompt: str) -> None:
    pair = pairs.get("toy")
    both(pair, "toy", toy_prompt, do_sample=False, max_new_tokens=12)
    both(pair, "toy", [toy_prompt, "The"], top_k=10, max_new_tokens=12)


# --- the end ----------------------------------------------------------------------------------------------------------


#: Ways to say where to stop, and whether that comes soon.
STOPS: dict[str, tuple[dict[str, Any], bool]] = {
    "the tokenizer's": ({}, False),
    "a rare token": ({"eos_token_id": 7}, False),
    "two rare tokens": ({"eos_token_id": (5, 6)}, False),
    "every third token": ({"eos_token_id": list(range(0, 320, 3))}, True),
}


@pytest.mark.parametrize("method", ["generate", "generate_stream"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stop", STOPS)
def test_eos(pairs: Pairs, method: str, seed: int, stop: str) -> None:
    pair = pairs.get()
    arguments, soon = STOPS[stop]
    results = []
    for model in pair.both:
        torch.manual_seed(seed)
        found = getattr(model, method)(pair.tokens(3, 3), max_new_tokens=15, top_k=20, **QUIET, **arguments)
        results.append(found if method == "generate" else torch.cat(list(found), dim=1))
    assert torch.equal(*results)
    assert (results[0].shape[1] < 18) == soon


def test_stopping_needs_a_token_to_stop_at(pairs: Pairs) -> None:
    pair = pairs.get("three")
    tokens = pair.tokens(2, 3)
    for model in pair.both:
        kept, model.tokenizer = model.tokenizer, None
        try:
            with pytest.raises(AssertionError, match="eos_token_id"):
                model.generate(tokens, **QUIET)
            assert model.generate(tokens, stop_at_eos=False, **QUIET).shape == (2, 13)
            stopped = model.generate(tokens, eos_token_id=list(range(10, 320)), **QUIET)
            assert stopped.shape[1] < 13
        finally:
            model.tokenizer = kept


@pytest.mark.parametrize("max_tokens_per_yield", [1, 3, 5, 25])
@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("eos_token_id", [None, list(range(0, 320, 4))], ids=["to the end", "stopped"])
def test_chunks(pairs: Pairs, max_tokens_per_yield: int, use_past_kv_cache: bool, eos_token_id: Any) -> None:
    pair = pairs.get()
    arguments = {"use_past_kv_cache": use_past_kv_cache, "eos_token_id": eos_token_id, "max_new_tokens": 11}
    for prompt in (PROMPT, pair.tokens(2, 4)):
        mine, theirs = (
            seeded(
                lambda m=model, p=prompt: list(
                    m.generate_stream(p, max_tokens_per_yield=max_tokens_per_yield, **arguments, **QUIET)
                )
            )
            for model in pair.both
        )
        assert [chunk.tolist() for chunk in mine] == [chunk.tolist() for chunk in theirs]


@pytest.mark.parametrize("return_type", ["input", "str", "tokens"])
def test_streams_are_of_tokens(pairs: Pairs, return_type: str) -> None:
    pair = pairs.get()
    chunks = [
        seeded(lambda m=model: list(m.generate_stream(PROMPT, return_type=return_type, **QUIET))) for model in pair.both
    ]
    assert [chunk.tolist() for chunk in chunks[0]] == [chunk.tolist() for chunk in chunks[1]]


def test_a_stream_of_nothing(pairs: Pairs) -> None:
    for model in pairs.get().both:
        assert list(model.generate_stream(PROMPT, max_new_tokens=0, **QUIET)) == []


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_type", ["input", "str", "tokens", "embeds"])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_return_types(pairs: Pairs, processing: str, return_type: str) -> None:
    pair = pairs.get("two", processing)
    arguments = {"do_sample": False, "max_new_tokens": 4, "return_type": return_type}
    for kind, prompt in {
        "text": PROMPT,
        "one text": [PROMPT],
        "texts": TEXTS,
        "tokens": pair.tokens(2, 5),
        "a row of tokens": pair.tokens(1, 5),
    }.items():
        both(pair, f"{kind} -> {return_type}", prompt, **arguments)


@pytest.mark.parametrize("return_type", ["input", "str", "tokens", "embeds"])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_embeddings(pairs: Pairs, processing: str, return_type: str) -> None:
    pair = pairs.get("two", processing)
    embeds = pair.theirs.embed(pair.tokens(2, 5)).detach() + 0.3
    arguments = {"max_new_tokens": 6, "return_type": return_type, "stop_at_eos": False, "top_k": 30}
    both(pair, "embeds", embeds, use_past_kv_cache=False, **arguments)


def test_logits(pairs: Pairs) -> None:
    for processing in PROCESSINGS:
        pair = pairs.get("two", processing)
        results = [
            seeded(
                lambda m=model, p=pair: m.generate(
                    p.tokens(2, 4), output_logits=True, return_dict_in_generate=True, **QUIET
                )
            )
            for model in pair.both
        ]
        assert all(isinstance(result, transformers.generation.GenerateDecoderOnlyOutput) for result in results)
        assert results[0].keys() == results[1].keys()
        assert torch.equal(results[0].sequences, results[1].sequences)
        for mine, theirs in zip(results[0].logits, results[1].logits, strict=True):
            close("logits of generate", mine, theirs)


def test_what_is_not_known_is_warned_of(pairs: Pairs) -> None:
    for model in pairs.get().both:
        with pytest.warns(UserWarning, match="num_beams"):
            model.generate(PROMPT, num_beams=3, **QUIET)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(PROMPT, return_dict_in_generate=True, **QUIET)


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        (PROMPT, {"max_new_tokens": 0}),
        (PROMPT, {"return_type": "logits"}),
        (PROMPT, {"return_type": None}),
        (PROMPT, {"top_k": 0}),
        (PROMPT, {"top_p": 1.5}),
        (PROMPT, {"padding_side": "top"}),
        (3, {}),
        ([3, 4], {}),
        (None, {}),
        (torch.tensor([5, 6, 7]), {}),
        (torch.full((1, 20), 5), {"stop_at_eos": False}),
        ("", {"prepend_bos": False}),
        (torch.zeros(1, 0, dtype=torch.long), {}),
    ],
    ids=repr,
)
def test_errors(pairs: Pairs, prompt: Any, arguments: dict[str, Any]) -> None:
    pair = pairs.get()
    theirs = outcome(lambda: pair.theirs.generate(prompt, **QUIET, **arguments))
    assert theirs.error is not None
    both(pair, "errors", prompt, **arguments)


@pytest.mark.parametrize("prompt", [["a", "b"], 3, torch.zeros(1, 2, 20), torch.tensor([1, 2])], ids=repr)
def test_errors_of_streams(pairs: Pairs, prompt: Any) -> None:
    pair = pairs.get()
    mine, theirs = (outcome(lambda m=model: list(m.generate_stream(prompt, **QUIET))) for model in pair.both)
    assert theirs.error is not None
    same_outcome("errors", mine, theirs)


# --- hooks ------------------------------------------------------------------------------------------------------------


def watched(model: Any, names: list[str], run: Callable[[], Any]) -> list[tuple[str, torch.Tensor]]:
    """What hooks at these points see while ``run`` goes on, in order."""
    seen: list[tuple[str, torch.Tensor]] = []

    def look(value: torch.Tensor, hook: Any) -> None:
        seen.append((hook.name, value.clone()))

    with model.hooks([(name, look) for name in names]):
        run()
    return seen


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_hooks_see_every_step(pairs: Pairs, processing: str, use_past_kv_cache: bool) -> None:
    pair = pairs.get("two", processing)
    # Embedding is no hooked step of 3.9.0's generate.
    names = [name for name in pair.theirs.run_with_cache(pair.tokens(1, 2))[1] if name != "hook_embed"]
    seen = [
        watched(
            model,
            names,
            lambda m=model: seeded(
                lambda: m.generate(pair.tokens(2, 5), 5, use_past_kv_cache=use_past_kv_cache, **QUIET)
            ),
        )
        for model in pair.both
    ]
    for point in names:
        mine, theirs = ([value for name, value in one if name == point] for one in seen)
        assert len(mine) == len(theirs) >= 5
        for left, right in zip(mine, theirs, strict=True):
            close(f"{point} in generate", left, right)


def test_hooks_see_every_step_of_a_stream(pairs: Pairs) -> None:
    pair = pairs.get()
    names = ["hook_embed", "hook_pos_embed", "blocks.1.attn.hook_pattern", "ln_final.hook_normalized"]
    seen = [
        watched(model, names, lambda m=model: seeded(lambda: list(m.generate_stream(pair.tokens(2, 5), 5, **QUIET))))
        for model in pair.both
    ]
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    assert len(seen[0]) == 20
    for (name, mine), (_, theirs) in zip(*seen, strict=True):
        close(name, mine, theirs)


def test_hooks_see_real_positions_of_padded_texts(pairs: Pairs) -> None:
    pair = pairs.get()
    tokens = pair.theirs.to_tokens(TEXTS, padding_side="left")
    real = torch.cat([(tokens != 0), torch.ones(3, 4, dtype=torch.bool)], dim=1)
    real[:, :-5] |= real.roll(-1, 1)[:, :-5]  # the BOS before each text
    seen = [
        watched(
            model,
            ["hook_pos_embed", "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"],
            lambda m=model: m.generate(TEXTS, 5, do_sample=False, stop_at_eos=False, **QUIET),
        )
        for model in pair.both
    ]
    done = dict.fromkeys(["hook_pos_embed", "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"], 0)
    for (name, mine), (other, theirs) in zip(*seen, strict=True):
        assert name == other
        where = real[:, done[name] : done[name] + theirs.shape[1]]
        done[name] += theirs.shape[1]
        close(name, mine[where], theirs[where])
    assert set(done.values()) == {real.shape[1]}


def ablate(value: torch.Tensor, hook: Any) -> None:
    value[:, :, 1] = 0


EDITS: dict[str, tuple[str, Callable]] = {
    "z in place": ("blocks.0.attn.hook_z", ablate),
    "k": ("blocks.1.attn.hook_k", lambda value, hook: value * 0.5),
    "v": ("blocks.0.attn.hook_v", lambda value, hook: value.flip(2)),
    "pattern": ("blocks.1.attn.hook_pattern", lambda value, hook: value * 0.7),
    "scores": ("blocks.0.attn.hook_attn_scores", lambda value, hook: value * 2),
    "stream": ("blocks.1.hook_resid_pre", lambda value, hook: value + 0.5),
    "neurons": ("blocks.0.mlp.hook_post", lambda value, hook: value.clamp(max=0.3)),
    "norm": ("ln_final.hook_normalized", lambda value, hook: value * 1.3),
    "positions": ("hook_pos_embed", lambda value, hook: -value),
    "last position": ("blocks.0.hook_mlp_out", lambda value, hook: value[:, -1:].expand_as(value)),
    "logits": ("unembed.hook_out", lambda value, hook: value.roll(1, -1)),
}


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("processing", ["raw", "default"])
def test_edits_act_at_every_step(pairs: Pairs, processing: str, edit: str, use_past_kv_cache: bool) -> None:
    pair = pairs.get("two", processing)
    results = []
    for model in pair.both:
        with model.hooks([EDITS[edit]]):
            results.append(
                seeded(
                    lambda m=model: m.generate(
                        pair.tokens(2, 5), 8, use_past_kv_cache=use_past_kv_cache, output_logits=True, **QUIET
                    )
                )
            )
    assert torch.equal(results[0].sequences, results[1].sequences)
    for mine, theirs in zip(results[0].logits, results[1].logits, strict=True):
        close("logits of edited generate", mine, theirs)


def test_edits_of_texts_with_padding(pairs: Pairs) -> None:
    pair = pairs.get()
    for edit in ("z in place", "k", "stream"):
        results = []
        for model in pair.both:
            with model.hooks([EDITS[edit]]):
                results.append(model.generate(TEXTS, 8, do_sample=False, return_type="tokens", **QUIET))
        assert torch.equal(*results)


# --- loops of one's own, with the key-value cache ---------------------------------------------------------------------


def continued(model: Any, tokens: torch.Tensor, cache: Any, steps: int, **arguments: Any) -> list[torch.Tensor]:
    """Greedy steps from ``tokens`` on: all logits of each."""
    found, new = [], tokens
    for _ in range(steps):
        logits = model(new, past_kv_cache=cache, **arguments)
        found.append(logits)
        new = logits[:, -1:].argmax(-1)
    return found


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_a_loop_of_ones_own(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    tokens = pair.tokens(2, 5)
    mine, theirs = (continued(model, tokens, kv_cache(model, 2), 8) for model in pair.both)
    for left, right in zip(mine, theirs, strict=True):
        close("logits of a loop", left, right)
    generated = pair.ours.generate(tokens, 8, do_sample=False, stop_at_eos=False, **QUIET)
    assert torch.equal(generated[:, 5:], torch.cat([logits[:, -1:].argmax(-1) for logits in mine], dim=1))


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_several_endings_of_one_frozen_beginning(pairs: Pairs, processing: str) -> None:
    pair = pairs.get("two", processing)
    results: list[list[torch.Tensor]] = []
    for model in pair.both:
        cache = kv_cache(model, 2)
        found = continued(model, pair.tokens(2, 5), cache, 2)
        cache.freeze()
        found += [model(pair.tokens(2, 3, seed), past_kv_cache=cache) for seed in (1, 2)]
        assert cache[0].past_keys.shape[1] == cache.previous_attention_mask.shape[1] == 6
        cache.unfreeze()
        found += continued(model, pair.tokens(2, 2, 3), cache, 3)
        assert cache[1].past_values.shape[1] == cache.previous_attention_mask.shape[1] == 10
        results.append(found)
    for left, right in zip(*results, strict=True):
        close("logits of endings", left, right)


@pytest.mark.parametrize("frozen_after", [None, 3])
def test_a_loop_of_ones_own_with_padding(pairs: Pairs, frozen_after: int | None) -> None:
    pair = pairs.get("two", tokenizer="own pad")
    results = []
    for model in pair.both:
        tokens = model.to_tokens(TEXTS, padding_side="left")
        cache = kv_cache(model, 3)
        found = continued(model, tokens, cache, 3, padding_side="left")
        if frozen_after is not None:
            cache.freeze()
        found += continued(model, found[-1][:, -1:].argmax(-1), cache, 3, padding_side="left")
        results.append([found[0][tokens != 1], *found[1:]])
        if frozen_after is None:
            expected = torch.cat([logits[:, -1:].argmax(-1) for logits in found], dim=1)
            generated = model.generate(TEXTS, 6, do_sample=False, stop_at_eos=False, return_type="tokens", **QUIET)
            assert torch.equal(generated[:, -6:], expected)
    for left, right in zip(*results, strict=True):
        same_value("logits of padded loops", left, right)


# --- documented differences -------------------------------------------------------------------------------------------


@pytest.mark.ours_only
def test_a_text_that_is_only_a_bos_is_no_padding(pairs: Pairs) -> None:
    """With a tokenizer that pads on the right with its BOS, 3.9.0 hides the only token of an empty prompt."""
    pair = pairs.get("two", "raw")
    arguments = {"do_sample": False, "max_new_tokens": 8, "stop_at_eos": False, "return_type": "tokens"} | QUIET
    expected = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(8):
        new = pair.hf(expected).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, new], dim=1)
    assert torch.equal(pair.ours.generate("", **arguments), expected)
    assert torch.equal(pair.ours.generate(expected[:, :1].repeat(3, 1), **arguments), expected.repeat(3, 1))
    assert not torch.equal(pair.theirs.generate("", **arguments), expected)


@pytest.mark.ours_only
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_without_an_attention_mask_positions_are_right(pairs: Pairs, processing: str) -> None:
    """3.9.0 counts the whole text twice for new tokens, wherever it has a key-value cache and no attention mask."""
    pair = pairs.get("two", processing)
    tokens = pair.tokens(2, 5)
    arguments = {"do_sample": False, "max_new_tokens": 6, "return_type": "tokens", "stop_at_eos": False} | QUIET
    kept = pair.ours.tokenizer, pair.theirs.tokenizer
    pair.ours.tokenizer = pair.theirs.tokenizer = None
    try:
        for prompt in (tokens, pair.theirs.embed(tokens).detach() + 0.3):
            uncached = pair.theirs.generate(prompt, use_past_kv_cache=False, **arguments)
            assert torch.equal(pair.ours.generate(prompt, **arguments), uncached)
            assert not torch.equal(pair.theirs.generate(prompt, **arguments), uncached)
    finally:
        pair.ours.tokenizer, pair.theirs.tokenizer = kept


@pytest.mark.ours_only
def test_hook_embed_fires_in_generate(pairs: Pairs) -> None:
    pair = pairs.get()
    counts = [
        len(
            watched(model, ["hook_embed"], lambda m=model: m.generate(pair.tokens(2, 5), 3, stop_at_eos=False, **QUIET))
        )
        for model in pair.both
    ]
    assert counts == [3, 0]


@pytest.mark.ours_only
def test_streams_treat_padding_as_generate_does(pairs: Pairs) -> None:
    """3.9.0's stream masks a generated token that looks like padding."""
    pair = pairs.get()
    tokens = pair.tokens(2, 5)
    arguments = {"do_sample": False, "max_new_tokens": 6, "stop_at_eos": False} | QUIET

    def eos_first(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, -1, 0] += 1e4 * (value.shape[1] > 1)
        return value

    results = []
    for model in pair.both:
        with model.hooks([("unembed.hook_out", eos_first)]):
            streamed = torch.cat(list(model.generate_stream(tokens, **arguments)), dim=1)
            results.append((streamed, model.generate(tokens, **arguments)))
    assert torch.equal(results[0][0], results[0][1])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[1][0], results[1][1])
