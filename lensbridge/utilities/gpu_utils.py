"""How much GPU memory is in use?"""

from __future__ import annotations

import torch


def print_gpu_mem(step_name: str = "") -> None:
    """Print the memory that torch has allocated on the current GPU, in GiB (2**30 bytes), after a label."""
    print(f"{step_name} ~ {round(torch.cuda.memory_allocated() / 2**30, 2)} GiB allocated on GPU.")
