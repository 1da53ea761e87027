"""Do gradients come by every point, and are they HuggingFace's own?

The gradient of one number made of the logits, at every point and at every parameter. Where a point shows what one of
HuggingFace's modules is given or gives back, its gradient is that tensor's in a plain run; which module that is shows
in the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..points import template
from .capture import Captured, capturing
from .outcome import Findings, Outcome
from .subject import Subject

#: Sums of gradients are added up in another order, over paths whose contributions cancel.
GRADIENTS = 1e-4
#: In relation to the largest gradient, what is rounding where the true gradient is zero (a bias of all keys, say).
ZERO = 1e-5


def check_gradients(subject: Subject) -> list[Outcome]:
    """Gradients at the points that are on without flags, and at the parameters."""
    findings = Findings("gradients", subject.known)
    with subject.turned_on(()), torch.enable_grad(), findings.trying("gradients"):
        plain, expected = _plain(subject)
        names = [name for name in subject.names if subject.look()[name].is_floating_point()]
        kept: dict[str, Tensor] = {}

        def keep(gradient: Tensor, hook: object) -> None:
            name = str(hook.name)  # type: ignore[attr-defined]
            # The norm before attention fires for each of its readers.
            kept[name] = gradient.detach().clone() + kept.get(name, 0)

        with subject.model.hooks(bwd_hooks=[(name, keep) for name in names]):
            found = _parameter_gradients(subject, subject.model(subject.tokens))
        for name in names:
            with findings.trying(template(name), name):
                _check_point(subject, findings, name, kept.get(name), plain)
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        for path, gradient in expected.items():
            findings.say("parameters", path in found, f"{path} gets none")
            nothing = gradient.abs().max().item() < ZERO * largest
            if nothing and path in found:
                findings.say(
                    "parameters", found[path].abs().max().item() < ZERO * largest, f"{path} gets one, not zero"
                )
            elif path in found:
                findings.compare("parameters", found[path], gradient, path, GRADIENTS)
    return findings.outcomes()


def _number(logits: Tensor) -> Tensor:
    """One number that every logit takes part in."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return (logits * weights.to(logits)).sum()


def _plain(subject: Subject) -> tuple[Captured, dict[str, Tensor]]:
    """A run of the HuggingFace model with its modules' tensors and their gradients; and its parameters' gradients."""
    with capturing(subject.hf, live=True) as captured:
        # Recurrences write into their cache, where there is one.
        logits = subject.hf(input_ids=subject.tokens, use_cache=False).logits
    return captured, _parameter_gradients(subject, logits)


def _parameter_gradients(subject: Subject, logits: Tensor) -> dict[str, Tensor]:
    before = {name: parameter.grad for name, parameter in subject.hf.named_parameters()}
    try:
        for parameter in subject.hf.parameters():
            parameter.grad = None
        _number(logits).backward()
        return {n: p.grad.clone() for n, p in subject.hf.named_parameters() if p.grad is not None}
    finally:
        for name, parameter in subject.hf.named_parameters():
            parameter.grad = before[name]


def _check_point(subject: Subject, findings: Findings, name: str, gradient: Tensor | None, plain: Captured) -> None:
    check = template(name)
    findings.say(check, gradient is not None, f"no gradient came by {name}")
    if gradient is None:
        return
    findings.say(check, bool(gradient.isfinite().all()), f"the gradient at {name} is not finite")
    findings.say(check, bool(gradient.any()), f"the gradient at {name} is zero")
    if _has_other_readers(subject, name):
        return
    value = subject.look()[name]
    # Of a view that has another shape, what is a reader's alone may be the gradient.
    for tensor in sorted(_tensors(plain), key=lambda tensor: tensor.shape != value.shape):
        if (
            tensor.grad is not None
            and tensor.numel() == value.numel()
            and torch.equal(tensor.flatten(), value.flatten())
        ):
            findings.compare(check, gradient.reshape(tensor.shape), tensor.grad, name, GRADIENTS)
            return


def _has_other_readers(subject: Subject, name: str) -> bool:
    """Whether the module whose output a point shows is read through another point, too."""
    if name == "blocks.0.hook_resid_pre":
        # The embedding is that stream, too.
        return subject.architecture.rereads is not None
    if name.endswith((".hook_v", ".hook_rot_k")):
        # A later layer may attend to these keys and values as well.
        return any(block.q and not block.k for block in subject.architecture.blocks)
    if not name.endswith((".ln1.hook_normalized", ".ln2.hook_normalized")):
        return False
    block = subject.block(int(name.split(".")[1]))
    return block.ln1 == block.ln2


def _tensors(plain: Captured) -> list[Tensor]:
    return [tensor for calls in plain.calls.values() for call in calls for tensor in call if tensor is not None]
