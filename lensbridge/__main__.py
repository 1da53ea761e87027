"""``python -m lensbridge`` is the command line of ``lensbridge.cli``."""

from __future__ import annotations

import sys

from lensbridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
