"""What does not hold on a family although it is served, and why?

Each entry is a check by its group and name (or a pattern of names) on one family of `lensbridge.tiny.FAMILIES`. The
tests fail on an entry that no longer fails, and on anything that fails without an entry.
"""

from __future__ import annotations

from .outcome import Known

KNOWN: dict[str, Known] = {}
