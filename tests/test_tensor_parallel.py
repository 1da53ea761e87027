"""Is a model that is divided among processes served as one process serves it?

Two processes are started once, with the gloo backend on the CPU, and make the calls of `tensor_parallel_worker.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lensbridge import HookedTransformer
from lensbridge.tiny import tiny_family, tiny_tokens

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
#: Gated MLPs and grouped queries; one projection for queries, keys and values, and biases; experts; norms over heads.
FAMILIES = ("llama", "gpt_neox", "mixtral", "qwen3")
PROCESSES = 2
RAW = ("every_point", "every_weight", "every_edit", "gradients", "given", "refused", "divided parameters")
MORE = (*RAW, "further_points", "parts", "texts", "analyses", "traces")
#: What is asked of the first two is everything; it takes a few seconds each time.
PLANS = [
    *((family, options, checks) for family in FAMILIES[:2] for options, checks in (("raw", RAW), ("processed", MORE))),
    *((family, "processed", RAW) for family in FAMILIES[2:]),
]
CHECKS = [(family, options, check) for family, options, checks in PLANS for check in checks]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    where = tmp_path_factory.mktemp("divided")
    for family in (*FAMILIES, "gpt2"):
        tiny_family(family).save_pretrained(where / family)
    plans = [f"{where / family}={options}{'+' if checks == MORE else ''}" for family, options, checks in PLANS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(WORKER), str(where / "out"), *plans],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((where / f"out.{rank}").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


@pytest.mark.parametrize(("family", "options", "check"), CHECKS)
def test_divided_as_whole(outcomes: list[dict[str, Any]], family: str, options: str, check: str) -> None:
    for outcome in outcomes:
        found = outcome[f"{family}, {options}"][check]
        assert not found["wrong"], found
        assert found["compared"] > 0


def test_each_check_was_made(outcomes: list[dict[str, Any]]) -> None:
    made = {(*name.split(", "), check) for outcome in outcomes for name, found in outcome.items() for check in found}
    assert made == set(CHECKS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_process_divides_nothing(tmp_path: Path, family: str) -> None:
    tiny_family(family).save_pretrained(tmp_path)
    model = HookedTransformer.from_pretrained(str(tmp_path), tp_plan="auto", tokenizer=None)
    plain = HookedTransformer.from_pretrained(str(tmp_path), tokenizer=None)
    assert model(tiny_tokens()).equal(plain(tiny_tokens())) and model.cfg.device == plain.cfg.device
