"""Which examples are looked at in LIT?

Datasets are lists of dicts with a "text"; what else an example holds is told to LIT by ``spec``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _nlp
from .constants import INPUT_FIELDS


@dataclass
class DatasetConfig:
    """How many examples are taken, and in which order."""

    max_examples: int | None = None
    shuffle: bool = False
    seed: int = 42


class _Examples(_nlp.Dataset):
    """A list of examples with a name.

    Raises:
        ImportError: if LIT is not installed.
    """

    #: What ``description`` calls them.
    _kind = "examples"

    def __init__(self, examples: list[dict[str, Any]] | None, name: str) -> None:
        _nlp.require()
        self._examples: list[dict[str, Any]] = examples or []
        self._name = name

    @property
    def examples(self) -> list[dict[str, Any]]:
        """All examples."""
        return self._examples

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._examples)

    def description(self) -> str:
        """Name and number of examples."""
        return f"{self._name}: {len(self._examples)} {self._kind}"


class SimpleTextDataset(_Examples):
    """Texts.

    Raises:
        ValueError: if an example has no "text".
    """

    def __init__(self, examples: list[dict[str, Any]] | None = None, name: str = "SimpleTextDataset") -> None:
        super().__init__(examples, name)
        for number, example in enumerate(self._examples):
            if INPUT_FIELDS.TEXT not in example:
                raise ValueError(f"example {number} has no {INPUT_FIELDS.TEXT!r}, only {', '.join(example)}")

    def spec(self) -> dict[str, Any]:
        """LIT's type of each field."""
        return {INPUT_FIELDS.TEXT: _nlp.types().TextSegment()}

    @classmethod
    def from_strings(cls, texts: Sequence[str], name: str = "TextDataset") -> SimpleTextDataset:
        """One example for each text."""
        return cls([{INPUT_FIELDS.TEXT: text} for text in texts], name=name)

    @classmethod
    def from_file(
        cls, filepath: str | Path, name: str | None = None, max_examples: int | None = None
    ) -> SimpleTextDataset:
        """One example for each line that is not blank, of the first ``max_examples`` lines."""
        path = Path(filepath)
        lines = path.read_text(encoding="utf-8").splitlines()[:max_examples]
        return cls.from_strings(
            [line.strip() for line in lines if line.strip()], name=path.stem if name is None else name
        )


class PromptCompletionDataset(_Examples):
    """Prompts with what should follow; "text" is both together.

    Raises:
        ValueError: if an example has no "prompt".
    """

    PROMPT_FIELD = "prompt"
    COMPLETION_FIELD = "completion"
    FULL_TEXT_FIELD = "text"
    _kind = "prompt-completion pairs"

    def __init__(self, examples: list[dict[str, Any]] | None = None, name: str = "PromptCompletionDataset") -> None:
        super().__init__([self._completed(example) for example in examples or []], name)

    def _completed(self, example: dict[str, Any]) -> dict[str, Any]:
        if self.PROMPT_FIELD not in example:
            raise ValueError(f"an example has no {self.PROMPT_FIELD!r}, only {', '.join(example)}")
        completion = example.get(self.COMPLETION_FIELD, "")
        text = example[self.PROMPT_FIELD] + completion
        return {**example, self.COMPLETION_FIELD: completion, self.FULL_TEXT_FIELD: text}

    def spec(self) -> dict[str, Any]:
        """LIT's type of each field."""
        names = (self.PROMPT_FIELD, self.COMPLETION_FIELD, self.FULL_TEXT_FIELD)
        return {name: _nlp.types().TextSegment() for name in names}

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[tuple[str, str]], name: str = "PromptCompletionDataset"
    ) -> PromptCompletionDataset:
        """One example for each (prompt, completion)."""
        return cls([{cls.PROMPT_FIELD: prompt, cls.COMPLETION_FIELD: completion} for prompt, completion in pairs], name)


