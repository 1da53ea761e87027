"""Which tokens does a comparison run on?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checking.subject import Subject
from ..errors import LensbridgeError

#: Prose, a repetition, and something that is neither words nor sentences.
PROMPTS = (
    "When Mary and John went to the store, John gave a drink to",
    "The cat sat on the mat, and then the cat sat on the mat again.",
    "def add(a, b):\n    return a + b  # 12 + 30 = 42",
)
#: Lengths of the rows of random tokens for a model without a tokenizer, and how many rows each batch has.
RANDOM_LENGTHS = (9, 16)
ROWS = 2
#: Prompts are cut to this many tokens if the model takes no less: caches of everything grow with the square.
LONGEST = 256


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are left out.

    Raises:
        LensbridgeError: if there is none.
    """
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise LensbridgeError(f"there is no prompt in {path}: it should have one a line")
    return found


def token_batches(model: Any, prompts: Sequence[str] | None) -> list[tuple[str, Tensor]]:
    """What to run on: (how it is called, tokens ``[batch, pos]``) of each prompt.

    Without a tokenizer, random tokens; each prompt is a run of its own, so that nothing is padded.

    Raises:
        LensbridgeError: if prompts are given for a model without a tokenizer, or one has no tokens.
    """
    if model.tokenizer is None or model.interior.architecture.rows is not None:
        if prompts is not None:
            raise LensbridgeError("this model has no tokenizer and takes no --prompt; without one, tokens are random")
        subject = Subject(model)
        lengths = [min(length, model.cfg.n_ctx) for length in RANDOM_LENGTHS]
        return [(f"{ROWS} x {n} random tokens", subject.draw(ROWS, n, seed)) for seed, n in enumerate(lengths)]
    found = []
    for prompt in PROMPTS if prompts is None else prompts:
        tokens = model.to_tokens(prompt)[:, : min(LONGEST, model.cfg.n_ctx)]
        if not tokens.numel():
            raise LensbridgeError(f"the prompt {prompt!r} has no tokens")
        found.append((prompt, tokens))
    return found
