"""Does equality with 3.9.0 hold for shapes, prompts and hook sets that nobody chose by hand?"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compat_tests.comparison import caches_close, close, weights_close
from compat_tests.edits import EDITS, noise
from compat_tests.rough_models import (
    PROCESSING_FLAGS,
    SUBJECT,
    Shape,
    load_tokenizer,
    ours,
    rough_gpt2,
    save_tokenizer,
    tl_reference,
)
from compat_tests.test_points import FLAGS, active_points
from compat_tests.test_weights import named_weights

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

heads_and_width = st.tuples(st.integers(1, 4), st.integers(2, 9)).map(lambda pair: (pair[0], pair[0] * pair[1]))
shapes = st.builds(
    lambda layers, heads, seed, tie, activation, scaled: Shape(
        n_layers=layers,
        n_heads=heads[0],
        d_model=heads[1],
        n_ctx=16,
        seed=seed,
        tie=tie,
        activation=activation,
        options=(("scale_attn_by_inverse_layer_idx", scaled),),
    ),
    layers=st.integers(1, 3),
    heads=heads_and_width,
    seed=st.integers(10, 14),
    tie=st.booleans(),
    activation=st.sampled_from(["gelu_new", "relu", "gelu"]),
    scaled=st.booleans(),
)
processings = st.fixed_dictionaries({name: st.booleans() for name in PROCESSING_FLAGS})
prompts = (
    st.tuples(st.integers(1, 3), st.integers(1, 16))
    .flatmap(
        lambda size: st.lists(
            st.lists(st.integers(0, 319), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
        )
    )
    .map(torch.tensor)
)
flag_sets = st.lists(st.sampled_from(FLAGS), unique=True, max_size=4).map(tuple)
FIXED = Shape(n_ctx=16, seed=9)


@lru_cache(maxsize=1)
def tokenizer_directory() -> Path:
    return save_tokenizer(Path(mkdtemp()))


def build(shape: Shape, processing: dict[str, bool]) -> tuple[Any, Any]:
    hf = rough_gpt2(shape)
    directory = tokenizer_directory()
    return ours(hf, load_tokenizer(directory), **processing), tl_reference(hf, load_tokenizer(directory), **processing)


@lru_cache(maxsize=4)
def fixed(kind: str) -> tuple[Any, Any]:
    from compat_tests.rough_models import PROCESSINGS

    return build(FIXED, PROCESSINGS[kind])


@few
@given(shape=shapes, processing=processings, tokens=prompts, flags=flag_sets)
def test_any_shape_processing_and_prompt(
    shape: Shape, processing: dict[str, bool], tokens: torch.Tensor, flags: tuple[str, ...]
) -> None:
    pair = build(shape, processing)
    for model in pair:
        for flag in flags:
            getattr(model, f"set_{flag}")(True)
    mine, theirs = (model.run_with_cache(tokens) for model in pair)
    close("logits", mine[0], theirs[0])
    caches_close(mine[1], theirs[1])


@few
@given(shape=shapes, processing=processings)
def test_any_weights(shape: Shape, processing: dict[str, bool]) -> None:
    weights_close(*(named_weights(model) for model in build(shape, processing)))


hook_sets = st.lists(
    st.tuples(st.sampled_from(active_points((), 2)), st.sampled_from(["halve", "noise", "add in place"])),
    min_size=1,
    max_size=6,
)


@few
@given(kind=st.sampled_from(["raw", "default", "refactored"]), tokens=prompts, hooks=hook_sets)
def test_any_set_of_edits(kind: str, tokens: torch.Tensor, hooks: list[tuple[str, str]]) -> None:
    """In-place edits may show in what 3.9.0 cached before from the same tensor, so the caches are compared without."""
    pair = fixed(kind)
    fwd_hooks = [(point, EDITS[edit]) for point, edit in hooks]
    mine, theirs = (model.run_with_hooks(tokens, fwd_hooks=fwd_hooks) for model in pair)
    close("logits", mine, theirs)
    if all(edit != "add in place" for _, edit in hooks):
        caches = []
        for model in pair:
            with model.hooks(fwd_hooks=fwd_hooks):
                caches.append(model.run_with_cache(tokens)[1])
        caches_close(*caches)


@few
@given(
    kind=st.sampled_from(["raw", "default", "refactored"]),
    tokens=prompts.filter(lambda tokens: tokens.shape[1] > 2),
    points=st.lists(st.sampled_from(active_points((), 2)), max_size=3),
    edited=st.lists(st.sampled_from(active_points((), 2)), max_size=2),
)
def test_any_gradients(kind: str, tokens: torch.Tensor, points: list[str], edited: list[str]) -> None:
    pair = fixed(kind)
    caches = []
    for model in pair:
        with model.hooks(
            fwd_hooks=[(name, noise) for name in edited],
            bwd_hooks=[(name, lambda grad, hook: grad * 1.5) for name in points],
        ):
            _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        caches.append(cache)
        model.zero_grad()
    caches_close(*caches, order=False)


@few
@given(
    kind=st.sampled_from(["raw", "default"]),
    tokens=prompts,
    names=st.lists(st.sampled_from(active_points((), 2)), unique=True),
    stop=st.one_of(st.none(), st.integers(-3, 3)),
)
def test_any_selection_of_points(kind: str, tokens: torch.Tensor, names: list[str], stop: int | None) -> None:
    """Whatever else is listened to, a point has the value it has in a full cache."""
    results = [model.run_with_cache(tokens, names_filter=names, stop_at_layer=stop) for model in fixed(kind)]
    close("output", results[0][0], results[1][0])
    caches_close(results[0][1], results[1][1])


@few
@given(
    tokens=prompts.filter(lambda tokens: tokens.shape[1] > 1),
    kind=st.sampled_from(["raw", "default"]),
    data=st.data(),
)
def test_any_attention_mask(kind: str, tokens: torch.Tensor, data: st.DataObject) -> None:
    """Each row keeps at least one real position; only real positions are compared."""
    rows = st.lists(st.booleans(), min_size=tokens.shape[1], max_size=tokens.shape[1]).filter(any)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=len(tokens), max_size=len(tokens))))
    mine, theirs = (model(tokens, attention_mask=mask) for model in fixed(kind))
    close("logits", mine[mask], theirs[mask])


def test_the_subject_is_what_it_says() -> None:
    assert type(fixed("raw")[0]).__module__.startswith(SUBJECT)
