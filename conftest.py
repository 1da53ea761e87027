"""What holds for every test run: nothing is looked for on the network, and nothing kept in the user's cache."""

from __future__ import annotations

import os
import tempfile

# huggingface_hub reads this when it is imported, so it is set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LENSBRIDGE_CACHE", tempfile.mkdtemp(prefix="lensbridge-records-"))
