"""What does not hold on a family although it is served, and why?

Each entry is a check by its group and name (or a pattern of names) on one family of `lensbridge.tiny.FAMILIES`. The
tests fail on an entry that no longer fails, and on anything that fails without an entry.
"""

from __future__ import annotations

from .outcome import Known

KNOWN: dict[str, Known] = {
    "moshi": {
        "generation": {
            "greedy": "HuggingFace's cache forgets keys beyond a window that its masks do not have: it generates "
            "otherwise with its cache than without; here as without"
        }
    },
}