class IOIDataset(_Examples):
    """Indirect object identification (Wang et al. 2022, https://arxiv.org/abs/2211.00593).

    ``name1`` gives something to ``name2``, who is the ``answer``.
    """

    NAMES = "Mary John Alice Bob Charlie Diana Emma Frank Grace Henry Ivy Jack".split()
    PLACES = "store park beach restaurant library museum cafe market school hospital".split()
    OBJECTS = "book gift letter key phone drink flower card ticket bag".split()
    TEMPLATE = "When {name1} and {name2} went to the {place}, {name1} gave a {object} to"
    _kind = "IOI examples"

    def __init__(self, examples: list[dict[str, Any]] | None = None, name: str = "IOI Dataset") -> None:
        super().__init__(examples, name)

    def spec(self) -> dict[str, Any]:
        """LIT's type of each field."""
        types = _nlp.types()
        labels = ("name1", "name2", "place", "object", "answer")
        return {INPUT_FIELDS.TEXT: types.TextSegment(), **{label: types.CategoryLabel() for label in labels}}

    def add_example(self, name1: str, name2: str, place: str, obj: str) -> None:
        """Add the sentence in which ``name1`` gives ``obj`` to ``name2``."""
        parts = {"name1": name1, "name2": name2, "place": place, "object": obj}
        self._examples.append({INPUT_FIELDS.TEXT: self.TEMPLATE.format(**parts), **parts, "answer": name2})

    @classmethod
    def generate(cls, n_examples: int = 100, seed: int = 42, name: str = "IOI Dataset") -> IOIDataset:
        """Random sentences, the same for the same ``seed`` (and the same as TransformerLens')."""
        draw, dataset = random.Random(seed), cls(name=name)
        for _ in range(n_examples):
            first, second = draw.sample(cls.NAMES, 2)
            dataset.add_example(first, second, draw.choice(cls.PLACES), draw.choice(cls.OBJECTS))
        return dataset


class InductionDataset(_Examples):
    """Texts that begin to repeat themselves (Olsson et al. 2022, https://arxiv.org/abs/2209.11895)."""

    #: How a pattern begins, and how it goes on.
    PATTERNS = (
        ("The cat sat", "on the mat"), ("Hello my name", "is Alice"), ("The quick brown", "fox jumps"),
        ("Once upon a", "time there"), ("In the beginning", "was the"), ("To be or", "not to"),
        ("The sun rises", "in the"), ("Water flows down", "the hill"),
    )  # fmt: skip
    CONNECTORS = ("Then, later,", "After that,", "Subsequently,", "Next,")
    _kind = "induction examples"

    def __init__(self, examples: list[dict[str, Any]] | None = None, name: str = "Induction Dataset") -> None:
        super().__init__(examples, name)

    def spec(self) -> dict[str, Any]:
        """LIT's type of each field."""
        names = (INPUT_FIELDS.TEXT, "pattern", "expected_completion")
        return {name: _nlp.types().TextSegment() for name in names}

    def add_example(self, pattern: str, repeated_text: str, completion: str) -> None:
        """Add a pattern, what connects, and the pattern's first word again."""
        text = f"{pattern} {repeated_text} {pattern.split()[0]}"
        self._examples.append({INPUT_FIELDS.TEXT: text, "pattern": pattern, "expected_completion": completion})

    @classmethod
    def generate_simple(cls, n_examples: int = 50, seed: int = 42, name: str = "Induction Dataset") -> InductionDataset:
        """The patterns in turn, connected at random, the same for the same ``seed`` (and as TransformerLens')."""
        draw, dataset = random.Random(seed), cls(name=name)
        for number in range(n_examples):
            start, end = cls.PATTERNS[number % len(cls.PATTERNS)]
            dataset.add_example(f"{start} {end}", draw.choice(cls.CONNECTORS), end)
        return dataset


class LITDatasetWrapper(_Examples):
    """A dataset whose examples, fields and description are given, as `wrap_for_lit` makes it."""

    def __init__(self, examples: list[dict[str, Any]], spec_dict: dict[str, Any], name: str) -> None:
        super().__init__(examples, name)
        self._spec_dict = spec_dict

    @classmethod
    def init_spec(cls) -> None:
        """None: LIT's page cannot make one."""
        return None

    def spec(self) -> dict[str, Any]:
        """LIT's type of each field."""
        return self._spec_dict

    def description(self) -> str:
        """The name as it was given."""
        return self._name


def wrap_for_lit(dataset: Any) -> LITDatasetWrapper:
    """One of the datasets of this module, as it is now, for LIT to hold.

    Raises:
        ImportError: if LIT is not installed.
    """
    return LITDatasetWrapper(list(dataset.examples), dataset.spec(), dataset.description())
