"""Is a model whose layers are on several devices served as it is on one?

On a machine without GPUs the devices are emulated (`boxes`): tensors on the CPU that say they are elsewhere, where an
operation on tensors of two devices is an error as it is anywhere. In a process of its own, which torch is not the same
after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("several_devices_worker.py")
#: Learned positions, biases, a tied embedding; grouped queries, gated MLPs, rotation; experts.
PLANS = {"gpt2": ("processed",), "llama": ("processed",), "mixtral": ("processed",)}
OF_EXPERTS = "everything where edits further_points weights parts texts sweeps traces".split()
CALLS = [
    (family, option, call)
    for family, options in PLANS.items()
    for option in options
    for call in OF_EXPERTS + ([] if family == "mixtral" else ["circuits", "stacks"])
]


@pytest.fixture(scope="module", params=["box", "cuda"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By family, options and call, what was not the same."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("this machine has no two GPUs")
    out = tmp_path_factory.mktemp("devices") / "out.json"
    command = [sys.executable, str(WORKER), str(out), request.param]
    command += [f"{family}={option}" for family, options in PLANS.items() for option in options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("family", "options", "call"), CALLS)
def test_two_devices_as_one(outcome: dict[str, str], family: str, options: str, call: str) -> None:
    assert outcome[f"{family}, {options}, {call}"] == ""


def test_each_call_was_made(outcome: dict[str, str]) -> None:
    assert set(outcome) == {", ".join(call) for call in CALLS}


def test_boxes_keep_tensors_apart() -> None:
    code = """
import torch
from boxes import boxes
with boxes():
    one, other = torch.ones(3, device="box:0"), torch.ones(3).to("box:1")
    assert str(one.device) == "box:0" and str((other * 2).device) == "box:1" and (one + other.to("box:0")).sum() == 6
    one[:] = other
    for wrong in (lambda: one + other, lambda: one + torch.ones(3), lambda: torch.stack([one, other])):
        try:
            wrong()
        except RuntimeError as error:
            assert "was given tensors on" in str(error)
        else:
            raise AssertionError("tensors of two devices were taken")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=WORKER.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
