"""How does lensbridge's speed compare with plain HuggingFace and with TransformerLens 3.9.0?

    python benchmarks/compare.py --shape both --rounds 15 --out benchmarks/results

Everything is measured in one process and in turns: in each round every contender does every task, right after a plain
HuggingFace forward was timed for that task, and what counts is the ratio of the two. A slow moment of the machine then
falls on both sides of a ratio, and the median over the rounds discards it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# No contender may ask the hub for anything: all weights here are random.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor show its own progress bars.
os.environ["TQDM_DISABLE"] = "1"
# Run from a checkout without installing it, too.
sys.path.append(str(Path(__file__).parent.parent))

import report
import torch
from loading import measure
from rich.progress import track
from subjects import LOADERS, SIZES, Size, load_all, save_checkpoint
from tasks import Task, all_tasks, hf_forward, is_lens

BASE = "HuggingFace"
PACKAGES = ("lensbridge", "transformer-lens", "transformers", "nnsight", "torch")


def seconds(call: Callable[[], Any], repeats: int, device: str = "cpu") -> float:
    """Mean time of one call over some repeats; a GPU is waited for at both ends.

    On one thread it is the processor's time, so that it does not count when other processes have their turn.
    """
    on_gpu = device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.thread_time
    wait()
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return (clock() - start) / repeats


def machine(threads: int, device: str) -> str:
    """The day, and the kind of machine."""
    if device.startswith("cuda"):
        kind = torch.cuda.get_device_name()
    else:
        kind = f"{os.cpu_count()} cores {platform.machine()} without GPU, {threads} thread{'s' if threads > 1 else ''}"
    return f"{datetime.date.today()}, {kind}"


def action(task: Task, model: Any, tokens: torch.Tensor) -> Callable[[], Any] | None:
    """What this contender does for this task, or None."""
    run = task.run if is_lens(model) else task.hf
    return None if run is None else lambda: run(model, tokens)


def one_round(
    models: dict[str, Any], tasks: list[Task], tokens: torch.Tensor, repeats: int, turn: int, device: str
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """Ratios to a plain forward per task and contender, and the times of the plain forwards."""
    names = list(models)
    order = names[turn % len(names) :] + names[: turn % len(names)]
    ratios: dict[str, dict[str, float]] = {}
    plain_times = []
    for task in tasks:
        ratios[task.name] = {}
        for name in order:
            call = action(task, models[name], tokens)
            if call is None:
                continue
            times = max(1, repeats // task.forwards)
            plain = seconds(lambda: hf_forward(models[BASE], tokens), repeats, device)
            ratios[task.name][name] = seconds(call, times, device) / task.forwards / plain
            plain_times.append(plain)
    return ratios, plain_times


def check_agreement(models: dict[str, Any], tokens: torch.Tensor) -> None:
    """Contenders that compute different things must not be compared."""
    expected = hf_forward(models[BASE], tokens).log_softmax(-1)
    for name, model in models.items():
        if is_lens(model):
            torch.testing.assert_close(model(tokens).log_softmax(-1), expected, rtol=1e-3, atol=1e-3, msg=name)


def run_rounds(
    models: dict[str, Any], tasks: list[Task], tokens: torch.Tensor, rounds: int, repeats: int, device: str
) -> tuple[dict[str, Any], float]:
    """All rounds after one that is thrown away; per task and contender median, minimum and every ratio."""
    collected: dict[str, dict[str, list[float]]] = {task.name: {name: [] for name in models} for task in tasks}
    plain_times: list[float] = []
    with torch.no_grad():
        check_agreement(models, tokens)
        one_round(models, tasks, tokens, 1, 0, device)
        for turn in track(range(rounds), description="rounds"):
            gc.collect()
            ratios, plain = one_round(models, tasks, tokens, repeats, turn, device)
            plain_times += plain
            for task, by_name in ratios.items():
                for name, ratio in by_name.items():
                    collected[task][name].append(ratio)
    summary = {
        task: {
            name: {"median": statistics.median(values), "min": min(values), "rounds": values}
            for name, values in by_name.items()
            if values
        }
        for task, by_name in collected.items()
    }
    return summary, 1000 * statistics.median(plain_times)


def load_times(directory: Path, times: int) -> dict[str, Any]:
    """Each contender loaded in child processes, in turns; of each, the fastest load."""
    measured: dict[str, Any] = {}
    for _ in track(range(times), description="loading"):
        for name in LOADERS:
            values = measure(name, directory)
            if name not in measured or values.get("load_s", float("inf")) < measured[name].get("load_s", float("inf")):
                measured[name] = values
    return measured


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from source"
    return {"python": sys.version.split()[0], **found}


def benchmark(size: Size, rounds: int, loads: int, threads: int, device: str) -> dict[str, Any]:
    """Everything about one shape, as plain data."""
    repeats = 1 if size.name == "small" else 20
    every_layer, every_position = (4, 5) if size.name == "small" else (1, 3)
    with tempfile.TemporaryDirectory() as folder:
        directory = save_checkpoint(size, Path(folder))
        loading = load_times(directory, loads) if loads else {}
        models, missing = load_all(directory)
        models = {name: model.to(device) for name, model in models.items()}
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, size.vocab, (1, size.prompt_length), generator=generator).to(device)
        tasks = all_tasks(every_layer, every_position, size.n_layers, size.n_heads, size.prompt_length)
        ratios, hf_forward_ms = run_rounds(models, tasks, tokens, rounds, repeats, device)
    return {
        "size": size.name,
        "title": f"GPT-2 {size.name} shape, batch 1 x {size.prompt_length} tokens, {rounds} rounds; "
        f"plain HF forward {hf_forward_ms:.2f} ms ({machine(threads, device)})",
        "prompt_length": size.prompt_length,
        "rounds": rounds,
        "threads": threads,
        "hf_forward_ms": hf_forward_ms,
        "contenders": list(models),
        "missing": missing,
        "ratios": ratios,
        "loading": loading,
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SIZES, "both"], default="both", help="GPT-2 small's shape, or a tiny one")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per shape")
    parser.add_argument("--loads", type=int, default=3, help="child processes per contender for loading; 0: none")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", help="where the models are, cpu or cuda")
    parser.add_argument("--out", type=Path, help="directory for the JSON, the markdown table and the plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    for size in SIZES.values() if arguments.shape == "both" else [SIZES[arguments.shape]]:
        result = benchmark(size, arguments.rounds, arguments.loads, arguments.threads, arguments.device)
        report.show(result)
        if arguments.out is not None:
            for path in report.write(result, arguments.out):
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
