"""Does the model know who receives, and which heads write that answer?

In "When Mary and John went to the store, John gave a drink to" the next word is the name said once (Wang et al. 2022,
"Interpretability in the Wild"). The logit difference between the two names is, up to the last norm's scale, a sum
over everything that was added to the residual stream at the last position. Each head's and each layer's share of that
sum is its direct logit attribution; whom a head attends to from there tells what kind of head it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from lensbridge.demo.heads import Head, ranked_heads
from lensbridge.demo.layout import PromptGroup
from lensbridge.utils import get_act_name

if TYPE_CHECKING:
    from lensbridge.activation_cache import ActivationCache
    from lensbridge.model import HookedTransformer

#: Only what the decompositions read is cached; everything per neuron stays out.
CACHED = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "attn.hook_pattern",
    "ln_final.hook_scale",
)


@dataclass(frozen=True)
class Example:
    """One prompt: what the model puts first, and by how much it prefers the right name."""

    prompt: str
    io: str
    s: str
    top_token: str
    logit_difference: float


@dataclass(frozen=True)
class IoiResult:
    """Everything measured at the last position of the prompts; logits in nats, differences are IO minus S.

    ``head_attribution`` and ``component_attribution`` are shares of the logit difference, the mean over prompts;
    ``accumulated`` is the running sum along the residual stream. ``explained`` is the sum of all components and of the
    unembedding's bias: how far it is from ``logit_difference`` tells how exact the decomposition is on this model.
    ``attention`` is where each head looks from the last position, ``[layer, head, role]``, roles IO, S1, S2.
    """

    n_prompts: int
    n_unusable: int
    accuracy: float
    top_1: float
    logit_difference: float
    logit_difference_std: float
    swapped_logit_difference: float
    head_attribution: Float[torch.Tensor, "layer head"]
    component_labels: list[str]
    component_attribution: Float[torch.Tensor, " component"]
    accumulated_labels: list[str]
    accumulated: Float[torch.Tensor, " step"]
    explained: float
    attention: Float[torch.Tensor, "layer head role"]
    writers: list[Head]
    opponents: list[Head]
    examples: list[Example]


def logit_difference(
    logits: Float[torch.Tensor, "batch pos vocab"], group: PromptGroup
) -> Float[torch.Tensor, " batch"]:
    """Logit of the indirect object minus logit of the subject, at the last position of each prompt."""
    last = logits[:, -1].float()
    rows = torch.arange(len(group), device=last.device)
    return last[rows, group.io] - last[rows, group.s]


@torch.no_grad()
def run_ioi(
    model: HookedTransformer, groups: Sequence[PromptGroup], *, n_unusable: int = 0, limit: int = 5
) -> IoiResult:
    """The whole analysis, group by group; means are over prompts. ``limit`` is how many heads are named each way."""
    parts = [_measure(model, group) for group in groups]
    weights = torch.tensor([float(len(group)) for group in groups])

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.einsum("g,g...->...", weights / weights.sum(), torch.stack(values))

    differences = torch.cat([part.differences for part in parts])
    heads = mean([part.heads for part in parts])
    ranking = ranked_heads(heads)
    return IoiResult(
        n_prompts=len(differences),
        n_unusable=n_unusable,
        accuracy=float((differences > 0).float().mean()),
        top_1=float(torch.cat([part.top_is_io for part in parts]).float().mean()),
        logit_difference=float(differences.mean()),
        logit_difference_std=float(differences.std(correction=0)),
        swapped_logit_difference=float(torch.cat([part.swapped_differences for part in parts]).mean()),
        head_attribution=heads,
        component_labels=parts[0].component_labels,
        component_attribution=mean([part.components for part in parts]),
        accumulated_labels=parts[0].accumulated_labels,
        accumulated=mean([part.accumulated for part in parts]),
        explained=float(mean([part.explained for part in parts])),
        attention=mean([part.attention for part in parts]),
        writers=[head for head in ranking[:limit] if heads[head] > 0],
        opponents=[head for head in ranking[::-1][:limit] if heads[head] < 0],
        examples=[example for part in parts for example in part.examples][:limit],
    )


@dataclass(frozen=True)
class _Part:
    """What one group contributes; vectors over its prompts, tables averaged over them."""

    differences: torch.Tensor
    swapped_differences: torch.Tensor
    top_is_io: torch.Tensor
    heads: torch.Tensor
    component_labels: list[str]
    components: torch.Tensor
    accumulated_labels: list[str]
    accumulated: torch.Tensor
    explained: torch.Tensor
    attention: torch.Tensor
    examples: list[Example]


def _measure(model: HookedTransformer, group: PromptGroup) -> _Part:
    logits, cache = model.run_with_cache(group.clean, names_filter=lambda name: name.endswith(CACHED))
    differences = logit_difference(logits, group)

    def attribution(stack: torch.Tensor) -> torch.Tensor:
        per_prompt = cache.logit_attrs(stack, tokens=group.io, incorrect_tokens=group.s, pos_slice=-1)
        return per_prompt.float().mean(1).cpu()

    heads = attribution(cache.stack_head_results(layer=-1, pos_slice=-1))
    components, component_labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    # Blocks without a stream between attention and MLP (parallel, attention-only) have no mid point to show.
    has_mid = all(get_act_name("resid_mid", layer) in cache for layer in range(model.cfg.n_layers))
    steps, accumulated_labels = cache.accumulated_resid(layer=-1, incl_mid=has_mid, pos_slice=-1, return_labels=True)
    component_attribution = attribution(components)
    bias = (model.b_U[group.io] - model.b_U[group.s]).float().mean().cpu()
    return _Part(
        differences=differences.cpu(),
        swapped_differences=logit_difference(model(group.swapped), group).cpu(),
        top_is_io=(logits[:, -1].argmax(-1) == group.io).cpu(),
        heads=heads.reshape(model.cfg.n_layers, model.cfg.n_heads),
        component_labels=component_labels,
        components=component_attribution,
        accumulated_labels=accumulated_labels,
        accumulated=attribution(steps),
        explained=component_attribution.sum() + bias,
        attention=_attention_to_names(model, cache, group),
        examples=_examples(model, logits, differences, group),
    )


def _attention_to_names(model: HookedTransformer, cache: ActivationCache, group: PromptGroup) -> torch.Tensor:
    """Mean attention from the last position to IO, S1 and S2, ``[layer, head, role]``."""
    first, second, giver = group.name_positions
    rows = torch.arange(len(group), device=group.clean.device)
    io_is_first = group.clean[:, first] == group.io
    io_position = torch.where(io_is_first, first, second)
    s1_position = torch.where(io_is_first, second, first)
    layers = []
    for layer in range(model.cfg.n_layers):
        from_end = cache[get_act_name("pattern", layer)][:, :, -1].float()
        roles = [from_end[rows, :, io_position], from_end[rows, :, s1_position], from_end[:, :, giver]]
        layers.append(torch.stack(roles, dim=-1).mean(0))
    return torch.stack(layers).cpu()


def _examples(
    model: HookedTransformer, logits: torch.Tensor, differences: torch.Tensor, group: PromptGroup, limit: int = 2
) -> list[Example]:
    tops = logits[:limit, -1].argmax(-1).tolist()
    return [
        Example(prompt.prompt, prompt.io, prompt.s, model.to_single_str_token(top), float(difference))
        for prompt, top, difference in zip(group.prompts, tops, differences, strict=False)
    ]
