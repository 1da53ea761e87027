"""Does a model work in company: with other models, in several threads, in other processes, as a copy, in a file?"""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import operator
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lensbridge import ActivationCache, HookedTransformer
from lensbridge.engine.turns import turn

PRE, POST, Z = "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.0.attn.hook_z"
PATIENCE = 30


def scaled(factor: float) -> Callable:
    return lambda x, hook: x * factor


def rows(seed: int) -> Tensor:
    return torch.randint(1, 290, (2, 7), generator=torch.Generator().manual_seed(seed))


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run every job in a thread of its own, all starting at the same moment."""
    start = threading.Barrier(len(jobs))

    def wait_and_run(job: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(wait_and_run, job) for job in jobs]]


def same(mine: Any, theirs: Any) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


# --- models beside each other -----------------------------------------------------------------------------------------


def test_two_models_take_no_notice_of_each_other(new_hf: Callable, new_lens: Callable, tokens: Tensor) -> None:
    one, other = new_lens(new_hf(seed=1)), new_lens(new_hf(seed=2, n_layers=3))
    listening = [(PRE, lambda x, hook: None)]

    def alone(model: Any) -> Any:
        with model.hooks(listening):
            return model.run_with_cache(tokens)[1]

    expected = [alone(one), alone(other)]
    inner: list[ActivationCache] = []
    with one.hooks([(PRE, lambda x, hook: inner.append(other.run_with_cache(tokens)[1]))]), other.hooks(listening):
        _, cache = one.run_with_cache(tokens)
    assert same(cache, expected[0])
    assert same(inner[0], expected[1])
    assert one.list_hooks() == other.list_hooks() == {}


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_take_turns_on_one_model(lens: Any, hf: Any, assert_untouched: Callable) -> None:
    """Each thread has its own inputs, hooks and caches, and every run gives what it gives alone."""

    def cached(seed: int) -> Any:
        return lens.run_with_cache(rows(seed))[1]

    def hooked(seed: int) -> Tensor:
        return lens.run_with_hooks(rows(seed), fwd_hooks=[(Z, scaled(seed)), (POST, scaled(0.5 * seed))])

    seeds = range(1, 5)
    caches, outputs = [cached(seed) for seed in seeds], [hooked(seed) for seed in seeds]
    plain = [lens(rows(seed)) for seed in seeds]

    def job(index: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(5):
                assert same(cached(seeds[index]), caches[index])
                assert torch.equal(hooked(seeds[index]), outputs[index])
                assert torch.equal(lens(rows(seeds[index])), plain[index])

        return run

    at_once([job(index) for index in range(4)])
    assert_untouched(hf, lens)


def test_threads_on_two_lenses_of_one_hf_model(raw: Any, lens: Any, hf: Any, assert_untouched: Callable) -> None:
    expected = [model.run_with_cache(rows(3))[1] for model in (raw, lens)]

    def job(model: Any, want: Any) -> Callable[[], None]:
        return lambda: [operator.truth(same(model.run_with_cache(rows(3))[1], want)) or pytest.fail() for _ in range(5)]

    at_once([job(raw, expected[0]), job(lens, expected[1])])
    assert_untouched(hf, lens)


def test_the_attention_implementation_is_a_runs_own(new_hf: Callable, new_lens: Callable) -> None:
    """One thread needs eager attention while the other counts on the model's."""
    hf = new_hf(attention="sdpa")
    lens = new_lens(hf)
    plain, pattern = lens(rows(0)), lens.run_with_cache(rows(0))[1]["pattern", 1]

    def look() -> None:
        for _ in range(8):
            assert torch.equal(lens.run_with_cache(rows(0))[1]["pattern", 1], pattern)

    def run() -> None:
        for _ in range(8):
            assert torch.equal(lens(rows(0)), plain)

    at_once([look, run])
    assert hf.config._attn_implementation == "sdpa"


