"""Does every family show 3.9.0's values, weights, edits and gradients on the HuggingFace model's own forward?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from compat_tests.comparison import caches_close, close, weights_close
from compat_tests.edits import halve, noise
from compat_tests.rough_families import FAMILIES, reference, rough_model
from compat_tests.rough_models import (
    DEFAULT_PROCESSING,
    NO_PROCESSING,
    SUBJECT,
    load_tokenizer,
    random_tokens,
    save_tokenizer,
)

PROCESSINGS = {"raw": NO_PROCESSING, "default": DEFAULT_PROCESSING}
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
#: 3.9.0 has the exact GELU in Gemma 1 where HuggingFace has its tanh approximation.
OTHER_ACTIVATION = {"gemma"}
#: HuggingFace's ALiBi adds slope * key, 3.9.0's slope * (key - query): a constant in each row, which softmax ignores.
OTHER_SCORES = {"bloom"}
#: Folding leaves the gate of a gated MLP uncentred in 3.9.0, so that it alone reads the mean that a hook brings in at
#: the LayerNorm before it. Here the norm's readers are treated alike.
UNCENTRED_GATE = {(name, "default"): ("ln2.hook_normalized", "ln2.hook_scale") for name in ("olmo", "olmo clipped")}
#: Options that change what the model computes. A sink takes a part of each row of the pattern, so that a bias of the
#: values adds no constant; 3.9.0 folds it nevertheless.
WITHOUT = {"gpt_oss": {"fold_value_biases": False}}
#: Attention and MLP read the stream itself; the norms called ln1 and ln2 are behind them.
BEHIND = {"olmo2", "olmo3"}
#: Buffers and parameters that nothing reads.
NOT_WEIGHTS = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "pos_embed.W_pos")


class Two(NamedTuple):
    """The same weights in the model under test and in the real TransformerLens."""

    ours: Any
    theirs: Any
    hf: Any


@lru_cache(maxsize=4)
def two_of(family: str, processing: str, tokenizer_dir: Path) -> Two:
    case, flags = FAMILIES[family], PROCESSINGS[processing]
    hf = rough_model(case)
    theirs = reference(hf, case, load_tokenizer(tokenizer_dir), **(flags | WITHOUT.get(family, {})))
    if SUBJECT == "transformer_lens":
        return Two(reference(hf, case, load_tokenizer(tokenizer_dir), **flags), theirs, hf)
    from lensbridge import HookedTransformer

    return Two(
        HookedTransformer.from_pretrained(family, hf_model=hf, tokenizer=load_tokenizer(tokenizer_dir), **flags),
        theirs,
        hf,
    )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(params=PROCESSINGS)
def processing(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def two(family: str, processing: str, tokenizer_dir: Path) -> Iterator[Two]:
    pair = two_of(family, processing, tokenizer_dir)
    yield pair
    for model in (pair.ours, pair.theirs):
        model.reset_hooks(including_permanent=True)
        for flag in FLAGS:
            getattr(model, f"set_{flag}")(False)


def tokens() -> torch.Tensor:
    return random_tokens(2, 9)


def as_theirs(family: str, cache: Any) -> Any:
    """A cache's entries; where the families' scores differ by a constant per row, without it."""
    values = dict(cache.items())
    if family in OTHER_SCORES:
        for name in [name for name in values if name.endswith("attn_scores")]:
            values[name] = values[name] - values[name][..., :1]
    return values


@pytest.fixture
def near_enough(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 3.9.0 has another activation function, the difference of the two bounds what can be asked."""
    if family in OTHER_ACTIVATION:
        monkeypatch.setattr("compat_tests.comparison.TOLERANCE", 5e-3)


@pytest.mark.skipif(SUBJECT == "transformer_lens", reason="3.9.0 does not run the HuggingFace model")
def test_logits_are_huggingfaces(two: Two, processing: str) -> None:
    """Bit by bit without processing; as log probabilities with it."""
    with torch.no_grad():
        expected = two.hf(tokens()).logits
        plain, cached = two.ours(tokens()), two.ours.run_with_cache(tokens())[0]
    assert torch.equal(plain, cached)
    if processing == "raw":
        assert torch.equal(plain, expected)
    else:
        assert torch.allclose(plain.log_softmax(-1), expected.log_softmax(-1), atol=1e-5)


@pytest.mark.usefixtures("near_enough")
def test_every_point(two: Two, family: str) -> None:
    mine, theirs = (model.run_with_cache(tokens()) for model in (two.ours, two.theirs))
    caches_close(as_theirs(family, mine[1]), as_theirs(family, theirs[1]))
    close("logits", mine[0], theirs[0])


@pytest.mark.usefixtures("near_enough")
def test_points_that_a_flag_turns_on(two: Two, family: str) -> None:
    for model in (two.ours, two.theirs):
        for flag in FLAGS:
            getattr(model, f"set_{flag}")(True)
    mine, theirs = (model.run_with_cache(tokens())[1] for model in (two.ours, two.theirs))
    caches_close(as_theirs(family, mine), as_theirs(family, theirs))


def test_weights(two: Two) -> None:
    mine, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.endswith(NOT_WEIGHTS)}
        for model in (two.ours, two.theirs)
    )
    weights_close(mine, theirs)


def exchange(value: torch.Tensor, hook: Any) -> torch.Tensor:
    """Numbers of experts have no half: each token gets the experts of another."""
    return value.flip(0)


