"""What can be seen inside a model in a minute? Three classic analyses, written with the public API alone.

``run_demo`` measures, ``print_report`` and ``render_page`` show; each analysis can be called by itself as well.
"""

from __future__ import annotations

from lensbridge.demo.analyses import DemoResult, run_demo
from lensbridge.demo.induction import InductionResult, run_induction
from lensbridge.demo.ioi import IoiResult, run_ioi
from lensbridge.demo.page import render_page
from lensbridge.demo.patching_sweep import SweepResult, run_sweep
from lensbridge.demo.report import print_report

__all__ = [
    "DemoResult",
    "InductionResult",
    "IoiResult",
    "SweepResult",
    "print_report",
    "render_page",
    "run_demo",
    "run_induction",
    "run_ioi",
    "run_sweep",
]
