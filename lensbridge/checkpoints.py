"""Which of a model's training checkpoints is meant?

A checkpoint has a place in the list of all that were published and a label: the training step, or the number of tokens
seen. Either says which one; a config records both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its place in the list, its label, and whether that counts a "step" or a "token"."""

    index: int
    value: int
    kind: str

    def fields(self) -> dict[str, Any]:
        """The fields of a config that record it."""
        return {
            "from_checkpoint": True,
            "checkpoint_index": self.index,
            "checkpoint_value": self.value,
            "checkpoint_label_type": self.kind,
        }


@dataclass(frozen=True)
class Labels:
    """The labels of all checkpoints of a model, in the order in which an index counts them.

    Args:
        values: what they are.
        kind: "step" or "token", what they count.
    """

    values: Sequence[int]
    kind: str

    def choose(self, model: str, index: int | None, value: int | None) -> Checkpoint:
        """The checkpoint of an index (from the end if negative) or of a label; ``model`` is what messages call it.

        Raises:
            IndexError: there are not so many.
            AssertionError: none has this label.
            ValueError: index and label are two different ones'.
        """
        values = list(self.values)
        if index is None:
            if value not in values:
                raise AssertionError(f"{model} has no checkpoint at {self.kind} {value}; {self._nearby(value)}")
            assert value is not None
            return Checkpoint(values.index(value), value, self.kind)
        if not -len(values) <= index < len(values):
            raise IndexError(
                f"{model} has {len(values)} checkpoints, so none at index {index}: "
                f"index 0 is {self.kind} {values[0]}, index {len(values) - 1} is {self.kind} {values[-1]}"
            )
        if value not in (None, values[index]):
            raise ValueError(
                f"checkpoint_index={index} of {model} is {self.kind} {values[index]}, not {value}: "
                "give one of checkpoint_index and checkpoint_value"
            )
        return Checkpoint(index % len(values), values[index], self.kind)

    def _nearby(self, value: int | None) -> str:
        known = sorted(self.values)
        at = bisect_left(known, value or 0)
        near = [f"{each} (checkpoint_index={list(self.values).index(each)})" for each in known[max(at - 1, 0) : at + 1]]
        return f"the closest are {' and '.join(near)}" if len(near) > 1 else f"the closest is {near[0]}"
