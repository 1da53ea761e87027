"""Do the evaluations measure what they say, on data passed in and on loaders put in the hub's place?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset as Table

from lensbridge import HookedTransformer, evals
from lensbridge.errors import DatasetNotFoundError
from lensbridge.evals import IOIDataset, ioi_eval


@pytest.fixture(scope="module")
def toy() -> Any:
    return HookedTransformer.from_pretrained("toy")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A function that puts rows in the hub's place, or an exception, and gives the list of what is asked for."""

    def serve(answer: Any) -> list[Any]:
        asked: list[Any] = []

        def load(*args: Any, **kwargs: Any) -> Any:
            asked.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return answer(*args) if callable(answer) else answer

        monkeypatch.setattr(evals, "load_dataset", load)
        return asked

    return serve


# --- losses -----------------------------------------------------------------------------------------------------------


def test_sanity_check_is_the_loss_on_the_paragraph(toy: Any) -> None:
    loss = evals.sanity_check(toy)
    torch.testing.assert_close(loss, toy(evals.PARAGRAPH, return_type="loss"))
    assert loss.dim() == 0


def batches(toy: Any, count: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {"tokens": torch.randint(0, toy.cfg.d_vocab, (2, 12), generator=generator)}


def test_evaluate_on_dataset_is_the_mean_over_batches(toy: Any) -> None:
    losses = [toy(batch["tokens"], return_type="loss").item() for batch in batches(toy, 4)]
    assert evals.evaluate_on_dataset(toy, batches(toy, 4)) == pytest.approx(sum(losses) / 4)
    # One more than truncate, as in TransformerLens.
    assert evals.evaluate_on_dataset(toy, batches(toy, 4), truncate=1) == pytest.approx(sum(losses[:2]) / 2)


def test_an_empty_loader_is_an_error(toy: Any) -> None:
    with pytest.raises(ValueError, match="gave no batch"):
        evals.evaluate_on_dataset(toy, [])


def test_evaluations_need_no_gpu_and_keep_no_graph(toy: Any) -> None:
    loss = evals.induction_loss(toy, subseq_len=20)
    assert loss.device == toy.hf_model.device
    assert not loss.requires_grad


def test_induction_loss_is_the_loss_on_the_second_half(toy: Any) -> None:
    torch.manual_seed(3)
    loss = evals.induction_loss(toy, batch_size=3, subseq_len=40)
    torch.manual_seed(3)
    half = torch.randint(100, toy.cfg.d_vocab, (3, 40))
    tokens = torch.cat([half, half], dim=1)
    tokens[:, 0] = toy.tokenizer.bos_token_id
    torch.testing.assert_close(loss, toy(tokens, return_type="loss", loss_per_token=True)[:, 41:].mean())
    # The bundled model has induction heads.
    assert loss < 1
    assert toy(half, return_type="loss") > 5


def test_induction_loss_with_another_bos_or_none(lens: Any, tokenizer: Any) -> None:
    seen: list[torch.Tensor] = []

    def run(**options: Any) -> torch.Tensor:
        seen.clear()
        torch.manual_seed(0)
        with lens.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x[:, 0].clone()))]):
            evals.induction_loss(lens, subseq_len=10, **options)
        return seen[0]

    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    embedding = lens.W_E.detach()
    torch.testing.assert_close(run(), embedding[[0] * 4])
    torch.testing.assert_close(run(tokenizer=tokenizer), embedding[[5] * 4])
    torch.manual_seed(0)
    first = torch.randint(100, lens.cfg.d_vocab, (4, 10))[:, 0]
    torch.testing.assert_close(run(prepend_bos=False), embedding[first])


