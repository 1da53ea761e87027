"""What do a forward pass, a hook and a cache take, in each tool?

Each tool loads the model in a process of its own, one after the other, and is timed on the same tokens with the same
number of threads; the median of the rounds counts. Memory is that of the process: what the weights take, each storage
once, and the largest resident set up to the end, imports included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .children import Loading, ask, why_no_reference
from .huggingface import Step
from .result import HUGGINGFACE, REFERENCE, Cost

TASKS = ("forward", "one hook", "cache of everything")


def costs_of(
    model: Any,
    batches: Sequence[tuple[str, Tensor]],
    loading: Loading,
    folder: Path,
    *,
    processing: bool,
    rounds: int,
    reference: bool,
    step: Step = lambda what: None,
) -> list[Cost]:
    """Time and memory of plain HuggingFace, lensbridge and, if asked for, TransformerLens, on the longest prompt.

    Args:
        processing: whether the two load the model with their default processing.
        rounds: how often each task is timed, unless it takes seconds.
    """
    middle = model.cfg.n_layers // 2
    tools = [(HUGGINGFACE, "HuggingFace"), ("lensbridge", "lensbridge")]
    if reference:
        tools.append((REFERENCE, "TransformerLens"))
    found = []
    longest = max((tokens for _, tokens in batches), key=lambda tokens: tokens.numel())
    for title, tool in tools:
        step(f"time and memory, {title}")
        missing = why_no_reference() if tool == "TransformerLens" else None
        if missing is not None:
            found.append(Cost(title, problem=missing))
            continue
        answer = ask(
            loading,
            folder,
            f"measure-{tool}",
            task="measure",
            tool=tool,
            processing=processing,
            tokens=longest.tolist(),
            rounds=rounds,
            point=hooked_point(model, middle),
            path=model.interior.architecture.layer(middle) if model.cfg.n_layers else "",
        )
        found.append(cost_of(title, answer))
    return found


def hooked_point(model: Any, layer: int) -> str:
    """The point that the timed hook is at: the stream behind a layer in the middle, or the nearest thing there is."""
    wanted = (f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_resid_pre", "hook_embed")
    points = set(model.interior.points())
    return next((name for name in wanted if name in points), "unembed.hook_out")


def cost_of(title: str, answer: dict[str, Any]) -> Cost:
    """What a process answered, as plain data."""
    if "problem" in answer:
        return Cost(title, problem=answer["problem"])
    return Cost(
        title,
        answer["milliseconds"],
        answer["fastest"],
        answer["mebibytes"],
        answer["load_seconds"],
    )
