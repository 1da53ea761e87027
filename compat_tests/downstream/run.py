"""Do libraries that import HookedTransformer compute the same under the alias as on transformer-lens 3.9.0?

    python -m compat_tests.downstream.run [CASE ...]

Each case runs in two processes, on the real package and under the alias, in a virtual environment that is built beside
this file on the first run: it sees the packages of the Python that builds it (which has both libraries and the versions
of ``constraints.txt``), and what ``requirements.txt`` adds. Needs the package index then; not part of the test run.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = Path(os.environ.get("DOWNSTREAM_ENV", HERE / ".venv"))
CASES = sorted(path.stem for path in (HERE / "cases").glob("*.py") if path.stem != "__init__")
#: The promise for numbers of TransformerLens, relative to the largest value of a tensor.
TOLERANCE = 1e-4


def python() -> str:
    """The environment's Python; the environment is made if there is none."""
    binary = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not binary.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([binary, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "builder.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        install = [binary, "-m", "pip", "install", "--quiet", "--no-deps", "-r", HERE / "requirements.txt"]
        subprocess.run(install, check=True)
    return str(binary)


def outcome(case: str, alias: bool, folder: Path) -> dict[str, torch.Tensor] | str:
    """What the case computed, or the last line of what went wrong."""
    path = folder / f"{case}-{alias}.pt"
    command = [python(), "-m", "compat_tests.downstream.child", case, str(path), *["--alias"] * alias]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        if os.environ.get("DOWNSTREAM_TRACEBACK"):
            print(done.stderr, file=sys.stderr)
        return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    return torch.load(path)


def compared(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> tuple[bool, str]:
    """Whether all tensors agree, and the largest relative difference with its name."""
    if set(theirs) != set(ours):
        return False, f"other names: {sorted(set(theirs) ^ set(ours))[:5]}"
    worst, where = 0.0, ""
    for name, value in theirs.items():
        if value.shape != ours[name].shape or value.dtype != ours[name].dtype:
            return False, f"{name}: {value.dtype} {list(value.shape)}, {ours[name].dtype} {list(ours[name].shape)}"
        scale = float(value.double().abs().max()) if value.numel() else 0.0
        difference = float((value.double() - ours[name].double()).abs().max()) if value.numel() else 0.0
        relative = difference / scale if scale else difference
        if not relative <= worst:
            worst, where = relative, name
    return worst <= TOLERANCE, f"{len(theirs)} tensors, largest difference {worst:.1e}{f' ({where})' * bool(where)}"


def main(cases: list[str]) -> int:
    """Run the cases and print a line for each; the number of those that differ or fail."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in cases or CASES:
            theirs, ours = (outcome(case, alias, Path(folder)) for alias in (False, True))
            if isinstance(theirs, str) or isinstance(ours, str):
                states = [one if isinstance(one, str) else "runs" for one in (theirs, ours)]
                fine, text = False, f"3.9.0: {states[0]}; alias: {states[1]}"
            else:
                fine, text = compared(theirs, ours)
            bad += not fine
            print(f"{'equal ' if fine else 'DIFFERS'} {case}: {text}", flush=True)
    print(f"transformer-lens {importlib.metadata.version('transformer-lens')}: {bad} of {len(cases or CASES)} differ")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
