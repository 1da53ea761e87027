"""What do particular edits do, said for each of them?

The edits that people make most, with the effect that each has by the meaning of its point. All are made in the first
layer of each kind that has the points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .outcome import Findings, Outcome
from .scores import clipped, repeated
from .subject import Subject

#: What scores that are taken apart and put together again may be off by, in relation to the largest.
ROUNDING = 1e-6
#: Looks whether a fact holds in one layer.
Effect = Callable[[Subject, Findings, str, int], None]


def added(amount: Tensor) -> Callable[..., Any]:
    """A hook that adds a tensor."""
    return lambda value, hook: value + amount


def check_effects(subject: Subject) -> list[Outcome]:
    """Every effect, in the first layer of each kind."""
    findings = Findings("effects", subject.known)
    with subject.turned_on(subject.flags()[0]), torch.no_grad():
        for check, points, effect in EFFECTS:
            there = [layer for layer in subject.kinds if all(subject.has(_name(layer, point)) for point in points)]
            for layer in there:
                with findings.trying(check, f"layer {layer}"):
                    effect(subject, findings, check, layer)
            if not there:
                findings.absent(check, f"no layer has {' and '.join(points)}")
    return findings.outcomes()


def _name(layer: int, point: str) -> str:
    """A point of a layer, or of the next one."""
    return f"blocks.{layer + point.startswith('next ')}.{point.removeprefix('next ')}"


def _same_by_adding(first: str, second: str) -> Effect:
    """Adding to one place of the stream is adding to the other."""

    def effect(subject: Subject, findings: Findings, check: str, layer: int) -> None:
        extra = subject.block(layer).extra
        if extra is not None and second == "hook_resid_post":
            findings.absent(check, f"the stream takes more on its way through the layer: {extra}")
            return
        look, names = subject.look(), (_name(layer, first), _name(layer, second))
        if second.startswith("next ") and any(run.fresh for run in subject.architecture.ran[layer + 1 : layer + 2]):
            findings.absent(check, "the next layer is given more than it")
            return
        if first == "hook_resid_post" and subject.block(layer).post_norm:
            findings.absent(check, "the next layer is given the norm of it")
            return
        x = look[names[0]]
        amount = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(layer)).to(x)
        one, other = (subject.run([(name, added(amount))]) for name in names)
        findings.compare(check, one, other, f"layer {layer}")
        findings.say(check, not torch.equal(one, look.logits), f"layer {layer}: neither changes the logits")

    return effect


def _zeroed_head_of_z(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    look, z, result, out = (
        subject.look(),
        *(_name(layer, p) for p in ("attn.hook_z", "attn.hook_result", "hook_attn_out")),
    )

    def zero(value: Tensor, hook: Any) -> Tensor:
        value[:, :, 1] = 0
        return value

    after = subject.look([(z, zero)])
    findings.say(check, not after[result][:, :, 1].any(), f"layer {layer}: the head still has a result")
    others = [head for head in range(look[z].shape[2]) if head != 1]
    if subject.block(layer).z_norm is not None:
        # It takes one head's change to the others.
        return
    findings.compare(check, after[result][:, :, others], look[result][:, :, others], f"layer {layer}, other heads")
    if subject.norm_behind(layer, "attn") is None and subject.block(layer).attn_through is None:
        factor = subject.factor(layer, "attn_factor")
        gone = look[result][:, :, 1] * (1 if factor is None else factor)
        findings.compare(check, after[out], look[out] - gone, f"layer {layer}, attn_out")


def _zeroed_head_of_pattern(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    pattern, z = _name(layer, "attn.hook_pattern"), _name(layer, "attn.hook_z")

    def zero(value: Tensor, hook: Any) -> Tensor:
        value[:, 1] = 0
        return value

    look, after = subject.look(), subject.look([(pattern, zero)])
    findings.say(check, not after[z][:, :, 1].any(), f"layer {layer}: z of the head is not zero")
    others = [head for head in range(look[z].shape[2]) if head != 1]
    findings.compare(check, after[z][:, :, others], look[z][:, :, others], f"layer {layer}, z of other heads")


def _doubled_scores(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    scores, pattern = _name(layer, "attn.hook_attn_scores"), _name(layer, "attn.hook_pattern")
    look = subject.look()
    after = subject.look([(scores, lambda value, hook: value * 2)])
    doubled = torch.softmax(2 * look[scores].float(), dim=-1)
    # Where a learned logit takes part, it is not doubled.
    found = after[pattern] / after[pattern].sum(-1, keepdim=True)
    findings.compare(check, found.to(doubled), doubled, f"layer {layer}")


def _masked_key(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    scores, pattern = _name(layer, "attn.hook_attn_scores"), _name(layer, "attn.hook_pattern")
    for nothing in (-torch.inf, torch.finfo(subject.look()[scores].dtype).min):

        def mask(value: Tensor, hook: Any, nothing: float = nothing) -> Tensor:
            value[:, :, 2:, 1] = nothing
            return value

        after = subject.look([(scores, mask)])
        where = f"layer {layer}, set to {nothing:.3g}"
        findings.say(check, not after[pattern][:, :, 2:, 1].any(), f"{where}: the key is attended to")
        findings.say(check, bool(after.logits.isfinite().all()), f"{where}: logits are not finite")


def _values(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    v, pattern, z = (_name(layer, f"attn.hook_{short}") for short in ("v", "pattern", "z"))
    look = subject.look()
    chosen = torch.randn(look[v].shape, generator=torch.Generator().manual_seed(layer)).to(look[v])
    after = subject.look([(v, lambda value, hook: chosen)])
    heads = repeated(clipped(chosen, subject), look[pattern].shape[1])
    findings.compare(check, after[z], torch.einsum("bhqk,bkhd->bqhd", look[pattern], heads), f"layer {layer}")


def _one_query(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    """One head's query at one position: that row of that head's scores changes, and no other."""
    _only(subject, findings, check, layer, "q")


def _one_key(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    """One head's key at one position: that column changes of the query heads that share it, and no other."""
    _only(subject, findings, check, layer, "k")