def test_arguments_of_a_call_are_for_its_thread(lens: Any) -> None:
    text = "The cat sat"

    def bos() -> None:
        for _ in range(10):
            assert lens(text).shape[1] == len(lens.to_tokens(text)[0])

    def no_bos() -> None:
        for _ in range(10):
            assert lens(text, prepend_bos=False).shape[1] < with_bos

    with_bos = lens(text).shape[1]
    at_once([bos, no_bos])
    assert lens.cfg.default_prepend_bos


def test_parts_of_the_model_wait_for_their_turn_too(lens: Any) -> None:
    x = torch.randn(1, 4, lens.cfg.d_model, generator=torch.Generator().manual_seed(0))
    block, mlp, attn = lens.blocks[0](x), lens.blocks[1].mlp(x), lens.blocks[1].attn(x)
    cache = lens.run_with_cache(rows(0))[1]

    def parts() -> None:
        for _ in range(8):
            assert torch.equal(lens.blocks[0](x), block)
            assert torch.equal(lens.blocks[1].mlp(x), mlp)
            assert torch.equal(lens.blocks[1].attn(x), attn)

    def whole() -> None:
        for _ in range(8):
            assert same(lens.run_with_cache(rows(0))[1], cache)

    at_once([parts, whole])


def test_a_hook_may_run_the_model_in_every_thread(lens: Any) -> None:
    def nested(seed: int) -> Tensor:
        return lens.run_with_hooks(
            rows(seed), fwd_hooks=[(PRE, lambda x, hook: x + lens(rows(seed + 1), stop_at_layer=1))]
        )

    expected = [nested(seed) for seed in range(3)]
    got = at_once([lambda seed=seed: nested(seed) for seed in range(3)])
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_hooks_in_a_context_are_the_models_and_let_other_threads_run(lens: Any, tokens: Tensor) -> None:
    """As in TransformerLens: whoever runs the model meets them. Nobody waits for the context to end."""
    plain = lens(tokens)
    with lens.hooks([(POST, scaled(0.0))]), ThreadPoolExecutor(1) as pool:
        there = pool.submit(lens, tokens).result(PATIENCE)
        here = lens(tokens)
    assert torch.equal(there, here)
    assert not torch.allclose(there, plain)


def test_an_exception_gives_the_turn_back(lens: Any, tokens: Tensor) -> None:
    def fails(x: Tensor, hook: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lens.run_with_hooks(tokens, fwd_hooks=[(Z, fails)])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lens, tokens).result(PATIENCE).shape[0] == 2


def test_threads_with_traces(lens: Any, hf: Any, assert_untouched: Callable) -> None:
    def traced(seed: int) -> Tensor:
        with lens.trace(rows(seed)):
            lens.blocks[0].attn.hook_z.value *= seed
            logits = lens.unembed.hook_out.value.save()
        return logits

    def hooked(seed: int) -> Tensor:
        return lens.run_with_hooks(rows(seed), fwd_hooks=[(Z, scaled(seed))])

    expected = [hooked(seed) for seed in range(1, 5)]

    def job(seed: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(4):
                assert torch.equal((traced if seed % 2 else hooked)(seed), expected[seed - 1])

        return run

    at_once([job(seed) for seed in range(1, 5)] + [job(1), job(3)])
    assert_untouched(hf, lens)


# --- copies and files -------------------------------------------------------------------------------------------------


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def by_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_file}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_model_stands_alone(either: Any, tokens: Tensor, way: str) -> None:
    """After runs and traces, with a flag on and in another dtype: a copy has all of it and shares nothing."""
    either.set_use_attn_result(True)
    _ = either.envoy
    _, cache = either.run_with_cache(tokens)
    twin = COPIES[way](either)
    assert same(twin.run_with_cache(tokens)[1], cache)
    with twin.trace(tokens):
        z = twin.blocks[0].attn.hook_z.value.save()
    assert torch.equal(z, cache[Z])
    assert twin.envoy._module is twin.hf_model
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin.run_with_cache(tokens)[1]["embed"].abs().max() == 0
    assert same(either.run_with_cache(tokens)[1], cache)


