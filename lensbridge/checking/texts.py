"""Do padded batches, and text that the model writes, come out as HuggingFace's?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .outcome import Findings, Outcome
from .subject import LENGTH, Subject

NEW_TOKENS = 4
#: So that nothing is the end.
NO_TOKEN = 2**31 - 1
#: How far a row in a padded batch may be from the row alone: masked keys take part in the sums as zeros.
ALONE = 1e-4


def check_padding(subject: Subject) -> list[Outcome]:
    """A batch with a shorter row, padded on either side: logits of the tokens that are no padding."""
    findings = Findings("padding", subject.known)
    short = LENGTH - 4
    for side in ("right", "left"):
        mask = torch.ones_like(subject.tokens)
        real = slice(0, short) if side == "right" else slice(LENGTH - short, LENGTH)
        mask[1] = 0
        mask[1, real] = 1
        with findings.trying(side), torch.no_grad():
            logits = subject.model(subject.tokens, attention_mask=mask)
            expected = _of_huggingface(subject, mask)
            findings.same(side, logits[mask.bool()], expected[mask.bool()], "with the same mask and positions")
            cached = subject.model.run_with_cache(subject.tokens, attention_mask=mask, return_cache_object=False)[0]
            findings.same(side, cached[mask.bool()], logits[mask.bool()], "with a full cache")
        with findings.trying(f"{side}, row by row"), torch.no_grad():
            for row, part in ((0, slice(0, LENGTH)), (1, real)):
                alone = subject.hf(input_ids=subject.tokens[row : row + 1, part]).logits
                findings.compare(f"{side}, row by row", logits[row : row + 1, part], alone, f"row {row}", ALONE)
    return findings.outcomes()


def _of_huggingface(subject: Subject, mask: Tensor) -> Tensor:
    """Logits of the HuggingFace model with the mask, and positions that count real tokens."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + subject.model.interior.counts_from
    return subject.hf(input_ids=subject.tokens, attention_mask=mask, position_ids=positions).logits


def check_generation(subject: Subject) -> list[Outcome]:
    """Greedy generation with a key-value cache and a hook that looks on."""
    findings = Findings("generation", subject.known)
    check, tokens = "greedy", subject.tokens
    if subject.architecture.no_text is not None:
        findings.absent(check, subject.architecture.no_text)
        return findings.outcomes()
    with findings.trying(check), torch.no_grad():
        expected = subject.hf.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
            forced_bos_token_id=None,
            forced_eos_token_id=None,
        )
        seen: list[int] = []
        last = f"blocks.{subject.n_layers - 1}.hook_resid_post"

        def look(value: Tensor, hook: Any) -> None:
            seen.append(value.shape[1])

        found = subject.model.generate(
            tokens,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            fwd_hooks=[(last if subject.has(last) else "hook_embed", look)],
        )
        findings.say(check, torch.equal(found, expected), f"{found.tolist()} instead of {expected.tolist()}")
        streams = subject.positions // LENGTH if subject.architecture.several_unembedded else 1
        lengths = [subject.positions, *[streams] * (NEW_TOKENS - 1)]
        if subject.architecture.key_value_cache == "none":
            lengths = [subject.positions + new for new in range(NEW_TOKENS)]
        findings.say(check, seen == lengths, f"the hook saw {seen} positions instead of {lengths}")
    return findings.outcomes()
