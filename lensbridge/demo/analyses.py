"""In what order are the three analyses run, on which inputs, and which of them can this model take?

Induction needs nothing but tokens. The other two need names that are single tokens, so a model without a tokenizer, or
with one that splits names, is told why they are left out instead of being shown numbers that mean nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int

from lensbridge.assets.prompts import HELD_OUT_TEMPLATES, TEMPLATES, ioi_prompts, repeated_tokens
from lensbridge.demo.induction import InductionResult, run_induction
from lensbridge.demo.ioi import IoiResult, run_ioi
from lensbridge.demo.layout import PromptGroup, group_prompts, single_token_names
from lensbridge.demo.patching_sweep import SweepResult, run_sweep
from lensbridge.errors import UnsupportedModelError

if TYPE_CHECKING:
    from lensbridge.model import HookedTransformer

#: Names needed before prompts are made of them: fewer give the same few prompts again and again.
FEWEST_NAMES = 10
#: Prompts needed for the patching sweep.
FEWEST_PROMPTS = 2
#: Few templates, so that prompts of one layout are many; the last two are none that the bundled model was trained on.
DEMO_TEMPLATES = (*TEMPLATES[:2], *HELD_OUT_TEMPLATES[:2])


@dataclass(frozen=True)
class Size:
    """How much is measured: rows of repeated tokens, their period, prompts for IOI and for patching."""

    rows: int
    period: int
    prompts: int
    patched_prompts: int


FULL = Size(rows=16, period=50, prompts=96, patched_prompts=24)
QUICK = Size(rows=4, period=25, prompts=24, patched_prompts=6)


@dataclass(frozen=True)
class About:
    """What was run, for whoever reads the numbers later."""

    model: str
    n_layers: int
    n_heads: int
    d_model: int
    n_parameters: int
    device: str
    dtype: str
    seed: int
    quick: bool
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """All three analyses; ``ioi`` and ``sweep`` are None where this model cannot take them; ``left_out`` says why."""

    about: About
    induction: InductionResult
    ioi: IoiResult | None
    sweep: SweepResult | None
    left_out: str = ""


def run_demo(
    model: HookedTransformer, name: str, *, seed: int = 0, quick: bool = False, progress: bool = False
) -> DemoResult:
    """Run the analyses that ``model`` can take. ``quick`` measures on fewer inputs; ``progress`` shows bars.

    Raises:
        UnsupportedModelError: if the model's context is too short to hold anything twice.
    """
    size = QUICK if quick else FULL
    began = time.monotonic()
    tokens, period = random_rows(model, size, seed)
    induction = run_induction(model, tokens, period, seed=seed)
    groups, n_unusable, left_out = prompt_groups(model, size, seed)
    ioi = run_ioi(model, groups, n_unusable=n_unusable) if groups else None
    sweep = run_sweep(model, groups[0].first(size.patched_prompts), progress=progress) if groups else None
    about = About(
        model=name,
        n_layers=model.cfg.n_layers,
        n_heads=model.cfg.n_heads,
        d_model=model.cfg.d_model,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=str(model.cfg.device),
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        seed=seed,
        quick=quick,
        seconds=time.monotonic() - began,
    )
    return DemoResult(about, induction, ioi, sweep, left_out)


def random_rows(model: HookedTransformer, size: Size, seed: int) -> tuple[Int[torch.Tensor, "batch pos"], int]:
    """Rows of random tokens that come twice, without special tokens inside, and the length of one copy."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        ids, bos = torch.arange(model.cfg.d_vocab), None
    else:
        # The embedding may be padded beyond the tokenizer's last id, and padding is never trained.
        special = set(tokenizer.all_special_ids)
        ids = torch.tensor([token for token in range(min(model.cfg.d_vocab, len(tokenizer))) if token not in special])
        bos = tokenizer.bos_token_id if model.cfg.default_prepend_bos else None
    period = min(size.period, (model.cfg.n_ctx - (bos is not None)) // 2)
    if period < 2:
        raise UnsupportedModelError(
            f"The demo needs a context of at least 5 tokens to hold a sequence twice; this model has "
            f"n_ctx={model.cfg.n_ctx}."
        )
    rows = repeated_tokens(ids, size.rows, period, bos, torch.Generator().manual_seed(seed))
    return rows.to(model.cfg.device), period


def prompt_groups(model: HookedTransformer, size: Size, seed: int) -> tuple[list[PromptGroup], int, str]:
    """Groups of prompts for this model, how many prompts did not fit, and why there are none if there are none."""
    if model.tokenizer is None:
        return (
            [],
            0,
            "This model has no tokenizer, so it cannot be given prompts with names; only induction is measured.",
        )
    names = single_token_names(model)
    if len(names) < FEWEST_NAMES:
        reason = (
            f"Only {len(names)} of the demo's names are a single token in this model's tokenizer and at least "
            f"{FEWEST_NAMES} are needed, so indirect objects and patching are left out."
        )
        return [], 0, reason
    # For the bundled model, pairs of names that it was not trained on; for any other they are as good.
    prompts = ioi_prompts(size.prompts, seed, names=list(names), templates=DEMO_TEMPLATES, pairs="held_out")
    groups = [group for group in group_prompts(model, prompts, names) if group.clean.shape[1] <= model.cfg.n_ctx]
    n_unusable = len(prompts) - sum(map(len, groups))
    if not groups or len(groups[0]) < FEWEST_PROMPTS:
        reason = f"None of {len(prompts)} prompts keeps its names in single tokens within {model.cfg.n_ctx} tokens."
        return [], n_unusable, f"{reason} Indirect objects and patching are left out."
    return groups, n_unusable, ""
