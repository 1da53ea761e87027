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

    Random tokens for a model without a tokenizer; each prompt is a run of its own, so that nothing is padded.

    Raises:
        LensbridgeError: if prompts are given that the model has no tokens for.
    """
    why = _why_no_text(model, PROMPTS[0] if prompts is None else prompts[0])
    if why is None:
        longest = min(LONGEST, model.cfg.n_ctx)
        return [(prompt, model.to_tokens(prompt)[:, :longest]) for prompt in (PROMPTS if prompts is None else prompts)]
    if prompts is not None:
        raise LensbridgeError(f"this model cannot be given a prompt: {why}. Without one, it runs on random tokens")
    subject = Subject(model)
    lengths = [min(length, model.cfg.n_ctx) for length in RANDOM_LENGTHS]
    return [(f"{ROWS} x {n} random tokens", subject.draw(ROWS, n, seed)) for seed, n in enumerate(lengths)]


def _why_no_text(model: Any, prompt: str) -> str | None:
    """Why a model cannot be given text; None if it can."""
    if model.tokenizer is None:
        return "it has no tokenizer"
    if model.interior.architecture.rows is not None:
        return "several rows of tokens make one text of it"
    # transformers makes up a tokenizer for some models that have none: it knows no words.
    tokens = model.to_tokens(prompt)
    if tokens.shape[1] < 2 or int(tokens.max()) >= model.cfg.d_vocab:
        return f"its tokenizer has no tokens for {prompt!r} that the model knows"
    return None
