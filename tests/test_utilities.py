"""Do the helpers for tensors, names, logits, tokens and parameters do what they say?

That they do the same as TransformerLens' is compared elsewhere; here are the edges that differ or need no comparison.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from lensbridge import utilities, utils
from lensbridge.factored_matrix import FactoredMatrix
from lensbridge.utilities import (
    LocallyOverridenDefaults,
    Slice,
    TypedModuleList,
    calc_fan_in_and_fan_out,
    check_structure,
    composition_scores,
    filter_dict_by_prefix,
    get_act_name,
    get_attention_mask,
    get_matrix_corner,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
    init_kaiming_normal_,
    init_xavier_normal_,
    is_library_available,
    lm_accuracy,
    lm_cross_entropy_loss,
    logits_to_df,
    print_gpu_mem,
    repeat_along_head_dimension,
    sample_logits,
    temporarily_swap_parameter,
    test_prompt,
    to_numpy,
    tokenize_and_concatenate,
)


def test_the_public_names_exist_and_are_the_same_in_both_modules() -> None:
    assert len(utilities.__all__) == len(set(utilities.__all__)) == 68
    for name in utilities.__all__:
        assert getattr(utils, name) is getattr(utilities, name)


def test_every_public_function_says_what_it_does() -> None:
    for name in utilities.__all__:
        thing = getattr(utilities, name)
        if inspect.isfunction(thing) or (inspect.isclass(thing) and not get_args(thing)):
            assert thing.__doc__, name


#: Imports the helpers without the rest of the package and prints which expensive packages came along.
IMPORT_ALONE = """
import sys, types
sys.modules["lensbridge"] = package = types.ModuleType("lensbridge")
package.__path__ = [sys.argv[1]]
import lensbridge.utilities
print([name for name in ("datasets", "pandas", "plotly", "transformers", "pytest") if name in sys.modules])
"""


def test_importing_the_helpers_is_cheap() -> None:
    command = [sys.executable, "-c", IMPORT_ALONE, str(Path(inspect.getfile(utils)).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_slice_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="'text'.*tuple"):
        Slice("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_ctx"):
        Slice([1]).indices()


@pytest.mark.parametrize(
    ("choice", "kept"),
    [(None, [0, 1, 2, 3]), ((2,), [0, 1]), ((1, 3), [1, 2]), ((0, 4, 3), [0, 3]), ([3, 0], [3, 0]), (2, 2), (-1, 3)]
    + [(slice(2, None), [2, 3]), (torch.tensor([False, True, True, False]), [1, 2]), (np.array([1, 1]), [1, 1])],
)
def test_slice_along_any_dimension(choice: Any, kept: Any) -> None:
    tensor = torch.randn(4, 4, 4)
    assert torch.equal(Slice(choice).apply(tensor, 1), tensor[:, kept])
    assert torch.equal(Slice(choice).apply(tensor, dim=-1), tensor[..., kept])
    assert np.array_equal(Slice(choice).indices(4) % 4, np.atleast_1d(kept))
    assert Slice.unwrap(choice).apply(tensor).ndim == 3


def test_names_of_activations() -> None:
    assert get_act_name("k", 6, "a") == get_act_name("k6") == "blocks.6.attn.hook_k"
    assert get_act_name("scale4ln1") == "blocks.4.ln1.hook_scale"
    assert get_act_name("normalized") == "ln_final.hook_normalized"
    assert get_act_name("mlp_post", 2) == "blocks.2.mlp.hook_post"
    assert get_act_name("resid_pre", 3) == "blocks.3.hook_resid_pre"
    assert get_act_name("blocks.0.hook_resid_pre") == "blocks.0.hook_resid_pre"


def test_tensors() -> None:
    assert to_numpy(torch.tensor([1.5], dtype=torch.bfloat16)).tolist() == [1.5]
    with pytest.raises(ValueError, match="dict"):
        to_numpy({})
    assert filter_dict_by_prefix({"h.0.w": 1, "h.00.w": 2}, "h.0") == {"w": 1}
    heads = repeat_along_head_dimension(torch.zeros(1, 2, 3), 4)
    heads[:, :, 0] = 1
    assert heads.sum() == 6
    with pytest.raises(AssertionError, match=r"\(2, 2\) and \(2, 3\)"):
        check_structure(torch.ones(2, 2), torch.ones(2, 3))


def test_structure_is_labelled(capsys: pytest.CaptureFixture[str]) -> None:
    check_structure(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[2, 1], [2, 1]]), verbose=True)
    printed = capsys.readouterr().out
    assert "\tcolumns 0:1" in printed and printed.endswith("column mismatch: [0]\n")
    assert "\trows" not in printed


def test_loss_is_the_mean_over_what_is_attended() -> None:
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    by_torch = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens, per_token=True), by_torch)
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens), by_torch.mean())
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    torch.testing.assert_close(
        lm_cross_entropy_loss(logits, tokens, mask), torch.cat([by_torch[0, 1:], by_torch[1, :2]]).mean()
    )
    assert lm_cross_entropy_loss(logits, tokens, mask, per_token=True)[1, 2:].tolist() == [0.0, 0.0]
    with pytest.raises(AssertionError, match=r"\(2, 5\).*\(2, 4\)"):
        lm_cross_entropy_loss(logits, tokens, mask[:, 1:])
    assert lm_accuracy(logits, torch.cat([tokens[:, :1], logits.argmax(-1)[:, :-1]], dim=1)) == 1.0


def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, -9.0]] * 400)
    assert set(sample_logits(logits, top_k=2).tolist()) == {0, 1}
    assert set(sample_logits(logits, top_p=0.9).tolist()) == {0, 1}
    assert set(sample_logits(logits, top_p=0.1).tolist()) == {0}
    assert set(sample_logits(logits, temperature=0.0).tolist()) == {0}
    often_the_first = torch.zeros(400, 3, dtype=torch.int64)
    assert 0 not in sample_logits(logits, freq_penalty=9.0, tokens=often_the_first).tolist()
    assert set(sample_logits(logits, temperature=0.0, repetition_penalty=2.0, tokens=often_the_first).tolist()) == {1}
    with pytest.warns(UserWarning, match="without tokens"):
        sample_logits(logits, repetition_penalty=2.0)


def test_a_table_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        logits_to_df(torch.zeros(3))


def test_corner_and_scores() -> None:
    matrix = FactoredMatrix(torch.randn(8, 2), torch.randn(2, 8))
    assert torch.equal(get_matrix_corner(matrix, 5), matrix[:5, :5].AB)
    product = matrix.AB
    score = torch.linalg.matrix_norm(product @ product) / torch.linalg.matrix_norm(product) ** 2
    torch.testing.assert_close(composition_scores(matrix, matrix), score)
    with pytest.raises(AssertionError, match=r"\(8, 8\).*\(7, 8\)"):
        composition_scores(matrix, matrix[:7])


# ---------------------------------------------------------------- tokens

SEPARATE: Any = SimpleNamespace(bos_token_id=1, pad_token_id=0, padding_side="right")
SHARED: Any = SimpleNamespace(bos_token_id=0, pad_token_id=0, padding_side="left")


def test_masks_find_padding_on_one_side() -> None:
    left, right = torch.tensor([[0, 0, 0, 5, 0]]), torch.tensor([[1, 0, 5, 0, 0]])
    assert get_attention_mask(SHARED, left, prepend_bos=True).tolist() == [[0, 0, 1, 1, 1]]
    assert get_attention_mask(SHARED, left, prepend_bos=False).tolist() == [[0, 0, 0, 1, 1]]
    assert get_attention_mask(SEPARATE, right, prepend_bos=True).tolist() == [[1, 1, 1, 0, 0]]
    assert get_attention_mask(SEPARATE, left, False, padding_side="left").tolist() == [[0, 0, 0, 1, 1]]
    assert get_attention_mask(SHARED, torch.tensor([[5, 0]]), prepend_bos=True).tolist() == [[1, 1]]
    without_pad: Any = SimpleNamespace(bos_token_id=1, pad_token_id=None, padding_side="left")
    assert get_attention_mask(without_pad, left, prepend_bos=True).all()


def test_bos_is_removed_where_it_stands() -> None:
    assert get_tokens_with_bos_removed(SHARED, torch.tensor([[0, 0, 5], [0, 6, 7]])).tolist() == [[0, 5], [6, 7]]
    left = torch.tensor([[0, 1, 5], [1, 6, 1]])
    assert get_tokens_with_bos_removed(SEPARATE, left, padding_side="left").tolist() == [[0, 5], [6, 1]]
    assert get_tokens_with_bos_removed(SEPARATE, left[0], padding_side="left").tolist() == [0, 5]
    assert get_tokens_with_bos_removed(SEPARATE, torch.tensor([1, 5, 0])).tolist() == [5, 0]
    with pytest.raises(RuntimeError, match="BOS token 0"):
        get_tokens_with_bos_removed(SHARED, torch.tensor([[0, 5], [5, 6]]))


class InMemory:
    """A tokenizer that came from nowhere."""

    bos_token = "<s>"
    padding_side = "left"

    def __init__(self, **init_kwargs: Any) -> None:
        self.init_kwargs = init_kwargs
        self.add_bos_token = False


@pytest.mark.parametrize("source", [{}, {"name_or_path": ""}, {"name_or_path": "no/such/directory/anywhere"}])
def test_a_tokenizer_without_files_is_copied(source: dict[str, str]) -> None:
    tokenizer: Any = InMemory(**source)
    changed = get_tokenizer_with_bos(tokenizer)
    assert changed is not tokenizer
    assert (changed.add_bos_token, tokenizer.add_bos_token) == (True, False)
    assert (changed.padding_side, changed.init_kwargs) == ("left", source)


def test_a_bos_that_cannot_be_added_is_left() -> None:
    class Refusing(InMemory):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "add_bos_token" and value:
                raise ValueError("no colon in a template")
            super().__setattr__(name, value)

    tokenizer: Any = Refusing()
    assert get_tokenizer_with_bos(tokenizer) is tokenizer
    with_flag: Any = InMemory(add_bos_token=True)
    assert get_tokenizer_with_bos(with_flag) is with_flag


class Texts:
    """As much of a data set as is needed to tokenize it."""

    column = "text"

    def __init__(self, *texts: str) -> None:
        self.texts, self.rows, self.format, self.options = list(texts), [], "", {}  # type: ignore[var-annotated]

    def select_columns(self, names: list[str]) -> Texts:
        assert names == [self.column]
        return self

    def map(self, function: Any, **options: Any) -> Texts:
        self.options = options
        self.rows = function({self.column: self.texts})["tokens"].tolist()
        return self

    def with_format(self, name: str) -> Texts:
        self.format = name
        return self


class Characters:
    """A tokenizer that gives each character its place in the alphabet."""

    eos_token, eos_token_id, bos_token_id = "#", 99, 98
    pad_token, pad_token_id = None, None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [[ord(char) - ord("a") for char in text] for text in texts]}


def test_texts_become_rows() -> None:
    tokenizer: Any = Characters()
    done: Any = tokenize_and_concatenate(Texts("abc", "", "de"), tokenizer, max_length=4, streaming=True)
    assert done.rows == [[98, 0, 1, 2], [98, 99, 99, 3]]
    assert (done.format, done.options) == ("torch", {"batched": True, "remove_columns": ["text"]})
    done = tokenize_and_concatenate(Texts("ab"), tokenizer, max_length=4, add_bos_token=False, set_format=False)
    assert done.rows == [[0, 1, 99, 99]]
    assert (done.format, done.options["num_proc"]) == ("", 10)
    assert tokenizer.pad_token is None
    assert tokenize_and_concatenate(Texts(), tokenizer).rows == []


@pytest.mark.parametrize(("lacking", "error"), [("eos_token", AssertionError), ("bos_token_id", ValueError)])
def test_texts_need_bos_and_eos(lacking: str, error: type[Exception]) -> None:
    tokenizer: Any = Characters()
    setattr(tokenizer, lacking, None)
    with pytest.raises(error, match=lacking[:3].upper()):
        tokenize_and_concatenate(Texts("a"), tokenizer)


# ---------------------------------------------------------------- models, parameters


def test_defaults_come_back_after_an_error() -> None:
    model = SimpleNamespace(
        cfg=SimpleNamespace(default_prepend_bos=True), tokenizer=SimpleNamespace(padding_side="right")
    )
    with pytest.raises(KeyError), LocallyOverridenDefaults(model, prepend_bos=False, padding_side="left"):
        assert (model.cfg.default_prepend_bos, model.tokenizer.padding_side) == (False, "left")
        raise KeyError
    assert (model.cfg.default_prepend_bos, model.tokenizer.padding_side) == (True, "right")
    # A refused value must not leave the other override behind.
    with (
        pytest.raises(AssertionError, match="padding_side.*'up'"),
        LocallyOverridenDefaults(model, prepend_bos=False, padding_side="up"),
    ):
        pytest.fail("the value was accepted")
    assert (model.cfg.default_prepend_bos, model.tokenizer.padding_side) == (True, "right")
    with pytest.raises(AssertionError, match="prepend_boss"):
        LocallyOverridenDefaults(model, prepend_boss=True)


def test_a_swapped_parameter_comes_back_after_an_error() -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    with pytest.raises(KeyError), temporarily_swap_parameter(parameter, torch.zeros(3)):
        assert not parameter.any()
        raise KeyError
    assert parameter.tolist() == [0, 1, 2]


def test_initial_weights_have_the_variance_they_should() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.empty(4, 100, 50))
    assert calc_fan_in_and_fan_out(weight) == (100, 200)
    assert init_kaiming_normal_(weight).std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.02)
    assert init_xavier_normal_(weight, gain=3.0).std().item() == pytest.approx(3 * (2 / 300) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="fan_in"):
        init_kaiming_normal_(weight, mode="fan")


def test_module_lists() -> None:
    modules: TypedModuleList[nn.Linear] = TypedModuleList([nn.Linear(1, 2)])
    modules.append(nn.Linear(2, 3))
    assert [module.out_features for module in modules] == [2, 3]
    assert len(list(modules.parameters())) == 4


def test_small_things(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_library_available("json") and is_library_available("torch")
    assert not is_library_available("no_such_package_anywhere")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**29)
    print_gpu_mem("step")
    assert capsys.readouterr().out == "step ~ 1.5 GiB allocated on GPU.\n"


class Speller:
    """A model that reads characters and always prefers those late in the alphabet."""

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> torch.Tensor:
        return torch.tensor([[0] * (prepend_bos is not False) + [ord(char) for char in text]])

    def to_str_tokens(self, text: str, prepend_bos: bool | None = None) -> list[str]:
        return ["<s>"] * (prepend_bos is not False) + [f"[/{char}]" for char in text]

    def to_string(self, token: torch.Tensor) -> str:
        return chr(int(token))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(128.0).expand(*tokens.shape, 128)


def test_a_prompt_is_judged_whatever_its_tokens_look_like(capsys: pytest.CaptureFixture[str]) -> None:
    test_prompt("What", ["a", "z"], Speller(), prepend_space_to_answer=False, top_k=200)
    printed = capsys.readouterr().out
    assert "Rank: 30" in printed and "Rank: 5" in printed
    assert "Token: |[/a]|" in printed
    assert printed.count("th token.") == 128
    test_prompt("What", "abc", Speller(), print_details=False)
    assert "Top" not in (printed := capsys.readouterr().out)
    assert "95" in printed and "30" in printed and "29" in printed and "28" in printed


def test_every_pair_has_a_score() -> None:
    left, right = (FactoredMatrix(torch.randn(2, 3, 6, 2), torch.randn(2, 3, 2, 6)) for _ in range(2))
    scores = composition_scores(left, right)
    assert scores.shape == (2, 3, 2, 3)
    torch.testing.assert_close(scores[1, 2, 0, 1], composition_scores(left[1, 2], right[0, 1]))
    together = composition_scores(left, right, broadcast_dims=False)
    torch.testing.assert_close(together[1, 2], scores[1, 2, 1, 2])