def test_loaders_cut_texts_into_rows(tokenizer: Any, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = evals.tokenize_and_concatenate
    monkeypatch.setattr(evals, "tokenize_and_concatenate", lambda *a, **k: cut(*a, max_length=16, num_proc=None, **k))
    column = {"code": "content"}
    for name, make in zip(evals.DATASET_NAMES, evals.DATASET_LOADERS, strict=True):
        asked = hub(Table.from_dict({column.get(name, "text"): ["the cat sat on the mat " * 40]}))
        rows = [batch["tokens"] for batch in make(tokenizer, batch_size=4)]
        assert rows and all(row.shape == (4, 16) for row in rows)
        assert all((row[:, 0] == tokenizer.bos_token_id).all() for row in rows)
        assert len(asked) == 1 and asked[0][1] == {"split": "train"}


def test_evaluate_gives_a_loss_for_each_data_set(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def maker(index: int) -> Callable[..., Any]:
        def make(tokenizer: Any, batch_size: int) -> Any:
            asked.append((index, tokenizer, batch_size))
            return batches(toy, index + 1)

        return make

    monkeypatch.setattr(evals, "DATASET_LOADERS", [maker(index) for index in range(4)])
    losses = evals.evaluate(toy, truncate=2, batch_size=5)
    assert list(losses) == ["wiki_loss", "owt_loss", "pile_loss", "code_loss"]
    assert asked == [(index, toy.tokenizer, 5) for index in range(4)]
    assert losses["owt_loss"] == pytest.approx(evals.evaluate_on_dataset(toy, batches(toy, 2)))
    assert losses["code_loss"] == pytest.approx(evals.evaluate_on_dataset(toy, batches(toy, 3)))


# --- indirect objects -------------------------------------------------------------------------------------------------


def test_sentences_are_made_of_template_names_and_nouns(tokenizer: Any) -> None:
    data = IOIDataset(
        tokenizer,
        templates=["[B] and [A] saw the [THING]. [B] gave it to [A]"],
        names=["Mary", "John"],
        nouns={"THING": ["dog"]},
        num_samples=12,
        seed=0,
    )
    assert len(data) == 12
    for sample in data.samples:
        io, s = sample["IO"].strip(), sample["S"].strip()
        assert {io, s} == {"Mary", "John"}
        assert sample["text"] == f"{s} and {io} saw the dog. {s} gave it to {io}"
    assert len({sample["IO"] for sample in data.samples}) == 2


def test_items_are_tokens(tokenizer: Any) -> None:
    data = IOIDataset(tokenizer, num_samples=1, seed=0)
    sample, item = data.samples[0], data[0]
    assert item["prompt"].tolist() == [tokenizer.bos_token_id, *tokenizer.encode(sample["text"])]
    assert item["IO"].tolist() == tokenizer.encode(sample["IO"])
    assert item["S"].tolist() == tokenizer.encode(sample["S"])
    without = IOIDataset(tokenizer, num_samples=1, seed=0, prepend_bos=False)
    assert without[0]["prompt"].tolist() == item["prompt"].tolist()[1:]


def test_a_seed_gives_the_same_sentences_and_leaves_python_alone(tokenizer: Any) -> None:
    import random

    random.seed(7)
    expected = random.random()
    random.seed(7)
    first = IOIDataset(tokenizer, num_samples=20, seed=1).samples
    assert random.random() == expected
    assert first == IOIDataset(tokenizer, num_samples=20, seed=1).samples
    assert first != IOIDataset(tokenizer, num_samples=20, seed=2).samples


def test_symmetric_sentences_come_in_twins(tokenizer: Any) -> None:
    samples = IOIDataset(tokenizer, num_samples=10, symmetric=True, seed=0).samples
    assert len(samples) == 10
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        assert (one["IO"], one["S"]) == (other["S"], other["IO"])
        swapped = one["text"].translate(str.maketrans({"J": "M", "M": "J"}))
        assert swapped.replace("Mohn", "Mary").replace("Jary", "John") == other["text"]


def test_ioi_eval_by_hand(toy: Any) -> None:
    data = IOIDataset(toy.tokenizer, num_samples=11, seed=0)
    differences = []
    for index in range(len(data)):
        item = data[index]
        last = toy(item["prompt"])[0, -2]
        differences.append((last[item["IO"][-1]] - last[item["S"][-1]]).item())
    result = ioi_eval(toy, data, batch_size=4)
    assert result["Logit Difference"] == pytest.approx(sum(differences) / 11, rel=1e-4)
    assert result["Accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 11)


def test_ioi_eval_makes_its_own_sentences(toy: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(IOIDataset):
        def __init__(self, tokenizer: Any, **options: Any) -> None:
            made.append((tokenizer, options))
            super().__init__(tokenizer, **options)

    monkeypatch.setattr(evals, "IOIDataset", Counted)
    assert set(ioi_eval(toy, num_samples=4, symmetric=True)) == {"Logit Difference", "Accuracy"}
    assert made == [(toy.tokenizer, {"num_samples": 4, "symmetric": True})]


class Uniform:
    """A model whose logits at position i are those of the token that it is told to expect at i + 1."""

    def __init__(self, expected: list[int], d_vocab: int = 20) -> None:
        self.cfg = type("Cfg", (), {"device": "cpu"})()
        self.expected, self.d_vocab = expected, d_vocab

    def __call__(self, tokens: torch.Tensor, return_type: str) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, self.d_vocab)
        for position, token in enumerate(self.expected):
            logits[:, position, token] = 1.0
        return logits


@pytest.mark.parametrize(
    ("io", "s", "where"),
    [([5], [6], 3), ([5, 7], [6, 7], 2), ([5, 7], [5, 8], 3), ([5, 7], [6], 2), ([5, 7, 9], [5, 8], 2)],
)
def test_names_of_several_tokens_are_compared_where_they_first_differ(io: list[int], s: list[int], where: int) -> None:
    prompt = torch.tensor([1, 2, 3, 4, 5][: 5 - len(io)] + io)
    differs = next(index for index in range(min(len(io), len(s))) if io[index] != s[index])
    expected = [0, 0, 0, 0, 0]
    expected[where] = io[differs]
    item = {"prompt": prompt, "IO": torch.tensor(io), "S": torch.tensor(s)}
    assert ioi_eval(Uniform(expected), [item]) == {"Logit Difference": 1.0, "Accuracy": 1.0}


def test_names_that_do_not_differ_are_refused() -> None:
    same = torch.tensor([5])
    with pytest.raises(IndexError, match="do not differ"):
        ioi_eval(Uniform([0]), [{"prompt": torch.tensor([1, 5]), "IO": same, "S": same}])


# --- MMLU -------------------------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": f"What is {n} + {n}?", "choices": ["1", "2", "3", "4"], "answer": n % 4, "other": 0} for n in range(6)
]


def test_the_subjects_of_mmlu() -> None:
    assert len(evals.MMLU_SUBJECTS) == len(set(evals.MMLU_SUBJECTS)) == 57


def test_mmlu_questions_by_subject(hub: Any) -> None:
    asked = hub(QUESTIONS)
    found = evals.make_mmlu_data_loader(["virology", "anatomy"], split="dev", num_samples=2)
    assert asked == [(("cais/mmlu", s), {"split": "dev"}) for s in ("virology", "anatomy")]
    assert [row["subject"] for row in found] == ["virology"] * 2 + ["anatomy"] * 2
    assert all(set(row) == {"question", "choices", "answer", "subject"} for row in found)
    assert len(evals.make_mmlu_data_loader("virology", num_samples=50)) == len(QUESTIONS)
    asked.clear()
    evals.make_mmlu_data_loader(num_samples=1)
    assert [args[1] for args, _ in asked] == evals.MMLU_SUBJECTS


def test_a_subject_that_is_not_there_is_left_out_with_a_warning(hub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(_: str, subject: str) -> Any:
        if subject == "virology":
            raise DatasetNotFoundError("gone")
        return QUESTIONS

    hub(answer)
    found = evals.make_mmlu_data_loader(["virology", "anatomy"])
    assert {row["subject"] for row in found} == {"anatomy"}
    assert "Could not load subject 'virology': gone" in capsys.readouterr().out


def test_when_no_subject_is_there_the_error_is_raised(hub: Any, toy: Any) -> None:
    hub(DatasetNotFoundError("offline"))
    with pytest.raises(ValueError, match="offline"):
        evals.mmlu_eval(toy, subjects=["virology", "anatomy"])


def test_an_unknown_subject_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid subject.*astrology"):
        evals.make_mmlu_data_loader("astrology")


def test_mmlu_eval_compares_the_letters(toy: Any, hub: Any) -> None:
    hub(lambda _, subject: QUESTIONS[:4] if subject == "anatomy" else QUESTIONS[4:])
    result = evals.mmlu_eval(toy, subjects=["anatomy", "virology"])
    letters = [toy.tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in "ABCD"]
    ids = [
        spaced[0] if len(spaced) == 1 else toy.tokenizer.encode(letter, add_special_tokens=False)[0]
        for letter, spaced in zip("ABCD", letters, strict=True)
    ]
    right = []
    for row in QUESTIONS:
        text = f"Question: {row['question']}\nChoices:\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        last = toy(toy.tokenizer.encode(text, return_tensors="pt"))[0, -1]
        right.append(int(last[ids].argmax()) == row["answer"])
    assert 0 < sum(right) < 6
    assert result == {
        "accuracy": sum(right) / 6,
        "num_correct": sum(right),
        "num_total": 6,
        "subject_scores": {"anatomy": sum(right[:4]) / 4, "virology": sum(right[4:]) / 2},
    }


def test_mmlu_without_questions_is_an_error(toy: Any, hub: Any) -> None:
    hub([])
    with pytest.raises(ValueError, match="No MMLU data loaded"):
        evals.mmlu_eval(toy, subjects="anatomy")