class Sub(HookedTransformer):
    """A subclass with a state of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.probe = torch.nn.Linear(self.cfg.d_model, 1)


def test_a_subclass_is_copied_with_what_it_added(new_lens: Callable, tokens: Tensor) -> None:
    model = new_lens(cls=Sub)
    twin = copy.deepcopy(model)
    assert type(twin) is Sub
    assert torch.equal(twin.probe.weight, model.probe.weight) and twin.probe is not model.probe
    assert torch.equal(twin(tokens), model(tokens))


@pytest.mark.parametrize("way", COPIES)
def test_a_cache_is_copied_with_its_model(lens: Any, tokens: Tensor, way: str) -> None:
    _, cache = lens.run_with_cache(tokens)
    with torch.no_grad():
        expected = cache.stack_head_results(-1)
        twin = COPIES[way](cache)
        assert type(twin) is ActivationCache and same(twin, cache)
        assert twin.model is not lens and twin.has_batch_dim
        assert torch.equal(twin.stack_head_results(-1), expected)


def test_the_activations_of_a_cache_are_plain_tensors_in_a_file(either: Any, tokens: Tensor) -> None:
    """``weights_only`` loading, which runs no code from the file, suffices for them."""
    _, cache = either.run_with_cache(tokens)
    file = io.BytesIO()
    torch.save(cache.cache_dict, file)
    file.seek(0)
    again = ActivationCache(torch.load(file, weights_only=True), either)
    assert list(again) == list(cache) and same(again, cache)
    assert {type(value) for value in again.values()} == {Tensor}
    assert torch.equal(again.logit_attrs(again[POST][None], 3), cache.logit_attrs(cache[POST][None], 3))


def test_the_weights_of_a_model_are_plain_tensors_in_a_file(either: Any) -> None:
    file = io.BytesIO()
    torch.save(either.state_dict(), file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert same(again, either.state_dict())


def test_a_model_that_was_traced_can_be_forgotten(new_hf: Callable, new_lens: Callable, tokens: Tensor) -> None:
    def trace_one() -> tuple[Any, Any]:
        hf = new_hf()
        lens = new_lens(hf)
        with lens.trace(tokens):
            kept = lens.blocks[0].hook_resid_post.value.save()
        assert kept.shape == (2, 7, 20) and lens.envoy.transformer.path == "model.transformer"
        return weakref.ref(hf), weakref.ref(lens)

    gone = trace_one()
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_model_works_in_a_process_started_anew(lens: Any, tokens: Tensor) -> None:
    """It travels there as a pickle, and what it computes comes back."""
    lens.requires_grad_(False)
    logits, cache = lens.run_with_cache(tokens, return_cache_object=False)
    job = operator.methodcaller("run_with_cache", tokens, return_cache_object=False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply_async(job, (lens,)).get(PATIENCE)
    assert torch.equal(there[0], logits)
    assert same(there[1], cache)


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")


@needs_fork
def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have(lens: Any, tokens: Tensor) -> None:
    """Another thread of the parent has its turn when the process is forked."""
    expected = lens(tokens[:1]).detach()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with turn(lens.hf_model):
            inside.set()
            assert leave.wait(PATIENCE)

    def child(queue: Any) -> None:
        queue.put(lens(tokens[:1]).detach().numpy())

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        assert inside.wait(PATIENCE)
        process = context.Process(target=child, args=(queue,))
        process.start()
        try:
            got = queue.get(timeout=PATIENCE)
        finally:
            leave.set()
            process.join(PATIENCE)
        staying.result(PATIENCE)
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(got), expected)


@needs_fork
def test_a_data_loaders_workers_may_use_the_tokenizer(lens: Any) -> None:
    texts = ["The cat sat", "on the mat", "and then", "the dog saw"]
    loader = DataLoader(
        texts, batch_size=2, num_workers=1, collate_fn=lens.to_tokens, multiprocessing_context="fork", timeout=PATIENCE
    )
    batches = list(loader)
    assert [batch.tolist() for batch in batches] == [lens.to_tokens(texts[i : i + 2]).tolist() for i in (0, 2)]
    assert [lens(batch).shape[0] for batch in batches] == [2, 2]
