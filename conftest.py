"""What holds for every test run: nothing is looked for on the network."""

from __future__ import annotations

import os

# huggingface_hub reads this when it is imported, so it is set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