def _only(subject: Subject, findings: Findings, check: str, layer: int, letter: str) -> None:
    point, scores = _name(layer, f"attn.hook_{letter}"), _name(layer, "attn.hook_attn_scores")
    look, block = subject.look(), subject.block(layer)
    heads, position = look[point].shape[2], 4
    group, head = look[scores].shape[1] // heads, min(1, heads - 1)

    def turn(value: Tensor, hook: Any) -> Tensor:
        value[:, position, head] *= -1.5
        return value

    after = subject.look([(point, turn)])
    # What was taken from a row of scores is added again.
    exact = block.sinks is None and not block.softmax.shifted
    rounding = 0 if exact else ROUNDING * look[scores][look[scores].isfinite()].abs().max()
    changed = ((after[scores] - look[scores]).abs() > rounding) & look[scores].isfinite()
    where = torch.zeros_like(changed)
    # A norm over all heads takes one head's change to the others.
    shared = getattr(block, f"{letter}_norm") is not None and block.qk_norm_over == "all"
    affected = where if shared else where[:, group * head : group * (head + 1)]
    (affected[:, :, position] if letter == "q" else affected[:, :, :, position])[...] = True
    findings.say(check, not (changed & ~where).any(), f"layer {layer}: {int((changed & ~where).sum())} others change")
    findings.say(check, bool(changed.any()), f"layer {layer}: no score changes")


def _neurons(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    post, out = _name(layer, "mlp.hook_post"), _name(layer, "hook_mlp_out")

    def only_one(value: Tensor, hook: Any) -> Tensor:
        value[..., 3] += 1
        return value

    look, after = subject.look(), subject.look([(post, only_one)])
    row = look.weight(f"blocks.{layer}.mlp.W_out")
    if row is None or subject.norm_behind(layer, "mlp") is not None or subject.block(layer).mlp_through is not None:
        findings.absent(check, "a norm or convolution stands between neurons and what the MLP adds to the stream")
        return
    factor = subject.factor(layer, "mlp_factor")
    expected = look[out] + row[3] * (1 if factor is None else factor)
    findings.compare(check, after[out], expected, f"layer {layer}")


def _row_without_keys(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    scores, z = _name(layer, "attn.hook_attn_scores"), _name(layer, "attn.hook_z")

    def mask(value: Tensor, hook: Any) -> Tensor:
        value[:, 1, 4] = -torch.inf
        return value

    after = subject.look([(scores, mask)])
    findings.say(check, not after[z][:, 4, 1].any(), f"layer {layer}: z is not zero")
    findings.say(check, bool(after.logits.isfinite().all()), f"layer {layer}: logits are not finite")


def _squares(subject: Subject, findings: Findings, check: str, layer: int) -> None:
    """What is masked, later keys at least, is -inf in scores and nothing in the pattern; its rows sum to 1."""
    look = subject.look()
    scores, pattern = look[_name(layer, "attn.hook_attn_scores")], look[_name(layer, "attn.hook_pattern")]
    masked = scores.isneginf()
    later = torch.ones_like(masked[0, 0]).triu(1)
    findings.say(check, bool(masked[:, :, later].all()), f"layer {layer}: a later key is not at -inf")
    findings.say(check, bool(scores[~masked].isfinite().all()), f"layer {layer}: a score is neither finite nor -inf")
    findings.say(check, bool((scores[~masked] > -1e8).all()), f"layer {layer}: a large number stands for a mask")
    findings.say(check, not pattern[masked].any(), f"layer {layer}: a masked key is attended to")
    total = pattern.double().sum(-1)
    if subject.block(layer).sinks is None:
        findings.compare(check, total, torch.ones_like(total), f"layer {layer}, sums of rows")
    else:
        takes = bool((total < 1 + ROUNDING).all()) and bool((total < 0.99).any())
        findings.say(check, takes, f"layer {layer}: a sink takes nothing of any row")


SCORES, PATTERN, Z = "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z"
#: (the fact, the points that it speaks of, what looks whether it holds)
EFFECTS: tuple[tuple[str, tuple[str, ...], Effect], ...] = (
    *(
        (f"adding to {first} is adding to {second}", (first, second), _same_by_adding(first, second))
        for first, second in (
            ("hook_attn_out", "hook_resid_mid"),
            ("hook_mlp_out", "hook_resid_post"),
            ("hook_resid_post", "next hook_resid_pre"),
            ("hook_normalized_resid_post", "next hook_resid_pre"),
        )
    ),
    ("patterns are causal and sum to 1", (SCORES, PATTERN), _squares),
    ("a head without z has no result", (Z, "attn.hook_result", "hook_attn_out"), _zeroed_head_of_z),
    ("a head without pattern has no z", (PATTERN, Z), _zeroed_head_of_pattern),
    ("doubled scores give the softmax of doubled scores", (SCORES, PATTERN), _doubled_scores),
    ("a key masked in scores is not attended to", (SCORES, PATTERN), _masked_key),
    ("a query without keys attends to nothing", (SCORES, Z), _row_without_keys),
    ("a query changes its own scores", ("attn.hook_q", SCORES), _one_query),
    ("a key changes its own scores", ("attn.hook_k", SCORES), _one_key),
    ("values are mixed by the pattern", ("attn.hook_v", PATTERN, Z), _values),
    ("a neuron writes its row of W_out", ("mlp.hook_post", "hook_mlp_out"), _neurons),
)
