"""Do the helpers do what those of TransformerLens 3.9.0 do?"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformer_lens import utilities as theirs
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as TheirCache
from transformer_lens.utilities import activation_functions as their_activations
from transformer_lens.utilities import multi_gpu as their_multi_gpu
from transformers import PreTrainedTokenizerFast

from lensbridge import utilities as ours
from lensbridge import utils
from lensbridge.cache import TransformerLensKeyValueCache
from lensbridge.utilities import activation_functions, multi_gpu

WORDS = ["<|endoftext|>", "<pad>", "<s>", *"abcdefgh", "ab", "cd", "Ġ"]


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or the type of what it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


def same(mine: Any, other: Any, tolerance: float = 0.0) -> None:
    if isinstance(other, torch.Tensor):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif isinstance(other, np.ndarray):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(mine, other)
    else:
        assert mine == other


def agree(name: str, *args: Any, **kwargs: Any) -> None:
    same(outcome(getattr(ours, name), *args, **kwargs), outcome(getattr(theirs, name), *args, **kwargs))


# ---------------------------------------------------------------- the surface


def public(module: Any) -> set[str]:
    return {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}


def test_the_names_are_the_same() -> None:
    assert set(ours.__all__) == set(utils.__all__) == public(theirs) == public(ours) == public(utils)


@pytest.mark.parametrize("name", sorted(name for name in public(theirs) if inspect.isfunction(getattr(theirs, name))))
def test_the_parameters_are_the_same(name: str) -> None:
    def read(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert read(getattr(ours, name)) == read(getattr(theirs, name))


# ---------------------------------------------------------------- Slice

small = st.integers(-7, 7)
slice_inputs = st.one_of(
    st.none(),
    st.integers(-5, 4),
    st.tuples(small),
    st.tuples(small, small),
    st.tuples(small, small, st.integers(1, 3)),
    st.builds(slice, small, small),
    st.lists(st.integers(-5, 4), max_size=4),
    st.lists(st.integers(-5, 4), min_size=1, max_size=4).map(torch.tensor),
    st.lists(st.integers(-5, 4), min_size=1, max_size=4).map(np.array),
    st.lists(st.booleans(), min_size=5, max_size=5).map(torch.tensor),
    st.sampled_from(["0", 1.5, {1}]),
)


@given(slice_inputs, st.integers(-3, 2))
@settings(max_examples=300, deadline=None)
def test_slice(choice: Any, dim: int) -> None:
    tensor = torch.arange(125).reshape(5, 5, 5)
    for build in (lambda s: s.Slice(choice), lambda s: s.Slice.unwrap(choice)):
        mine, other = outcome(build, ours), outcome(build, theirs)
        if isinstance(other, type):
            assert mine is other
            continue
        assert (mine.mode, repr(mine)) == (other.mode, repr(other))
        same(outcome(mine.apply, tensor, dim), outcome(other.apply, tensor, dim))
        same(outcome(mine.apply, tensor), outcome(other.apply, tensor))
        same(outcome(mine.indices, 5), outcome(other.indices, 5))
        same(outcome(mine.indices), outcome(other.indices))


def test_a_slice_is_not_wrapped_twice() -> None:
    choice = ours.Slice(3)
    assert ours.Slice.unwrap(choice) is choice


# ---------------------------------------------------------------- get_act_name

NAMES = [
    "q",
    "k",
    "v",
    "z",
    "rot_q",
    "rot_k",
    "result",
    "pattern",
    "attn_scores",
    "attn",
    "attn_logits",
    "key",
    "query",
]
NAMES += ["value", "pre", "mid", "post", "pre_linear", "mlp_pre", "mlp_mid", "mlp_post", "scale", "normalized", "embed"]
NAMES += ["pos_embed", "resid_pre", "resid_mid", "attn_out", "mlp_out", "mlp_in", "hook_q", "blocks.0.hook_resid_pre"]
PARTS = [None, "", "a", "m", "b", "block", "blocks", "attention", "attn", "mlp", "ln1", "ln2", "ln_final", "x"]


@given(
    st.sampled_from(NAMES) | st.from_regex(r"\A[a-z_.]{0,6}[0-9]{0,2}[a-z0-9_]{0,5}\Z"),
    st.sampled_from([None, 0, 3, 11, "2"]),
    st.sampled_from(PARTS),
)
@settings(max_examples=1000, deadline=None)
def test_act_name(name: str, layer: Any, part: str | None) -> None:
    agree("get_act_name", name, layer, part)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", ["", 5, 12])
@pytest.mark.parametrize("part", PARTS)
def test_act_name_in_short(name: str, layer: Any, part: str | None) -> None:
    agree("get_act_name", f"{name}{layer}{part or ''}")


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "value",
    [np.arange(3), [1, 2], (1.5, 2), 3, 2.5, True, "text", torch.ones(2, requires_grad=True), None, {1}, object]
    + [torch.randn(3).bfloat16(), torch.randn(3).half(), nn.Parameter(torch.ones(2)), [[1, 2], [3, 4]], []],
    ids=str,
)
def test_to_numpy(value: Any) -> None:
    agree("to_numpy", value)


@pytest.mark.parametrize("shape", [(), (4,), (1,), (1, 5), (4, 4), (5, 4), (1, 4, 5), (2, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("name", ["get_corner", "remove_batch_dim", "transpose", "is_square", "is_lower_triangular"])
def test_tensor_helpers(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    agree(name, tensor)
    if shape[-2:] == (4, 4):
        agree(name, tensor.tril())


def test_more_tensor_helpers() -> None:
    tensor = torch.arange(24).reshape(2, 3, 4)
    for dim in (-1, 0, 1):
        for reverse in (False, True):
            agree("get_cumsum_along_dim", tensor, dim, reverse)
    agree("get_corner", tensor.numpy(), 2)
    for clone in (True, False):
        agree("repeat_along_head_dimension", tensor.float(), 5, clone)
        assert ours.repeat_along_head_dimension(tensor, 5, clone).is_contiguous() == clone
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    for offset in (0, 2, 5):
        agree("get_offset_position_ids", offset, mask)
    weights = {"h.0.w": 1, "h.0.attn.w": 2, "h.01.w": 3, "h.1.w": 4, "h.0": 5}
    for prefix in ("h.0", "h.0.", "h", "x", ""):
        agree("filter_dict_by_prefix", weights, prefix)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_check_structure(seed: int, verbose: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(3, 4, generator=generator)
    for other in (one * 2, one + 0.5 * torch.randn(3, 4, generator=generator), one.T):
        printed = []
        for module in (ours, theirs):
            with pytest.MonkeyPatch.context() as patch:
                lines: list[str] = []
                patch.setattr("builtins.print", lambda *parts, kept=lines: kept.extend(" ".join(parts).split("\n")))
                lines.append(str(outcome(module.check_structure, one, other, verbose=verbose)))
            # Their details about columns are labelled "rows".
            printed.append([line.replace("\tcolumns", "\trows") for line in lines])
        assert printed[0] == printed[1]


def test_nested_attributes() -> None:
    for module in (ours, theirs):
        obj = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=3)), d=1)
        assert module.get_nested_attr(obj, "a.b.c") == 3
        module.set_nested_attr(obj, "a.b.c", 4)
        module.set_nested_attr(obj, "d", 5)
        module.set_nested_attr(obj, "a.e", 6)
        assert (obj.a.b.c, obj.d, obj.a.e) == (4, 5, 6)
        assert outcome(module.get_nested_attr, obj, "a.x.c") is AttributeError
        assert outcome(module.set_nested_attr, obj, "a.x.c", 1) is AttributeError


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loss_and_accuracy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, tokens = 3 * torch.randn(4, 7, 11).to(dtype), torch.randint(0, 11, (4, 7))
    tokens[:, 1:] = torch.where(torch.rand(4, 6) < 0.3, logits.argmax(-1)[:, :-1], tokens[:, 1:])
    masks = [None, torch.ones(4, 7), torch.randint(0, 2, (4, 7)), torch.rand(4, 7) > 0.3, torch.zeros(4, 7), tokens[:2]]
    for per_token in (False, True):
        agree("lm_accuracy", logits, tokens, per_token)
        for mask in masks:
            arguments = (logits, tokens, mask, per_token)
            mine = outcome(ours.lm_cross_entropy_loss, *arguments)
            same(mine, outcome(theirs.lm_cross_entropy_loss, *arguments), tolerance=1e-6)
    agree("lm_cross_entropy_loss", logits[:, :1], tokens[:, :1])


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 5.0},
    {"temperature": 0.0, "freq_penalty": 5.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 400},
    {"top_k": 0},
    {"top_p": 0.1},
    {"top_p": 0.8},
    {"top_p": 1.0},
    {"top_p": 0.0},
    {"top_p": 1.2},
    {"top_k": 5, "top_p": 0.3},
    {"freq_penalty": 0.8},
    {"freq_penalty": 0.8, "tokens": None},
    {"freq_penalty": 0.8, "tokens": torch.zeros(6, 3, 2)},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "freq_penalty": 0.3, "temperature": 1.4, "top_p": 0.9},
]


@pytest.mark.parametrize("arguments", SAMPLING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, tokens = 2 * torch.randn(6, 20).to(dtype), torch.randint(0, 20, (6, 15))
    before = logits.clone()
    for seed in range(8):
        drawn = []
        for module in (ours, theirs):
            torch.manual_seed(seed)
            drawn.append(outcome(module.sample_logits, logits, **{"tokens": tokens, **arguments}))
        same(*drawn)
    assert torch.equal(logits, before)


def test_logits_to_df(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.randn(len(WORDS), requires_grad=True)
    for arguments in ({}, {"top_k": 3}, {"tokenizer": tokenizer}, {"tokenizer": tokenizer, "top_k": 2}):
        mine, other = ours.logits_to_df(logits, **arguments), theirs.logits_to_df(logits, **arguments)
        assert mine.equals(other)
        assert list(mine.columns) == list(other.columns)


# ---------------------------------------------------------------- tokens


def build_tokenizer(padding_side: str = "right", **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="Ġ"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **special)


SPECIAL: list[dict[str, str]] = [
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"},
    {"eos_token": "<|endoftext|>", "pad_token": "<pad>"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(**SPECIAL[0])


@given(st.integers(0, 100_000), st.sampled_from(SPECIAL), st.sampled_from(["left", "right"]))
@settings(max_examples=150, deadline=None)
def test_mask_and_removal_of_bos(seed: int, special: dict[str, str], side: str) -> None:
    tokenizer = build_tokenizer(side, **special)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(4):
        body = torch.randint(0, 5, (int(torch.randint(0, 6, (1,), generator=generator)),), generator=generator)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        padding = [tokenizer.pad_token_id] * (6 - len(body))
        row = bos + body.tolist()
        rows.append(padding + row if side == "left" else row + padding)
    tokens = torch.tensor(rows)
    for given_side in (None, "left", "right"):
        for prepend_bos in (True, False):
            for module in (ours, theirs):
                assert module.get_attention_mask(None, tokens, prepend_bos).all()
            agree("get_attention_mask", tokenizer, tokens, prepend_bos, given_side)
        agree("get_tokens_with_bos_removed", tokenizer, tokens, given_side)


def test_bos_in_front() -> None:
    for text in ("abc", "", ["a", "b"], []):
        for bos in ("<s>", None):
            agree("get_input_with_manually_prepended_bos", bos, text)


@pytest.mark.parametrize("special", SPECIAL, ids=["same", "own", "no bos"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizer_with_bos(special: dict[str, str], side: str, tmp_path: Path) -> None:
    build_tokenizer(**special).save_pretrained(tmp_path)
    results = []
    for module in (ours, theirs):
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path, padding_side=side)
        result = module.get_tokenizer_with_bos(loaded)
        assert module.get_tokenizer_with_bos(result) is result
        assert (result is loaded) == ("bos_token" not in special)
        assert loaded("a b")["input_ids"] == [3, 4]
        results.append((result("a b")["input_ids"], result.padding_side, result.special_tokens_map))
    assert results[0] == results[1]


@pytest.mark.parametrize("max_length", [4, 5, 50])
@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("padded_with", ["<pad>", None])
@pytest.mark.parametrize("streaming", [True, False])
def test_tokenize_and_concatenate(max_length: int, add_bos_token: bool, padded_with: Any, streaming: bool) -> None:
    texts = ["a b c d e", "", "h g", "a", "c d e f g h a"]
    results = []
    for module in (ours, theirs):
        special = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
        tokenizer = build_tokenizer(**special, **({"pad_token": padded_with} if padded_with else {}))
        data: Any = datasets.Dataset.from_dict({"text": texts, "other": list(range(5))})
        if streaming:
            data = data.to_iterable_dataset()
        options = {"streaming": streaming, "max_length": max_length, "num_proc": None, "set_format": not streaming}
        rows = module.tokenize_and_concatenate(data, tokenizer, add_bos_token=add_bos_token, **options)
        results.append([row["tokens"] for row in rows])
    assert results[0]
    assert {type(row) for row in results[0]} == {np.ndarray if streaming else torch.Tensor}
    for mine, other in zip(*results, strict=True):
        same(mine, other)


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    "overrides",
    [{}, {"prepend_bos": None}, {"prepend_bos": False}, {"padding_side": "left", "prepend_bos": False}]
    + [{"padding_side": None}, {"padding_side": "middle"}, {"prepend_bos": "yes"}, {"other": 1}],
    ids=str,
)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_local_defaults(overrides: dict[str, Any], has_tokenizer: bool) -> None:
    def state(model: Any) -> tuple[Any, Any]:
        return model.cfg.default_prepend_bos, getattr(model.tokenizer, "padding_side", None)

    def inside(module: Any) -> Any:
        model = SimpleNamespace(cfg=SimpleNamespace(default_prepend_bos=True), tokenizer=None)
        if has_tokenizer:
            model.tokenizer = SimpleNamespace(padding_side="right")
        before = state(model)
        with module.LocallyOverridenDefaults(model, **overrides):
            within = state(model)
        assert state(model) == before
        return within

    assert outcome(inside, ours) == outcome(inside, theirs)
    for default in (True, "left"):
        for override in (None, False, "right"):
            agree("override_or_use_default_value", default, override)


# ---------------------------------------------------------------- activation functions, initialisation, parameters


@pytest.mark.parametrize("name", list(their_activations.SUPPORTED_ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activation_functions(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([3 * torch.randn(2, 3, 50), torch.zeros(2, 3, 1)], dim=-1).to(dtype)
    results = []
    for module in (activation_functions, their_activations):
        leaf = values.clone().requires_grad_()
        out = module.SUPPORTED_ACTIVATIONS[name](leaf)
        out.sum().backward()
        results.append((out, leaf.grad))
    (mine, my_gradient), (other, their_gradient) = results
    same(mine, other)
    # Gradients of one value add up in the order in which the operations were written.
    same(my_gradient, their_gradient, tolerance=10 * torch.finfo(dtype).eps)
    assert list(ours.SUPPORTED_ACTIVATIONS) == list(theirs.SUPPORTED_ACTIVATIONS)


@pytest.mark.parametrize("arguments", [{}, {"alpha_p_init": 1.1, "alpha_n_init": 0.9, "beta_init": 0.3, "eps": -1e-3}])
def test_trainable_xielu(arguments: dict[str, float]) -> None:
    mine, other = activation_functions.XIELU(**arguments), their_activations.XIELU(**arguments)
    mine.load_state_dict(other.state_dict())
    fresh = activation_functions.XIELU(**arguments).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in other.state_dict().items())
    values = torch.randn(3, 40)
    same(mine(values), other(values), tolerance=1e-6)
    for module in (mine, other):
        module(values).square().sum().backward()
    same(mine.alpha_n.grad, other.alpha_n.grad, tolerance=1e-5)
    same(mine.alpha_p.grad, other.alpha_p.grad, tolerance=1e-5)


def test_softcap() -> None:
    assert ours.SOFTCAP_DISABLED == theirs.SOFTCAP_DISABLED
    for cap in (None, -1.0, 0, 0.0, 2, 30.0):
        agree("softcap_enabled", cap)
        agree("apply_softcap", torch.randn(5), cap)


@pytest.mark.parametrize("shape", [(), (9,), (4, 9), (3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("init_xavier_uniform_", {}),
        ("init_xavier_normal_", {"gain": 2.0}),
        ("init_kaiming_uniform_", {}),
        ("init_kaiming_uniform_", {"a": 0.3, "nonlinearity": "leaky_relu", "mode": "fan_out"}),
        ("init_kaiming_normal_", {"nonlinearity": "tanh", "gain": 0.5}),
        ("init_kaiming_normal_", {"nonlinearity": "none such"}),
    ],
)
def test_initialisation(name: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    def draw(module: Any) -> Any:
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.zeros(shape))
        assert getattr(module, name)(parameter, **arguments) is parameter
        return parameter.detach()

    same(outcome(draw, ours), outcome(draw, theirs), tolerance=1e-7)
    agree("calc_fan_in_and_fan_out", torch.zeros(shape))


def test_swapped_parameter() -> None:
    for module in (ours, theirs):
        parameter = nn.Parameter(torch.ones(3))
        with module.temporarily_swap_parameter(parameter, torch.zeros(3)) as yielded:
            assert yielded is parameter
            assert not parameter.any()
        with pytest.raises(KeyError), module.temporarily_swap_parameter(parameter, torch.zeros(3)):
            raise KeyError
        assert parameter.all()
        for target, value, error in (
            (torch.ones(3), torch.ones(3), TypeError),
            (parameter, parameter, TypeError),
            (parameter, 1.0, TypeError),
            (parameter, torch.ones(2), ValueError),
            (parameter, torch.ones(3).double(), ValueError),
        ):
            with pytest.raises(error), module.temporarily_swap_parameter(target, value):
                pass


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("n_layers", [1, 3, 12, 62])
@pytest.mark.parametrize("n_devices", [1, 2, 5, 8])
@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:2", torch.device("cuda", 1)], ids=str)
def test_device_of_a_block(n_layers: int, n_devices: int, device: Any) -> None:
    for own in ("cpu", "cuda", "cuda:1", None):
        cfg = SimpleNamespace(n_layers=n_layers, n_devices=n_devices, device=own)
        for index in range(n_layers):
            agree("get_device_for_block_index", index, cfg, device)


@pytest.mark.parametrize(
    "arguments",
    [(None, None, None), (1, None, "cpu"), (4, None, None), (None, "auto", None), (None, "auto", "cpu")]
    + [(None, {"": 0}, None, {0: "1GiB"}), (None, {"a": 0, "b": "cpu"}, None), (None, {"a": "disk"}, None)]
    + [(None, {"a": "CPU", "b": "cuda:1"}, None), (None, {"a": "cpu", "b": "cpu"}, None), (1, None, None, {0: 5})],
    ids=str,
)
def test_device_map(arguments: Any) -> None:
    agree("resolve_device_map", *arguments)


def test_device_map_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (100 + i, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: [50, 10, 30][i])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=200))
    for arguments in ((2, None, None), (3, None, None, {0: "1GiB"}), (4, None, None)):
        agree("resolve_device_map", *arguments)
    agree("determine_available_memory_for_available_devices", 3)
    agree("sort_devices_based_on_available_memory", [(0, 5), (1, 9), (2, 9), (3, 1)])
    for n_devices in (None, 0, 1, 3):
        agree("get_best_available_cuda_device", n_devices)
    for device in ("cpu", "cuda", "cuda:2", None):
        for n_devices in (1, 3):
            agree("get_best_available_device", SimpleNamespace(device=device, n_devices=n_devices))


class Spread(nn.Module):
    """As much of a HuggingFace model with a device map as the helpers look at."""

    def __init__(self, placement: dict[str, Any] | None, embedding: str | None = "wte") -> None:
        super().__init__()
        self.wte, self.head, self.ghost = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2, device="meta")
        self.embedding = embedding
        if placement is not None:
            self.hf_device_map = placement

    def get_input_embeddings(self) -> nn.Module:
        if self.embedding is None:
            raise NotImplementedError
        return getattr(self, self.embedding)


@pytest.mark.parametrize(
    "placement",
    [
        None,
        {},
        {"": "cpu"},
        {"wte": "cpu", "head": "cpu"},
        {"wte": 1, "head": "cpu", "gone": 0},
        {"ghost": 0, "wte": 0},
    ],
    ids=str,
)
def test_spread_models(placement: Any) -> None:
    for embedding in ("wte", None):
        model = Spread(placement, embedding)
        agree("find_embedding_device", model)
        agree("count_unique_devices", model)
        assert multi_gpu.find_misplaced_modules(model) == their_multi_gpu.find_misplaced_modules(model)


def test_casting() -> None:
    quantized = [None, SimpleNamespace(quant_method="fp8"), {"quant_method": "awq"}, {}, SimpleNamespace()]
    for settings_of_model in quantized:
        dtypes = []
        for module in (multi_gpu, their_multi_gpu):
            model: Any = Spread(None)
            model.narrow = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
            model.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
            model.config = SimpleNamespace(quantization_config=settings_of_model)
            module.maybe_cast_floating_params(model, torch.float16)
            dtypes.append({name: parameter.dtype for name, parameter in model.named_parameters()})
            module.cast_floating_params_to_dtype(model, torch.bfloat16)
            assert model.wte.weight.dtype is torch.bfloat16
        assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("target", ["cpu", torch.device("cpu"), torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_dtype", [True, False])
def test_moving(target: Any, has_dtype: bool, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for module in (ours, theirs):
        model: Any = nn.Linear(2, 2)
        model.cfg = SimpleNamespace(device="elsewhere", **({"dtype": torch.float32} if has_dtype else {}))
        assert module.move_to_and_update_config(model, target) is model
        module.move_to_and_update_config(model, target, print_details=False)
        results.append((vars(model.cfg), model.weight.dtype, capsys.readouterr().out))
    assert results[0] == results[1]


@pytest.mark.parametrize("allowed", ["1", "0", None])
def test_device_with_mps(allowed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERLENS_ALLOW_MPS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("TRANSFORMERLENS_ALLOW_MPS", allowed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    agree("get_device")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    agree("get_device")
    assert ours.get_device() == ("mps" if allowed == "1" else "cpu")


# ---------------------------------------------------------------- the hub


def test_arguments_of_a_function() -> None:
    def function(a: int, b: int = 1) -> None: ...

    agree("select_compatible_kwargs", {"a": 1, "b": 2, "c": 3, "self": 4}, function)


@pytest.mark.parametrize(
    "config",
    [None, SimpleNamespace(), SimpleNamespace(rotary_pct=0.25), SimpleNamespace(rope_parameters=None)]
    + [SimpleNamespace(rope_parameters={"partial_rotary_factor": 0.4}), SimpleNamespace(rope_parameters={"x": 1})],
    ids=str,
)
def test_rotary_share(config: Any) -> None:
    agree("get_rotary_pct_from_config", config)


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.bin")
    (tmp_path / "c.json").write_text(json.dumps({"d": 3}))
    (tmp_path / "t.txt").write_text("text")

    def download(repo_id: str, filename: str, subfolder: str, cache_dir: str, revision: str | None = None) -> str:
        assert (repo_id, subfolder) == ("someone/something", ".")
        return str(tmp_path / filename)

    for package in ("lensbridge", "transformer_lens"):
        monkeypatch.setattr(f"{package}.utilities.hf_utils.hf_hub_download", download)
    for module in (ours, theirs):
        fetch = module.download_file_from_hf
        assert fetch("someone/something", "w.pth")["w"].tolist() == [0, 1, 2]
        assert fetch("someone/something", "w.bin", force_is_torch=True) == [1, 2]
        assert fetch("someone/something", "c.json", revision="main") == {"d": 3}
        assert fetch("someone/something", "t.txt") == str(tmp_path / "t.txt")
        assert capsys.readouterr().out == "File type not supported: txt\n"


@pytest.mark.parametrize(
    "name", ["openwebtext", "owt", "pile", "c4", "code", "python", "c4_code", "c4-code", "wiki", "x"]
)
def test_names_of_datasets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("transformer_lens.utilities.hf_utils.load_dataset", load)
    agree("get_dataset", name, data_dir="d")


def test_single_column() -> None:
    data = datasets.Dataset.from_dict({"a": [1, 2], "b": [3, 4], "c": [5, 6]})
    for kind in (data, data.to_iterable_dataset()):
        assert list(ours.keep_single_column(kind, "b")) == list(theirs.keep_single_column(kind, "b"))


# ---------------------------------------------------------------- test_prompt


class Talker:
    """A model as far as ``test_prompt`` asks: tokens by character, fixed random logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = 3 * torch.randn(128, 128)

    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = None) -> torch.Tensor:
        texts = [text] if isinstance(text, str) else text
        rows = [([0] if prepend_bos is not False else []) + list(map(ord, one)) for one in texts]
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def to_str_tokens(self, text: str, prepend_bos: bool | None = None) -> list[str]:
        return [chr(token) for token in self.to_tokens(text, prepend_bos)[0].tolist()]

    def to_string(self, token: torch.Tensor) -> str:
        return repr(chr(int(token)))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens] + 0.1 * torch.arange(tokens.shape[1])[None, :, None]


