"""Are the logits HuggingFace's own, bit by bit, whoever looks on; and with processing, are the probabilities?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .hooking import hooked
from .outcome import Findings, Outcome
from .subject import DEFAULT_PROCESSING, Subject

#: How far apart log probabilities may be, where processing has regrouped the sums that they are made of.
LOG_PROBABILITIES = 1e-5


def read(value: Tensor, hook: Any) -> None:
    """A hook that looks and changes nothing."""


def check_exactness(subject: Subject) -> list[Outcome]:
    """Logits against the HuggingFace model's own forward on the same tokens."""
    findings = Findings("exactness", subject.known)
    expected = subject.plain.logits
    assert expected is not None
    with findings.trying("no hooks"):
        findings.same("no hooks", subject.run(), expected)
    for flags in subject.flags():
        where = ", ".join(flags)
        with subject.turned_on(flags), findings.trying("a reading hook at every point", where):
            hooks = [(name, read) for name in subject.names]
            findings.same("a reading hook at every point", subject.run(hooks), expected, where)
        with subject.turned_on(flags), findings.trying("a full cache", where):
            findings.same("a full cache", subject.look().logits, expected, where)
    with findings.trying("no hooks, afterwards"), torch.no_grad():
        findings.same("no hooks, afterwards", subject.hf(input_ids=subject.tokens).logits, expected)
        left = [
            path for path, module in subject.hf.named_modules() if module._forward_hooks or "forward" in vars(module)
        ]
        findings.say("no hooks, afterwards", not left, f"something of ours is left on {', '.join(left[:3])}")
    _check_sdpa(subject, findings)
    return findings.outcomes()


def _check_sdpa(subject: Subject, findings: Findings) -> None:
    """With scaled dot product attention: the same logits as HuggingFace's with it, and scores by eager attention."""
    check = "scaled dot product attention"
    hf, before = subject.hf, subject.hf.config._attn_implementation
    if not getattr(hf, "_supports_sdpa", False):
        findings.absent(check, "HuggingFace has eager attention only for this family")
        return
    with findings.trying(check), subject.turned_on(subject.flags()[0]), torch.no_grad():
        eager = subject.look()
        hf.set_attn_implementation("sdpa")
        if hf.config._attn_implementation != "sdpa":
            findings.absent(check, "HuggingFace does not change a loaded model's attention in this family")
            return
        try:
            expected = hf(input_ids=subject.tokens).logits
            findings.same(check, subject.run(), expected)
            inside = [name for name in subject.names if not name.endswith(("hook_attn_scores", "hook_pattern"))]
            logits, cache = subject.model.run_with_cache(subject.tokens, names_filter=inside, return_cache_object=False)
            findings.same(check, logits, expected, "with a cache of all but scores and pattern")
            for name in inside:
                findings.compare(check, cache[name], eager[name], name)
            whole = subject.model.run_with_cache(subject.tokens, return_cache_object=False)[0]
            inside_all = len(inside) == len(subject.names)
            findings.same(check, whole, expected if inside_all else eager.logits, "with a full cache")
            findings.same(check, subject.run(), expected, "afterwards")
            findings.say(check, hf.config._attn_implementation == "sdpa", "the model was left with eager attention")
        finally:
            hf.set_attn_implementation(before)


def check_dtype(subject: Subject, dtype: torch.dtype) -> list[Outcome]:
    """The same in another dtype, on a copy of the model."""
    findings = Findings(str(dtype).removeprefix("torch."), subject.known)
    with findings.trying("no hooks"):
        hf = copy.deepcopy(subject.hf).to(dtype)
        model = hooked(hf)
        with torch.no_grad():
            expected = hf(input_ids=subject.tokens).logits
            findings.same("no hooks", model(subject.tokens), expected)
            logits, cache = model.run_with_cache(subject.tokens, return_cache_object=False)
            findings.same("a full cache", logits, expected)
            names = list(cache)
            with model.hooks(fwd_hooks=[(name, read) for name in names]):
                findings.same("a reading hook at every point", model(subject.tokens), expected)
    return findings.outcomes()


def check_processing(subject: Subject) -> list[Outcome]:
    """Log probabilities of the model as `from_pretrained` shows it."""
    findings = Findings("processing", subject.known)
    expected = subject.plain.logits
    assert expected is not None
    with processed(subject), findings.trying("log probabilities"):
        for where, logits in (("no hooks", subject.run()), ("a full cache", subject.look().logits)):
            gap = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
            findings.say("log probabilities", gap <= LOG_PROBABILITIES, f"{where}: off by up to {gap:.1e}")
    return findings.outcomes()


@contextmanager
def processed(subject: Subject) -> Iterator[None]:
    """The time in which the model is shown as `from_pretrained` shows it."""
    with subject.processed(DEFAULT_PROCESSING):
        yield
