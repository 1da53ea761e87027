"""Do the helpers for tensors, names, logits and defaults do what those of TransformerLens 3.9.0 do?"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformer_lens import utilities as theirs

from compat_tests.agreement import agree, outcome, same
from lensbridge import utilities as ours
from lensbridge import utils


def public(module: Any) -> set[str]:
    return {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}


def test_the_names_are_the_same() -> None:
    assert set(ours.__all__) == set(utils.__all__) == public(theirs) == public(ours) == public(utils)


@pytest.mark.parametrize("name", sorted(name for name in public(theirs) if inspect.isfunction(getattr(theirs, name))))
def test_the_parameters_are_the_same(name: str) -> None:
    def read(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert read(getattr(ours, name)) == read(getattr(theirs, name))


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
