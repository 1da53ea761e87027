"""Is `HookedTransformer` on a config alone the model that TransformerLens 3.9.0 makes of it, in all that it offers?"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer as ReferenceTransformer
from transformer_lens import patching as reference_patching
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as ReferenceKeyValueCache
from transformer_lens.config import HookedTransformerConfig as ReferenceConfig
from transformers import PreTrainedTokenizerFast

from compat_tests.comparison import caches_close, close, weights_close
from compat_tests.native_models import BASE, forget_alibi, roughen
from compat_tests.rough_models import save_tokenizer
from lensbridge import HookedTransformer, HookedTransformerConfig, TransformerLensKeyValueCache, patching
from lensbridge.errors import ModelNotFoundError, UnsupportedModelError
from lensbridge.native import NativeForCausalLM

CONFIGS: dict[str, dict[str, Any]] = {
    "attention only": {"attn_only": True, "act_fn": None},
    "relu without norm": {"act_fn": "relu", "normalization_type": None},
    "solu_ln": {"act_fn": "solu_ln"},
    "rotary, gated, RMS, groups": {
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "n_key_value_heads": 1,
    },
    "d_vocab_out": {"d_vocab_out": 5},
    "bidirectional classifier": {"attention_dir": "bidirectional", "d_vocab_out": 2, "act_fn": "relu"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "alibi": {"positional_embedding_type": "alibi"},
    "parallel": {"parallel_attn_mlp": True, "positional_embedding_type": "rotary"},
    "final RMS, tokens hooked": {"final_rms": True, "use_hook_tokens": True},
}
#: Those whose logits are about tokens, so that there is a next-token loss.
LANGUAGE = [name for name, fields in CONFIGS.items() if "d_vocab_out" not in fields]


class Pair:
    """Our model and TransformerLens' on the same config fields, with the same rough weights."""

    def __init__(self, mine: Any, theirs: Any) -> None:
        self.mine = mine
        self.theirs = theirs

    def __iter__(self) -> Iterator[Any]:
        return iter((self.mine, self.theirs))

    def agree(self, call: Callable[[Any], Any]) -> Any:
        """Both give the same for this call; returns ours."""
        with torch.no_grad():
            mine, theirs = call(self.mine), call(self.theirs)
        equal(mine, theirs)
        return mine


def equal(mine: Any, theirs: Any, name: str = "result") -> None:
    """The same tensors, in whatever they are packed."""
    if isinstance(theirs, torch.Tensor):
        close(name, mine.detach(), theirs.detach())
    elif isinstance(theirs, (tuple, list)):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            equal(one, other, name)
    else:
        assert mine == theirs


def fields_of(name: str) -> dict[str, Any]:
    return BASE | CONFIGS[name]


