"""Where, and through which heads, does the answer travel?

Activation patching (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Wang et al. 2022): the
model runs on a corrupted prompt while one activation is replaced by its value from the clean prompt. How much of the
clean logit difference comes back says whether that activation carries what the prompts differ in. Here they differ in
one token, the giver, so every value before that token is the same in both and needs no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from lensbridge.demo.heads import Head, Hook, ranked_heads
from lensbridge.demo.ioi import logit_difference
from lensbridge.demo.layout import PromptGroup
from lensbridge.utils import get_act_name

if TYPE_CHECKING:
    from lensbridge.activation_cache import ActivationCache
    from lensbridge.model import HookedTransformer

#: Below this distance (nats) between clean and corrupted logit difference, a fraction of it is mostly noise.
SMALLEST_GAP = 0.5


@dataclass(frozen=True)
class SweepResult:
    """The part of the clean logit difference that each patch brings back: 0 as corrupted, 1 as clean.

    ``resid`` has a row for the residual stream before each layer and one after the last; ``heads`` is the output of
    one head (``hook_z``) at all positions. Where the gap is below ``SMALLEST_GAP`` both tables hold NaN: see
    ``meaningful``.
    """

    n_prompts: int
    clean_prompt: str
    corrupted_prompt: str
    clean_difference: float
    corrupted_difference: float
    resid: Float[torch.Tensor, "layer_and_end pos"]
    resid_labels: list[str]
    position_labels: list[str]
    giver_position: int
    heads: Float[torch.Tensor, "layer head"]
    carriers: list[Head]

    @property
    def meaningful(self) -> bool:
        """Whether clean and corrupted prompts differ enough in the answer for fractions of it to mean anything."""
        return abs(self.clean_difference - self.corrupted_difference) >= SMALLEST_GAP


@torch.no_grad()
def run_sweep(model: HookedTransformer, group: PromptGroup, *, progress: bool = False, limit: int = 5) -> SweepResult:
    """Patch the residual stream at every layer and position, then every head, over one group of prompts.

    ``progress`` shows a bar for each table; ``limit`` is how many heads are named.
    """
    giver = group.name_positions[2]
    n_layers, n_heads, length = model.cfg.n_layers, model.cfg.n_heads, group.clean.shape[1]
    stream = [get_act_name("resid_pre", layer) for layer in range(n_layers)] + [
        get_act_name("resid_post", n_layers - 1)
    ]
    z = [get_act_name("z", layer) for layer in range(n_layers)]
    clean_logits, clean_cache = model.run_with_cache(group.clean, names_filter=stream + z)
    clean = float(logit_difference(clean_logits, group).mean())
    corrupted = float(logit_difference(model(group.swapped), group).mean())

    def recovered(hook: Hook) -> float:
        logits = model.run_with_hooks(group.swapped, fwd_hooks=[hook])
        return (float(logit_difference(logits, group).mean()) - corrupted) / (clean - corrupted)

    resid = torch.zeros(n_layers + 1, length)
    heads = torch.zeros(n_layers, n_heads)
    if abs(clean - corrupted) < SMALLEST_GAP:
        resid.fill_(float("nan"))
        heads.fill_(float("nan"))
    else:
        for row, position in _cells(n_layers + 1, range(giver, length), "patching the residual stream", progress):
            resid[row, position] = recovered((stream[row], position_patch(clean_cache, position)))
        for layer, index in _cells(n_layers, range(n_heads), "patching heads", progress):
            heads[layer, index] = recovered((z[layer], head_patch(clean_cache, index)))
    return SweepResult(
        n_prompts=len(group),
        clean_prompt=group.prompts[0].prompt,
        corrupted_prompt=group.prompts[0].swapped,
        clean_difference=clean,
        corrupted_difference=corrupted,
        resid=resid,
        resid_labels=[f"before layer {layer}" for layer in range(n_layers)] + [f"after layer {n_layers - 1}"],
        position_labels=group.position_labels,
        giver_position=giver,
        heads=heads,
        carriers=ranked_heads(heads.abs().nan_to_num(), limit),
    )


def position_patch(clean_cache: ActivationCache, position: int) -> Callable[..., Any]:
    """A hook that puts the clean residual stream in at one position."""

    def patch(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        resid = resid.clone()
        resid[:, position] = clean_cache[hook.name][:, position]
        return resid

    return patch


def head_patch(clean_cache: ActivationCache, index: int) -> Callable[..., Any]:
    """A hook that puts the clean output of one head in, at all positions."""

    def patch(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, index] = clean_cache[hook.name][:, :, index]
        return z

    return patch


def _cells(rows: int, columns: range, title: str, progress: bool) -> Iterator[tuple[int, int]]:
    cells = [(row, column) for row in range(rows) for column in columns]
    # A bar that stays where it was written would push the tables down.
    yield from tqdm(cells, desc=title, unit="run", disable=not progress, leave=False)