@pytest.fixture
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("wide_console")
@pytest.mark.parametrize("answer", ["xyz", "x", [" x", "yes", "no"], ["only"]], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"prepend_space_to_answer": False}, {"print_details": False}, {"prepend_bos": False, "top_k": 3}],
    ids=str,
)
def test_what_test_prompt_prints(answer: Any, arguments: Any, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for module in (ours, theirs):
        module.test_prompt("Why not", answer, Talker(), **arguments)
        printed.append(capsys.readouterr().out)
    assert "Ranks of the answer tokens" in printed[0]
    assert printed[0] == printed[1]


# ---------------------------------------------------------------- the key-value cache


@pytest.mark.parametrize("n_key_value_heads", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_devices", [1, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_cache(n_key_value_heads: int | None, dtype: torch.dtype, n_devices: int | None, batch: int) -> None:
    sizes = {"n_layers": 3, "n_heads": 4, "d_head": 5, "device": "cpu", "n_key_value_heads": n_key_value_heads}
    cfg: Any = SimpleNamespace(**sizes, dtype=dtype, **({} if n_devices is None else {"n_devices": n_devices}))
    caches = [kind.init_cache(cfg, None, batch) for kind in (TransformerLensKeyValueCache, TheirCache)]
    torch.manual_seed(0)
    for step, frozen in enumerate((False, True, False)):
        keys, values = torch.randn(2, batch, 2 + step, n_key_value_heads or 4, 5, dtype=dtype)
        mask = torch.randint(0, 2, (batch, 2 + step))
        states = []
        for cache in caches:
            (cache.freeze if frozen else cache.unfreeze)()
            returned = [cache.append_attention_mask(mask), *cache[1].append(keys, values)]
            flags = [cache.frozen, *(entry.frozen for entry in cache.entries)]
            assert cache[1] is cache.entries[1]
            kept = [cache.previous_attention_mask, *(t for e in cache.entries for t in (e.past_keys, e.past_values))]
            states.append((returned + kept, flags))
        assert states[0][1] == states[1][1] == [frozen] * 4
        for mine, other in zip(states[0][0], states[1][0], strict=True):
            same(mine, other)
    assert outcome(caches[0][0].append, keys[:, :, :1], values) is outcome(caches[1][0].append, keys[:, :, :1], values)