def reference(fields: dict[str, Any], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceTransformer(ReferenceConfig(**fields), **options)


def pair_of(name: str, **fields: Any) -> Pair:
    fields = fields_of(name) | fields
    theirs = reference(fields)
    roughen(theirs)
    mine = HookedTransformer(HookedTransformerConfig(**fields))
    mine.load_state_dict(theirs.state_dict())
    forget_alibi(theirs)
    return Pair(mine, theirs)


@pytest.fixture(params=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture(params=LANGUAGE)
def speakers(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture
def plain() -> Pair:
    return pair_of("final RMS, tokens hooked", final_rms=False, use_hook_tokens=False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 17, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def mask() -> torch.Tensor:
    """Padding on the left of one row."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    return mask


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("as_dict", [False, True])
def test_a_seed_gives_the_same_model(name: str, as_dict: bool, tokens: torch.Tensor) -> None:
    fields = fields_of(name)
    theirs = reference(fields)
    mine = HookedTransformer(dict(fields) if as_dict else HookedTransformerConfig(**fields))
    assert isinstance(mine.hf_model, NativeForCausalLM)
    assert mine.training
    ours, expected = dict(mine.named_parameters()), dict(theirs.named_parameters())
    assert list(ours) == list(expected)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key
    assert list(mine.hook_dict) == list(theirs.hook_dict)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    close("logits", mine(tokens).detach(), theirs(tokens).detach())


def test_init_weights_draws_again(pair: Pair) -> None:
    for model in pair:
        model.init_weights()
    weights_close(dict(pair.mine.named_parameters()), dict(pair.theirs.named_parameters()))


@pytest.mark.parametrize("given", ["object", "name", "in the config"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_tokenizer(given: str, prepend_bos: bool, tokenizer_directory: Path) -> None:
    fields = BASE | {"d_vocab": -1, "d_vocab_out": -1, "default_prepend_bos": prepend_bos}
    name = str(tokenizer_directory)
    theirs = reference(fields | {"tokenizer_name": name}, default_padding_side="left")
    tokenizer: Any = {"object": PreTrainedTokenizerFast.from_pretrained(name), "name": name}.get(given)
    cfg = HookedTransformerConfig(**fields, tokenizer_name=name if given == "in the config" else None)
    mine = HookedTransformer(cfg, tokenizer, default_padding_side="left")
    assert mine.cfg.d_vocab == theirs.cfg.d_vocab == mine.W_E.shape[0]
    for model in (mine, theirs):
        roughen(model)
    texts = ["The cat", "and then the dog saw Mary"]
    both = Pair(mine, theirs)
    both.agree(lambda model: model.to_tokens(texts))
    both.agree(lambda model: model(texts, return_type="both"))
    both.agree(lambda model: model(texts, return_type="loss", prepend_bos=not prepend_bos, padding_side="right"))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(AssertionError, match="d_vocab is not set"):
        HookedTransformer(HookedTransformerConfig(**BASE | {"d_vocab": -1}))
    with pytest.raises(ModelNotFoundError, match="cannot load a tokenizer 'no-such-tokenizer'"):
        HookedTransformer(HookedTransformerConfig(**BASE), "no-such-tokenizer")
    cfg = HookedTransformerConfig(**BASE)
    cfg.n_devices = 2
    with pytest.raises(UnsupportedModelError, match="n_devices=2: a model made from a config is on one device"):
        HookedTransformer(cfg)


def test_a_subclass_adds_modules_of_its_own(tokens: torch.Tensor) -> None:
    class Probed(HookedTransformer):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.probe = torch.nn.Linear(12, 2)

    model = Probed(dict(BASE))
    assert "probe.weight" in dict(model.named_parameters())
    assert "probe.weight" in model.state_dict()
    again = Probed(dict(BASE))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.probe.weight, model.probe.weight)


# --- running ----------------------------------------------------------------------------------------------------------


def test_logits_with_and_without_a_mask(pair: Pair, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    pair.agree(lambda model: model(tokens))
    pair.agree(lambda model: model(tokens[0]))
    forget_alibi(pair.theirs)
    pair.agree(lambda model: model(tokens, attention_mask=mask))
    pair.agree(lambda model: model(tokens, return_type=None))


@pytest.mark.parametrize("per_token", [False, True])
def test_loss(speakers: Pair, tokens: torch.Tensor, mask: torch.Tensor, per_token: bool) -> None:
    speakers.agree(lambda model: model(tokens, return_type="loss", loss_per_token=per_token))
    speakers.agree(lambda model: model(tokens, return_type="both", loss_per_token=per_token, attention_mask=mask))


def test_the_loss_is_over_hooked_tokens(tokens: torch.Tensor) -> None:
    def shift(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return (value + 1) % 17

    both = pair_of("final RMS, tokens hooked")
    kept = tokens.clone()
    hooked = [("hook_tokens", shift)]
    changed = both.agree(lambda model: model.run_with_hooks(tokens, return_type="both", fwd_hooks=hooked))
    close("loss", changed.loss, both.mine((tokens + 1) % 17, return_type="loss").detach())
    assert torch.equal(tokens, kept)


@pytest.mark.parametrize("stop", [0, 1, 2, -1])
def test_parts_of_the_model(pair: Pair, tokens: torch.Tensor, mask: torch.Tensor, stop: int) -> None:
    middle = pair.agree(lambda model: model(tokens, stop_at_layer=stop))
    options: dict[str, Any] = {"start_at_layer": stop if stop >= 0 else 1}
    if pair.mine.cfg.positional_embedding_type == "shortformer":
        options["shortformer_pos_embed"] = pair.mine.input_to_embed(tokens)[2].detach()
    whole = pair.agree(lambda model: model(middle, **options))
    close("logits", whole, pair.mine(tokens).detach())
    pair.agree(lambda model: model(middle, **options, attention_mask=mask))
    if pair.mine.cfg.d_vocab_out == 17:
        pair.agree(lambda model: model(middle, **options, tokens=tokens, return_type="loss"))


def test_the_embedding_by_itself(pair: Pair, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    for given in (None, mask):
        mine, theirs = (model.input_to_embed(tokens, attention_mask=given) for model in pair)
        equal(mine, theirs)


def test_positions_are_refused_where_there_are_none(plain: Pair, tokens: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="no shortformer"):
        plain.mine(tokens, shortformer_pos_embed=torch.zeros(3, 7, 12))


CACHED = [name for name in CONFIGS if CONFIGS[name].get("attention_dir") != "bidirectional"]


@pytest.mark.parametrize("name", CACHED)
def test_key_value_cache(name: str, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    both, logits = pair_of(name), []
    for model, cache_type in ((both.mine, TransformerLensKeyValueCache), (both.theirs, ReferenceKeyValueCache)):
        cache = cache_type.init_cache(model.cfg, "cpu", 3)
        rows = []
        with torch.no_grad():
            rows.append(model(tokens[:, :3], attention_mask=mask[:, :3], past_kv_cache=cache))
            forget_alibi(both.theirs)
            rows.append(model(tokens[:, 3:5], attention_mask=mask[:, 3:5], past_kv_cache=cache))
            cache.freeze()
            forget_alibi(both.theirs)
            for _ in range(2):
                rows.append(model(tokens[:, 5:], attention_mask=mask[:, 5:], past_kv_cache=cache))
        assert cache[0].past_keys.shape[1] == 5
        rows += [cache[1].past_keys, cache[1].past_values, cache.previous_attention_mask]
        logits.append(rows)
    equal(*logits)


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"names_filter": lambda name: name.endswith(("hook_z", "hook_scale"))},
        {"names_filter": ["blocks.1.attn.hook_pattern", "hook_embed"]},
        {"pos_slice": -1},
        {"stop_at_layer": 1},
        {"return_type": "logits", "return_cache_object": False},
    ],
    ids=["all", "filter", "names", "last position", "stopped", "dict"],
)
def test_run_with_cache(pair: Pair, tokens: torch.Tensor, options: dict[str, Any]) -> None:
    (output, mine), (expected, theirs) = (model.run_with_cache(tokens, **options) for model in pair)
    equal(output, expected)
    mine, theirs = (cache if isinstance(cache, dict) else cache.cache_dict for cache in (mine, theirs))
    assert list(mine) == list(theirs)
    caches_close(mine, {name: value.detach() for name, value in theirs.items()})
    assert not any(point.fwd_hooks for point in pair.mine.hook_points())


def test_one_input_without_batch_dimension(pair: Pair, tokens: torch.Tensor) -> None:
    # TransformerLens fails on tokens without batch dimension.
    options: dict[str, Any] = {"remove_batch_dim": True, "names_filter": lambda name: name != "hook_tokens"}
    mine, theirs = (model.run_with_cache(tokens[:1], **options)[1].cache_dict for model in pair)
    caches_close(mine, {name: value.detach() for name, value in theirs.items()})


def test_gradients_in_the_cache(speakers: Pair, tokens: torch.Tensor) -> None:
    keep = lambda name: "tokens" not in name  # noqa: E731
    mine, theirs = (
        model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=keep)[1].cache_dict
        for model in speakers
    )
    assert mine.keys() == theirs.keys()
    caches_close(mine, {name: value.detach() for name, value in theirs.items()})


@pytest.mark.parametrize("point", ["blocks.0.hook_attn_out", "blocks.1.attn.hook_z", "hook_embed"])
def test_edits_and_gradients_through_them(pair: Pair, tokens: torch.Tensor, point: str) -> None:
    def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
        return value * 0.5 + 0.1

    gradients: list[list[torch.Tensor]] = []
    for model in pair:
        seen: list[torch.Tensor] = []
        model.zero_grad()

        def keep(gradient: torch.Tensor, hook: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(gradient.detach().clone())

        with model.hooks(fwd_hooks=[(point, edit)], bwd_hooks=[("blocks.0.hook_resid_post", keep)]):
            logits = model(tokens)
            logits.square().sum().backward()
        assert model.hook_dict[point].ctx["calls"] == 1
        gradients.append([logits, *seen, *(p.grad for p in model.parameters() if p.grad is not None)])
    mine, theirs = gradients
    assert len(mine) == len(theirs)
    floor = 1e-2 * max(gradient.abs().max() for gradient in theirs[2:])[None]
    for one, other in zip(mine, theirs, strict=True):
        close("gradient", torch.cat((one.detach().flatten(), floor)), torch.cat((other.detach().flatten(), floor)))
    pair.agree(lambda model: model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name == point, edit)]))
    pair.agree(lambda model: model(tokens))


def test_hooks_that_stay(plain: Pair, tokens: torch.Tensor) -> None:
    def double(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * value

    for model in plain:
        model.add_perma_hook("blocks.0.mlp.hook_post", double)
        model.add_hook("blocks.1.mlp.hook_post", double)
    plain.agree(lambda model: model(tokens))
    for model in plain:
        model.reset_hooks()
    changed = plain.agree(lambda model: model(tokens))
    for model in plain:
        model.reset_hooks(including_permanent=True)
    assert not torch.equal(changed, plain.agree(lambda model: model(tokens)))


def test_flags(tokens: torch.Tensor) -> None:
    both = pair_of("solu_ln")
    setters = ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in", "set_use_attn_in")
    points = ("attn.hook_result", "hook_q_input", "hook_mlp_in", "hook_attn_in")
    for setter, point in zip(setters, points, strict=True):
        for model in both:
            with pytest.raises(AssertionError):
                model.add_hook(f"blocks.0.{point}", lambda value, hook: None)
            getattr(model, setter)(True)
        mine, theirs = (model.run_with_cache(tokens)[1].cache_dict for model in both)
        assert f"blocks.0.{point}" in mine
        assert list(mine) == list(theirs)
        caches_close(mine, {name: value.detach() for name, value in theirs.items()})
        for model in both:
            getattr(model, setter)(False)


def test_a_module_in_anothers_place_is_the_one_that_runs(plain: Pair, tokens: torch.Tensor) -> None:
    for model in plain:
        model.ln_final = torch.nn.Identity()
        model.blocks[0].mlp = torch.nn.Identity()
        model.setup()
    plain.agree(lambda model: model(tokens))


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_step_of_an_optimiser(speakers: Pair, tokens: torch.Tensor) -> None:
    for model in speakers:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = model(tokens, return_type="loss")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    speakers.agree(lambda model: model(tokens, return_type="loss"))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_state_dicts_travel_both_ways(pair: Pair, tokens: torch.Tensor) -> None:
    state = {name: value.clone() for name, value in pair.mine.state_dict().items()}
    weights_close(
        {name: value for name, value in state.items() if "W_" in name or "b_" in name},
        {name: value for name, value in pair.theirs.state_dict().items() if "W_" in name or "b_" in name},
    )
    expected = pair.theirs(tokens).detach()
    for model in pair:
        roughen(model, seed=1)
        assert not torch.allclose(model(tokens).detach(), expected)
        model.load_state_dict(state)
        close("logits", model(tokens).detach(), expected)
    del state["unembed.W_U"]
    for model in pair:
        with pytest.raises(RuntimeError, match="unembed.W_U"):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).missing_keys == ["unembed.W_U"]


STACKS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_out", "b_in", "b_out", "W_gate")


@pytest.mark.parametrize("name", [*STACKS, "W_U", "b_U", "W_E", "W_pos", "W_E_pos"])
def test_weights_by_name(pair: Pair, name: str) -> None:
    try:
        expected = getattr(pair.theirs, name)
    except AttributeError:
        with pytest.raises(AttributeError):
            getattr(pair.mine, name)
        return
    equal(getattr(pair.mine, name), expected)


def test_what_is_computed_from_weights(pair: Pair) -> None:
    biases = not pair.mine.cfg.attn_only
    for layer in range(3):
        pair.agree(lambda model, at=layer: model.accumulated_bias(at, include_mlp_biases=biases))
    for mode in "QKV":
        pair.agree(lambda model, mode=mode: model.all_composition_scores(mode))
    pair.agree(lambda model: model.QK.AB)
    pair.agree(lambda model: model.OV.AB)
    pair.agree(lambda model: model.all_head_labels())
    pair.agree(lambda model: model.tokens_to_residual_directions(torch.tensor([0, 1])))


def test_editing_a_weight(plain: Pair, tokens: torch.Tensor) -> None:
    for model in plain:
        with torch.no_grad():
            model.blocks[0].attn.W_O[1] = 0
            model.unembed.b_U += torch.arange(17)
    plain.agree(lambda model: model(tokens))


#: Where TransformerLens' own processing leaves the function of the model alone.
PROCESSED = ["solu_ln", "relu without norm", "rotary, gated, RMS, groups", "alibi", "parallel", "d_vocab_out"]


@pytest.mark.parametrize("name", PROCESSED)
@pytest.mark.parametrize("way", ["in place", "state dict"])
def test_processing(name: str, way: str, tokens: torch.Tensor) -> None:
    both = pair_of(name)
    before = both.mine(tokens).detach().log_softmax(-1)
    state = {key: value.clone() for key, value in both.theirs.state_dict().items()}
    for model in both:
        if way == "in place":
            model.process_weights_()
        else:
            model.load_and_process_state_dict(dict(state), center_unembed=False)
    close("log probs", both.mine(tokens).detach().log_softmax(-1), before)
    assert both.mine.cfg.normalization_type == both.theirs.cfg.normalization_type
    mine, theirs = (model.run_with_cache(tokens)[1].cache_dict for model in both)
    assert list(mine) == list(theirs)
    assert both.mine.state_dict().keys() == both.theirs.state_dict().keys()
    if name in ("solu_ln", "alibi", "d_vocab_out"):
        caches_close(mine, {key: value.detach() for key, value in theirs.items()})
        both.agree(lambda model: model(tokens))
    # A processed model is a model like any other: its weights can be set, and its new norms be hooked.
    again = {key: value.clone() for key, value in both.mine.state_dict().items()}
    expected = both.mine(tokens).detach()
    roughen(both.mine)
    both.mine.load_state_dict(again)
    close("logits", both.mine(tokens).detach(), expected)
    if both.mine.cfg.normalization_type is not None:
        double = [("ln_final.hook_scale", lambda value, hook: 2 * value)]
        both.agree(lambda model: model.run_with_hooks(tokens, fwd_hooks=double).log_softmax(-1))


# --- the analyses -----------------------------------------------------------------------------------------------------


def test_activation_cache(pair: Pair, tokens: torch.Tensor) -> None:
    for model in pair:
        model.eval()
    with torch.no_grad():
        mine, theirs = (model.run_with_cache(tokens)[1] for model in pair)
    has_mlp, normed = not pair.mine.cfg.attn_only, pair.mine.cfg.normalization_type is not None
    calls: list[Callable[[Any], Any]] = [
        lambda cache: cache.accumulated_resid(-1, incl_mid=has_mlp and not pair.mine.cfg.parallel_attn_mlp),
        lambda cache: cache.decompose_resid(-1, apply_ln=normed, return_labels=True),
        lambda cache: cache.stack_head_results(-1, pos_slice=-1, return_labels=True),
        lambda cache: cache.logit_attrs(cache.decompose_resid(), tokens % 2),
        lambda cache: cache["pattern", -1],
    ]
    if has_mlp:
        calls += [
            lambda cache: cache.stack_neuron_results(-1, pos_slice=-1),
            lambda cache: cache.get_full_resid_decomposition(-1, pos_slice=-1, expand_neurons=False),
        ]
    for call in calls:
        equal(call(mine), call(theirs))


def test_generation(speakers: Pair, tokens: torch.Tensor) -> None:
    for model in speakers:
        # Without norms scores are in the hundreds, where float32 has few digits left for the pattern.
        model.to(torch.float64, print_details=False)
    options = {"max_new_tokens": 4, "stop_at_eos": False, "do_sample": False, "verbose": False}
    for cached in (False, True):
        forget_alibi(speakers.theirs)
        new = speakers.mine.generate(tokens, use_past_kv_cache=cached, **options)
        assert torch.equal(new, speakers.theirs.generate(tokens, use_past_kv_cache=False, **options))
    text, cache = speakers.mine.generate(tokens, return_cache=True, **options)
    _, expected = speakers.mine.run_with_cache(text[:, :-1])
    caches_close(
        {name: value for name, value in cache.items() if "scores" not in name},
        {name: value for name, value in expected.items() if "scores" not in name},
    )


def test_generation_with_hooks(speakers: Pair, tokens: torch.Tensor) -> None:
    def silence(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return 0 * value

    options = {"max_new_tokens": 4, "stop_at_eos": False, "do_sample": False, "verbose": False}
    hooks = [("blocks.1.hook_attn_out", silence)]
    mine = speakers.mine.generate(tokens, fwd_hooks=hooks, **options)
    with speakers.theirs.hooks(fwd_hooks=hooks):
        forget_alibi(speakers.theirs)
        assert torch.equal(mine, speakers.theirs.generate(tokens, use_past_kv_cache=False, **options))


@pytest.mark.parametrize("keep", [0, 1, torch.tensor([0, -1])], ids=["all", "last", "some"])
@pytest.mark.parametrize("way", ["out of place", "in place"])
def test_a_sweep_is_a_loop(pair: Pair, tokens: torch.Tensor, keep: Any, way: str) -> None:
    def ablate(head: int) -> Callable[..., torch.Tensor | None]:
        def hook(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
            assert value.shape[0] == 3
            if way == "out of place":
                value = value.clone()
            value[..., head] = 0
            return value if way == "out of place" else None

        return hook

    points = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.attn.hook_v"]
    points += ["blocks.1.hook_attn_out", "blocks.1.hook_resid_post", "unembed.hook_out"]
    if pair.mine.cfg.normalization_type is not None:
        points += ["blocks.1.ln1.hook_normalized"]
    interventions: list[list] = [[(point, ablate(number % 2))] for number in range(2) for point in points]
    interventions += [[], [(points[2], ablate(0)), (points[4], ablate(1))]]

    def average(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.flip(0)

    pair.mine.add_hook("blocks.0.hook_attn_out", average)
    swept = list(pair.mine.run_sweep(tokens, interventions, logits_to_keep=keep))
    for logits, hooks in zip(swept, interventions, strict=True):
        expected = pair.mine.run_with_hooks(tokens, fwd_hooks=hooks).detach()
        close("logits", logits, expected[:, keep] if isinstance(keep, torch.Tensor) else expected[:, -keep:])


def test_patching(plain: Pair, tokens: torch.Tensor) -> None:
    _, cache = plain.mine.run_with_cache(tokens.flip(1))
    _, expected = plain.theirs.run_with_cache(tokens.flip(1))
    metric = lambda logits: logits[:, -1, 3].mean()  # noqa: E731
    with torch.no_grad():
        mine = patching.get_act_patch_attn_head_out_by_pos(plain.mine, tokens, cache, metric)
        theirs = reference_patching.get_act_patch_attn_head_out_by_pos(plain.theirs, tokens, expected, metric)
    close("patched", mine, theirs)


def test_traces_are_refused(plain: Pair, tokens: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="use run_with_hooks"):
        plain.mine.trace(tokens)
    with pytest.raises(UnsupportedModelError, match="made from a config has no traces"):
        _ = plain.mine.envoy


# --- moving and copying -----------------------------------------------------------------------------------------------


def test_dtype_and_modes(plain: Pair, tokens: torch.Tensor) -> None:
    for model in plain:
        model.to(torch.float64, print_details=False)
        model.eval()
    assert plain.mine.cfg.dtype == torch.float64
    assert not plain.mine.hf_model.training
    assert not plain.mine.blocks[0].training
    assert plain.agree(lambda model: model(tokens)).dtype == torch.float64
    plain.mine.train().half()
    assert plain.mine.cfg.dtype == plain.mine.W_E.dtype == torch.float16
    assert plain.mine.hf_model.training


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_models_of_their_own(pair: Pair, tokens: torch.Tensor, way: Callable) -> None:
    before = pair.mine(tokens).detach()
    twin = way(pair.mine)
    assert torch.equal(twin(tokens).detach(), before)
    assert twin.cfg is twin.blocks[0].cfg is not pair.mine.cfg
    roughen(twin, seed=3)
    assert torch.equal(pair.mine(tokens).detach(), before)
    changed = twin(tokens).detach()
    assert not torch.allclose(changed, before)
    twin.unembed = copy.deepcopy(twin.unembed)
    with torch.no_grad():
        twin.unembed.b_U += 1
    close("logits", twin(tokens).detach(), changed + 1)


def test_saving_and_loading(pair: Pair, tokens: torch.Tensor, tmp_path: Path) -> None:
    pair.mine.hf_model.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(str(tmp_path), device="cpu")
    assert isinstance(again.hf_model, NativeForCausalLM)
    assert torch.equal(again(tokens), pair.mine(tokens))
    processed = HookedTransformer.from_pretrained(str(tmp_path), device="cpu")
    close("log probs", processed(tokens).log_softmax(-1).detach(), again(tokens).log_softmax(-1).detach())
    part = HookedTransformer.from_pretrained_no_processing(str(tmp_path), device="cpu", first_n_layers=1, n_ctx=9)
    assert (part.cfg.n_layers, part.cfg.n_ctx) == (1, 9)
    close("stream", part(tokens, stop_at_layer=1).detach(), pair.theirs(tokens, stop_at_layer=1).detach())
