"""Everything that the README says about speed and memory, measured anew.

    python benchmarks/all.py --out benchmarks/results

Each script runs in a process of its own, one after the other, with as many rounds as fit into a quarter of an hour on
two slow cores. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    ("memory.py",),
    ("growth.py", "--rounds", "11"),
    ("sizes.py", "--rounds", "11"),
    ("native.py", "--rounds", "15"),
    ("compare.py", "--shape", "tiny", "--rounds", "15"),
    ("compare.py", "--shape", "small", "--rounds", "5"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for JSON, markdown and plots")
    parser.add_argument("--only", nargs="*", help="names of scripts; all of them unless given")
    arguments = parser.parse_args()
    for script, *options in SCRIPTS:
        if arguments.only and script.removesuffix(".py") not in arguments.only:
            continue
        start = time.perf_counter()
        command = [sys.executable, str(HERE / script), *options, "--out", str(arguments.out)]
        subprocess.run(command, check=True)
        print(f"{script}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
