"""How good is a model, roughly and quickly?

Losses on well-known texts, on repeated random tokens and on one paragraph, and two tasks with right answers: indirect
objects and MMLU. Each is meant for comparing models in minutes; published numbers take more care. The data sets come
from HuggingFace's hub when they are asked for; `evaluate_on_dataset` and `ioi_eval` take data of one's own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .hub_datasets import load_dataset
from .utilities.defaults_utils import override_or_use_default_value
from .utilities.devices import warn_if_mps
from .utilities.lm_utils import lm_cross_entropy_loss
from .utilities.tokenize_utils import tokenize_and_concatenate

#: The first sentences of "Zoom In: An Introduction to Circuits" (Olah et al. 2020, https://distill.pub, CC BY 4.0).
PARAGRAPH = (
    "Many important transition points in the history of science have been moments when science 'zoomed in.' At these "
    "points, we develop a visualization or tool that allows us to see the world in a new level of detail, and a new "
    "field of science develops to study the world through this lens."
)

#: The subjects of MMLU.
MMLU_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions
""".split()
MMLU_ANSWER_LETTERS = ["A", "B", "C", "D"]


def sanity_check(model: Any) -> Float[torch.Tensor, ""]:
    """The loss, in nats per token, on one paragraph: below 5 for a working model of English, above 7 for none."""
    return model(PARAGRAPH, return_type="loss")


# --- losses on texts --------------------------------------------------------------------------------------------------


def _text_loader(tokenizer: Any, batch_size: int, *which: str, column: str = "text") -> DataLoader:
    texts = load_dataset(*which, split="train")
    print(len(texts))
    rows: Any = tokenize_and_concatenate(texts, tokenizer, column_name=column)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True)


def make_wiki_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """Rows of 1024 tokens of WikiText-2's training part (Merity et al. 2016); each loader shuffles its rows.

    Raises:
        DatasetNotFoundError: (an OSError) if the hub cannot be reached, as for every loader here.
    """
    return _text_loader(tokenizer, batch_size, "wikitext", "wikitext-2-v1")


def make_owt_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """Rows of 1024 tokens of 10,000 documents of OpenWebText, an open copy of GPT-2's training data."""
    return _text_loader(tokenizer, batch_size, "stas/openwebtext-10k")


def make_pile_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """Rows of 1024 tokens of the first 10,000 documents of the Pile (Gao et al. 2020)."""
    return _text_loader(tokenizer, batch_size, "NeelNanda/pile-10k")


def make_code_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """Rows of 1024 tokens of CodeParrot's validation part, which is Python code."""
    return _text_loader(tokenizer, batch_size, "codeparrot/codeparrot-valid-v2-near-dedup", column="content")


DATASET_NAMES = ["wiki", "owt", "pile", "code"]
DATASET_LOADERS = [make_wiki_data_loader, make_owt_data_loader, make_pile_data_loader, make_code_data_loader]


def _device_for(model: Any, device: str | torch.device) -> str | torch.device:
    """``device``, or the model's where "cuda", the default of TransformerLens, is not there."""
    warn_if_mps(device)
    return model.cfg.device if str(device).startswith("cuda") and not torch.cuda.is_available() else device


@torch.inference_mode()
def evaluate_on_dataset(
    model: Any, data_loader: Iterable[dict[str, torch.Tensor]], truncate: int = 100, device: str | torch.device = "cuda"
) -> float:
    """The mean loss over the batches of a loader, each a dict with tokens ``[batch, pos]`` under ``"tokens"``.

    As in TransformerLens, evaluation ends after ``truncate + 1`` batches. Without a GPU, the default ``device`` means
    the model's own.

    Raises:
        ValueError: if the loader is empty.
    """
    device = _device_for(model, device)
    losses = []
    for batch in tqdm(data_loader):
        losses.append(model(batch["tokens"].to(device), return_type="loss").mean().item())
        if len(losses) > truncate:
            break
    if not losses:
        raise ValueError("the data loader gave no batch: with drop_last=True it needs at least batch_size rows")
    return sum(losses) / len(losses)