@pytest.mark.usefixtures("near_enough")
@pytest.mark.parametrize("edit", [halve, noise])
def test_an_edit_at_every_point(two: Two, family: str, processing: str, edit: Any) -> None:
    """One run per kind of point, edited in the first layer, with everything downstream compared."""
    unless = UNCENTRED_GATE.get((family, processing), ())
    if edit is noise:
        # A scale of nearly zero makes values of thousands, where float32 rounding shows.
        unless = (*unless, "hook_scale")
    names = [name for name in two.theirs.run_with_cache(tokens())[1] if ".1." not in name and not name.endswith(unless)]
    for name in names:
        caches = []
        for model in (two.ours, two.theirs):
            with model.hooks(fwd_hooks=[(name, exchange if name.endswith("indices") else edit)]):
                caches.append(as_theirs(family, model.run_with_cache(tokens())[1]))
        try:
            caches_close(*caches)
        except AssertionError as error:
            raise AssertionError(f"after an edit of {name}: {error}") from None


@pytest.mark.usefixtures("near_enough")
def test_gradients_at_every_point(two: Two, family: str, processing: str) -> None:
    unless = ("hook_scale", *UNCENTRED_GATE.get((family, processing), ()))
    names = [name for name in two.theirs.run_with_cache(tokens())[1] if not name.endswith(unless)]
    found = []
    for model in (two.ours, two.theirs):
        kept: dict[str, torch.Tensor] = {}

        def keep(gradient: torch.Tensor, hook: Any, kept: dict = kept) -> None:
            kept[hook.name] = gradient.clone()

        with ExitStack() as stack:
            stack.enter_context(model.hooks(bwd_hooks=[(name, keep) for name in names]))
            loss = model(tokens(), return_type="loss")
            loss.backward()
        found.append(kept)
    caches_close(*found, order=False)


@pytest.mark.usefixtures("near_enough")
def test_left_padding(two: Two, family: str) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    logits = [model(tokens(), attention_mask=mask) for model in (two.ours, two.theirs)]
    for row, start in enumerate((3, 0)):
        close("logits", logits[0][row, start:], logits[1][row, start:])


@pytest.mark.usefixtures("near_enough")
def test_a_key_value_cache(two: Two) -> None:
    """The entries hold keys as HuggingFace caches them: where they are rotated, after that (3.9.0: before)."""
    results = []
    for model in (two.ours, two.theirs):
        module = __import__(type(model).__module__.split(".")[0])
        cache = module.TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
        model(tokens()[:, :6], past_kv_cache=cache)
        logits = model(tokens()[:, 6:], past_kv_cache=cache)
        results.append((logits, cache[0].past_keys, cache[0].past_values))
    for name, mine, theirs in zip(("logits", "keys", "values"), *results, strict=True):
        if name == "keys" and two.theirs.cfg.positional_embedding_type == "rotary":
            assert mine.shape == theirs.shape
        else:
            close(name, mine, theirs)


@pytest.mark.usefixtures("near_enough")
def test_starting_and_stopping_at_a_layer(two: Two) -> None:
    stopped = [model(tokens(), stop_at_layer=1) for model in (two.ours, two.theirs)]
    close("residual stream", *stopped)
    edited = stopped[1].detach() * 1.1 + 0.2
    close("logits", *(model(edited, start_at_layer=1) for model in (two.ours, two.theirs)))


@pytest.mark.skipif(SUBJECT == "transformer_lens", reason="3.9.0 does not run the HuggingFace model")
def test_greedy_generation_is_huggingfaces(two: Two) -> None:
    with torch.no_grad():
        expected = two.hf.generate(
            tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=5, do_sample=False, eos_token_id=-1
        )
    seen: list[int] = []
    hook = ("blocks.1.attn.hook_pattern", lambda value, hook: seen.append(value.shape[-1]))
    found = two.ours.generate(
        tokens(), max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, fwd_hooks=[hook]
    )
    assert torch.equal(found, expected)
    assert seen == [9, 10, 11, 12, 13]


@pytest.mark.skipif(SUBJECT == "transformer_lens", reason="3.9.0 has one attention implementation")
def test_other_attention_implementations(two: Two) -> None:
    """Logits are HuggingFace's with the same implementation; only scores and pattern take the eager one."""
    if not two.hf._supports_sdpa:
        pytest.skip("HuggingFace has eager attention only for this family")
    names = [f"blocks.0.attn.hook_{short}" for short in ("q", "k", "v", "z", "rot_q", "rot_k", "pattern")]
    names = [name for name in names if name in two.ours.hook_dict]
    expected = two.ours.run_with_cache(tokens(), names_filter=names)[1]
    two.hf.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            logits = two.hf(tokens()).logits
            assert torch.equal(two.ours(tokens()).log_softmax(-1).argmax(-1), logits.argmax(-1))
            for name in names:
                found = two.ours.run_with_cache(tokens(), names_filter=name)[1][name]
                assert torch.allclose(found, expected[name], atol=1e-4), name
        assert two.hf.config._attn_implementation == "sdpa"
    finally:
        two.hf.set_attn_implementation("eager")


@pytest.mark.usefixtures("near_enough")
def test_components_by_themselves(two: Two, family: str) -> None:
    """A layer's attention and MLP, called on what they read."""
    stream = torch.randn(2, 7, two.hf.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(5))
    results = []
    for model in (two.ours, two.theirs):
        block, found = model.blocks[1], {}
        read = block.ln1(stream) if "ln1" in dict(block.named_children()) and family not in BEHIND else stream
        with torch.no_grad():
            found["attention"] = block.attn(query_input=read, key_input=read, value_input=read)
            found["MLP"] = block.mlp(block.ln2(stream) if family not in BEHIND else stream)
            found["block"] = block(stream)
        results.append(found)
    mine, theirs = results
    for name, value in theirs.items():
        close(f"{name} by itself", mine[name], value)
