"""Is one short file all that a new family needs, as CONTRIBUTING.md says?

A copy of the package gets a file for a made-up family, and nothing else is touched. Whatever is checked of any family
must hold of it then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lensbridge
from lensbridge.architectures import BY_CLASS

PACKAGE = Path(lensbridge.__file__).parent
RECORD = '''"""Odd (made up): keys come before queries; a gate with a sigmoid; norms store their gain less one."""

from .forms import Layout, Softmax
from .record import Architecture, Block

ODD = Architecture(
    model_type="odd",
    hf_class="OddForCausalLM",
    embed="words",
    layers="tower",
    ln_final="roof",
    unembed="speak",
    block=Block(
        ln1="before_look",
        attn="look",
        qkv="look.kqv",
        qkv_layout=Layout(order="kqv"),
        o="look.merge",
        ln1_post="after_look",
        ln2="before_think",
        mlp="think",
        gate="think.valve",
        mlp_in="think.wide",
        mlp_out="think.narrow",
        query_argument=0,
        softmax=Softmax(call="attend"),
    ),
    gain_offset=1.0,
    config={"n_heads": "heads"},
    constants={"act_fn": "sigmoid", "d_head": 8, "attn_scale": 5.0},
    variants={"parallel": {"parallel": True}},
)
'''
#: The row of a test, for a copy of the package that is not the one under test.
ROW = """
from lensbridge import measuring
from lensbridge.checking import GROUPS, check_model, hooked
from made_up_models import odd_model

measuring.measured_record = None  # nothing is measured where there is a record
for parallel in (False, True):
    model = hooked(odd_model(parallel=parallel))
    assert model.interior.architecture.blocks[0].parallel == parallel
    report = check_model(model, groups=[group for group in GROUPS if group != "generation"])
    assert not report.failures, report.failures
    print(len(report.outcomes))
"""
#: What every record builds on, and how it is found.
NO_FAMILIES = ("__init__.py", "block.py", "forms.py", "record.py")


def test_a_family_is_one_file_and_one_row(tmp_path: Path) -> None:
    copy = tmp_path / "lensbridge"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "architectures" / "odd.py").write_text(RECORD, encoding="utf-8")
    paths = os.pathsep.join(map(str, (tmp_path, Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "LENSBRIDGE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", ROW], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    checks = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(checks) == 2 and min(checks) > 100
    assert "OddForCausalLM" not in BY_CLASS


def test_records_are_short() -> None:
    """Fewer than 15 lines a family, comments and blank lines included."""
    files = [path for path in (PACKAGE / "architectures").glob("*.py") if path.name not in NO_FAMILIES]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines / len(BY_CLASS) < 15
