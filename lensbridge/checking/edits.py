"""Does a write at a point have exactly the effect that it must have?

An edit at one point, with everything else cached. What comes before the point is as without the edit; what comes after
is computed from the edited value, so that every identity holds but the point's own, which is broken by just the edit;
and the logits change.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ..points import point_of, template
from .identities import Identity, identities_of
from .outcome import TOLERANCE, Findings, Outcome, relative_difference
from .subject import Look, Subject

ROUNDING = 1e-6


class Nudge:
    """A hook that changes a value somewhat, by noise that is fixed by the point's name; it keeps what it saw last."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.after: Tensor | None = None

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(hook.name.encode()))
        noise = torch.rand(value.shape, generator=generator).to(value) + 0.5
        self.before = value.clone()
        if hook.name.endswith("hook_scale"):
            self.after = value * (1 + 0.2 * noise)
        elif not value.is_floating_point():
            # The experts chosen: the next ones instead.
            self.after = (value + 1) % (int(value.max()) + 1)
        else:
            size = value[value.isfinite()].std()
            self.after = value + 0.3 * size * noise
        return self.after.clone()


def check_edits(subject: Subject, everywhere: bool = False) -> list[Outcome]:
    """An edit at each point: in the first layer of each kind, or in every layer."""
    findings = Findings("edits", subject.known)
    layers = range(subject.n_layers) if everywhere else subject.kinds
    edited: set[str] = set()
    for flags in subject.flags():
        with subject.turned_on(flags), torch.no_grad():
            clean = subject.look()
            # What does not hold without an edit is for `check_identities` to say.
            identities = [identity for identity in identities_of(subject) if _holds(identity, clean)]
            for name in subject.names:
                row = point_of(name)
                if row is None or name in edited or (row.in_layer and int(name.split(".")[1]) not in layers):
                    continue
                if row.flag is not None and row.flag not in flags:
                    continue
                edited.add(name)
                with findings.trying(template(name), name):
                    _check_edit(subject, findings, name, clean, identities)
    return findings.outcomes()


def _holds(identity: Identity, look: Look) -> bool:
    try:
        return relative_difference(*identity.sides(look, look[identity.point])) <= TOLERANCE
    except Exception:
        return False


def _check_edit(subject: Subject, findings: Findings, name: str, clean: Look, identities: list[Identity]) -> None:
    check, nudge = template(name), Nudge()
    look = subject.look([(name, nudge)])
    assert nudge.before is not None and nudge.after is not None
    findings.same(check, look[name], nudge.after, f"the cache after an edit of {name}")
    before = subject.all_names[: subject.all_names.index(name)]
    # Norms are computed in fewer steps where nobody may edit.
    changed = [n for n in before if n in look and relative_difference(look[n], clean[n]) > ROUNDING]
    findings.say(check, not changed, f"an edit of {name} changed what comes before: {', '.join(changed[:3])}")
    findings.say(check, not torch.equal(look.logits, clean.logits), f"an edit of {name} did not reach the logits")
    for identity in identities:
        if ".experts." in identity.point and identity.point not in look:
            # The edit has sent no token there.
            continue
        sides = identity.sides(look, nudge.before if identity.point == name else look[identity.point])
        findings.compare(check, *sides, f"an edit of {name}: {identity.point} != {identity.equation}")
