"""How long does it take until a model has answered once, and how much memory does that need at its peak?

Run as a child process, one contender at a time (``python loading.py NAME DIRECTORY``), so that nothing is shared. It
prints one line of JSON. The peak is the kernel's high-water mark of this process (VmHWM), which starts anew with the
program, where ``ru_maxrss`` may carry over from the parent. One forward pass belongs to it: HuggingFace maps the
checkpoint file into memory and reads it when a weight is first used.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def memory_mib(field: str) -> float:
    """VmHWM (peak) or VmRSS (now) in MiB; on systems without /proc, the peak for both."""
    status = Path("/proc/self/status")
    if not status.exists():
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    line = next(row for row in status.read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) / 1024


def measure_here(name: str, directory: Path) -> dict[str, float]:
    """Import, load, and run once; the three are timed apart."""
    import torch
    from subjects import LOADERS, quiet

    start = time.perf_counter()
    if name.startswith("lensbridge"):
        import lensbridge  # noqa: F401 (imported to be timed)
    elif name.startswith("Transformer"):
        import transformer_lens.model_bridge  # noqa: F401 (imported to be timed)
    imported = time.perf_counter()
    before = memory_mib("VmRSS")
    with quiet():
        model = LOADERS[name](directory)
    loaded = time.perf_counter()
    with torch.no_grad():
        model(torch.arange(1, 16)[None])
    return {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_run_s": time.perf_counter() - loaded,
        "before_mib": before,
        "after_mib": memory_mib("VmRSS"),
        "peak_mib": memory_mib("VmHWM"),
    }


def measure(name: str, directory: Path) -> dict[str, Any]:
    """The same in a fresh child process."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), name, str(directory)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    print(json.dumps(measure_here(sys.argv[1], Path(sys.argv[2]))))