@torch.inference_mode()
def induction_loss(
    model: Any,
    tokenizer: Any = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    device: str | torch.device = "cuda",
) -> Float[torch.Tensor, ""]:
    """The loss on the second half of random tokens that come twice: low in a model with induction heads.

    Tokens are drawn from 100 to 20,000, or to the end of a smaller vocabulary; a row has ``2 * subseq_len`` of them,
    the first replaced by BOS unless ``prepend_bos`` is False (None: the model's default). Without a GPU, the default
    ``device`` means the model's own. Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    device = _device_for(model, device)
    vocabulary = model.cfg.d_vocab
    first = min(100, vocabulary // 2)
    half = torch.randint(first, min(20000, vocabulary), (batch_size, subseq_len)).to(device)
    tokens = half.repeat(1, 2)
    if override_or_use_default_value(model.cfg.default_prepend_bos, override=prepend_bos):
        tokens[:, 0] = (tokenizer or model.required_tokenizer()).bos_token_id
    losses = lm_cross_entropy_loss(model(tokens, return_type="logits"), tokens, per_token=True)
    return losses[:, subseq_len + 1 :].mean()


@torch.inference_mode()
def evaluate(model: Any, truncate: int = 100, batch_size: int = 8, tokenizer: Any = None) -> dict[str, float]:
    """The losses on the four data sets, as ``{"wiki_loss": ..., "owt_loss": ..., "pile_loss": ..., "code_loss": ...}``.

    Raises:
        DatasetNotFoundError: (an OSError) if the hub cannot be reached.
    """
    tokenizer = tokenizer or model.required_tokenizer()
    losses = {}
    for name, make_loader in zip(DATASET_NAMES, DATASET_LOADERS, strict=True):
        loss = evaluate_on_dataset(model, make_loader(tokenizer=tokenizer, batch_size=batch_size), truncate=truncate)
        print(f"{name}: {loss}")
        losses[f"{name}_loss"] = loss
    return losses


# --- indirect objects -------------------------------------------------------------------------------------------------


class IOIDataset(Dataset):
    """Sentences whose last word is the indirect object (Wang et al. 2022, "Interpretability in the Wild").

    An item is a dict: the tokens of the whole sentence under "prompt", and those of the two names, each with a space in
    front, under "IO" (the indirect object, which ends the sentence) and "S" (the subject). The tokenizer is used as it
    is, and may put a BOS token of its own before each.

    Args:
        tokenizer: a HuggingFace tokenizer.
        templates: sentences with ``[A]`` (the indirect object), ``[B]`` (the subject) and the keys of ``nouns``.
        names: what ``[A]`` and ``[B]`` are drawn from.
        nouns: placeholder -> words to draw from.
        num_samples: how many sentences.
        symmetric: whether each sentence comes with its twin, in which the names are exchanged.
        prepend_bos: whether "prompt" gets a BOS token in front.
        seed: for the same sentences every time; None draws from Python's ``random``.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: list[str] | None = None,
        names: list[str] | None = None,
        nouns: dict[str, list[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self._random: Any = random if seed is None else random.Random(seed)
        self.templates = self.get_default_templates() if templates is None else templates
        self.names = self.get_default_names() if names is None else names
        self.nouns = self.get_default_nouns() if nouns is None else nouns
        self.samples: list[dict[str, str]] = []
        for _ in range(num_samples // 2 if symmetric else num_samples):
            self.samples.extend(self.get_sample(symmetric=symmetric))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample = self.samples[idx]
        tokens = {key: self.tokenizer.encode(sample[key]) for key in ("text", "IO", "S")}
        if self.prepend_bos:
            tokens["text"] = [self.tokenizer.bos_token_id, *tokens["text"]]
        return {"prompt" if key == "text" else key: torch.tensor(ids).long() for key, ids in tokens.items()}

    def get_sample(self, symmetric: bool = False) -> list[dict[str, str]]:
        """One sentence as ``{"text": ..., "IO": ..., "S": ...}``, with its twin if ``symmetric``."""
        template = self._random.choice(self.templates)
        for placeholder, words in self.nouns.items():
            template = template.replace(f"[{placeholder}]", self._random.choice(words))
        first, second = self._random.sample(self.names, 2)
        pairs = [(first, second), (second, first)] if symmetric else [(first, second)]
        return [
            {"text": template.replace("[A]", io).replace("[B]", s), "IO": f" {io}", "S": f" {s}"} for io, s in pairs
        ]

    @staticmethod
    def get_default_names() -> list[str]:
        """John and Mary."""
        return ["John", "Mary"]

    @staticmethod
    def get_default_templates() -> list[str]:
        """Two sentences: the names in both orders."""
        return [
            "[A] and [B] went to the [LOCATION] to buy [OBJECT]. [B] handed the [OBJECT] to [A]",
            "Then, [B] and [A] went to the [LOCATION]. [B] gave the [OBJECT] to [A]",
        ]

    @staticmethod
    def get_default_nouns() -> dict[str, list[str]]:
        """Two places and three objects."""
        return {"LOCATION": ["store", "market"], "OBJECT": ["milk", "eggs", "bread"]}


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    prompts = [sample["prompt"] for sample in samples]
    return {
        "prompt": torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
        "rows": samples,
    }


def _logit_difference(logits: Float[torch.Tensor, "pos d_vocab"], sample: dict[str, torch.Tensor]) -> float:
    """How much the first token that tells the names apart is preferred, where the indirect object's stands."""
    length = min(len(sample["IO"]), len(sample["S"]))
    differs = (sample["IO"][:length] != sample["S"][:length]).nonzero()
    if not len(differs):
        raise IndexError(f"the tokens of IO and S do not differ: {sample['IO'].tolist()} and {sample['S'].tolist()}")
    at = int(differs[0])
    before = len(sample["prompt"]) - len(sample["IO"]) + at - 1
    return float(logits[before, sample["IO"][at]] - logits[before, sample["S"][at]])


@torch.inference_mode()
def ioi_eval(
    model: Any,
    dataset: Any = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: Any = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """How well the model completes sentences with the indirect object rather than the subject.

    ``dataset`` is an `IOIDataset` or gives the same items; None makes one of ``num_samples`` sentences.

    Returns:
        "Logit Difference", the mean of logit(IO) - logit(S), and "Accuracy", the share of sentences where that is
        positive.
    """
    if dataset is None:
        dataset = IOIDataset(tokenizer or model.required_tokenizer(), num_samples=num_samples, symmetric=symmetric)
    differences: list[float] = []
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=_collate)):
        logits = model(batch["prompt"].to(model.cfg.device), return_type="logits")
        differences += [_logit_difference(row, sample) for row, sample in zip(logits, batch["rows"], strict=True)]
    n_right = sum(difference > 0 for difference in differences)
    return {"Logit Difference": sum(differences) / len(dataset), "Accuracy": n_right / len(dataset)}


# --- MMLU -------------------------------------------------------------------------------------------------------------


def make_mmlu_data_loader(
    subjects: str | list[str] | None = None, split: str = "test", num_samples: int | None = None
) -> list[dict[str, Any]]:
    """The questions of MMLU (Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding").

    Args:
        subjects: one of `MMLU_SUBJECTS`, several, or None for all.
        split: "test", "validation" or "dev".
        num_samples: at most so many of each subject.

    Returns:
        Dicts of "question", "choices" (four texts), "answer" (the index of the right one) and "subject". A subject
        that cannot be loaded is left out, with a warning.

    Raises:
        ValueError: for an unknown subject, or (as a DatasetNotFoundError) if no subject could be loaded.
    """
    wanted = MMLU_SUBJECTS if subjects is None else [subjects] if isinstance(subjects, str) else list(subjects)
    invalid = set(wanted) - set(MMLU_SUBJECTS)
    if invalid:
        raise ValueError(f"Invalid subject(s): {invalid}. Valid subjects: {', '.join(sorted(MMLU_SUBJECTS))}")
    questions: list[dict[str, Any]] = []
    failed: list[OSError] = []
    for subject in wanted:
        try:
            found = load_dataset("cais/mmlu", subject, split=split)
        except OSError as error:
            print(f"Warning: Could not load subject '{subject}': {error}")
            failed.append(error)
            continue
        count = len(found) if num_samples is None else min(num_samples, len(found))
        rows = (found[index] for index in range(count))
        questions += [
            {key: row[key] for key in ("question", "choices", "answer")} | {"subject": subject} for row in rows
        ]
    if failed and not questions:
        raise failed[0]
    print(f"Loaded {len(questions)} MMLU examples from {len(wanted)} subject(s)")
    return questions


def _mmlu_prompt(question: str, choices: list[str]) -> str:
    options = "".join(f"{chr(ord('A') + index)}. {choice}\n" for index, choice in enumerate(choices))
    return f"Question: {question}\nChoices:\n{options}Answer:"


def _letter_tokens(tokenizer: Any) -> list[int]:
    """The token of each answer letter: with a space in front where that is one token."""
    tokens = []
    for letter in MMLU_ANSWER_LETTERS:
        spaced = tokenizer.encode(f" {letter}", add_special_tokens=False)
        tokens.append(spaced[0] if len(spaced) == 1 else tokenizer.encode(letter, add_special_tokens=False)[0])
    return tokens


@torch.inference_mode()
def mmlu_eval(
    model: Any,
    tokenizer: Any = None,
    subjects: str | list[str] | None = None,
    split: str = "test",
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Accuracy on MMLU's multiple choice questions, without examples in the prompt (published numbers have five).

    The prompt shows the question and the lettered choices; the answer is the letter with the highest logit after it.
    Arguments as for `make_mmlu_data_loader`.

    Returns:
        "accuracy", "num_correct", "num_total", and "subject_scores" (subject -> accuracy).

    Raises:
        ValueError: if there are no questions.
    """
    tokenizer = tokenizer or model.required_tokenizer()
    questions = make_mmlu_data_loader(subjects=subjects, split=split, num_samples=num_samples)
    if not questions:
        raise ValueError("No MMLU data loaded. Check your subjects parameter.")
    letters = _letter_tokens(tokenizer)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for example in tqdm(questions, desc="Evaluating MMLU"):
        prompt = _mmlu_prompt(example["question"], example["choices"])
        tokens = tokenizer.encode(prompt, return_tensors="pt").to(model.cfg.device)
        last = model(tokens, return_type="logits")[0, -1]
        scores = last[letters[: len(example["choices"])]]
        total[example["subject"]] += 1
        right[example["subject"]] += int(scores.argmax()) == example["answer"]
    return {
        "accuracy": right.total() / total.total(),
        "num_correct": right.total(),
        "num_total": total.total(),
        "subject_scores": {subject: right[subject] / total[subject] for subject in total},
    }
