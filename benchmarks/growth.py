"""How does the cost of looking grow, and does anything stay behind?

    python benchmarks/growth.py --out benchmarks/results

What a run adds to the plain forward is measured while one thing grows and the others stay: layers, positions, rows of
the batch, hooks. Then one small model runs ten thousand times with hooks and caches, and memory, hooks and plans are
counted before and after.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import tracemalloc
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import report
import torch
from compare import machine, seconds, versions
from loading import memory_mib
from rich.progress import track
from subjects import quiet
from tasks import halve
from transformers import GPT2Config, GPT2LMHeadModel

WIDTH, VOCABULARY = 64, 1000
#: What grows -> its values; otherwise 4 layers, 16 positions, 1 row, 1 hook.
GROWING: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "positions": (16, 64, 128, 256),
    "rows": (1, 4, 8, 16),
    "hooks": (1, 8, 16, 32),
}
USUAL = {"layers": 4, "positions": 16, "rows": 1, "hooks": 1}


def build(layers: int, device: str) -> tuple[Any, Any]:
    """A small GPT-2 and ours on it."""
    from lensbridge import HookedTransformer

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_head=4,
        n_embd=WIDTH,
        n_positions=256,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    hf = GPT2LMHeadModel(config).eval().to(device)
    hf.set_attn_implementation("eager")
    with quiet():
        return hf, HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hf)


def added(hf: Any, run: Callable[[], Any], tokens: torch.Tensor, rounds: int, device: str) -> dict[str, float]:
    """The median of what a run adds to the plain forward, in microseconds, and of the forward itself."""
    found, plain = [], []
    for turn in range(-1, rounds):
        before = seconds(lambda: hf(tokens).logits, 3, device)
        time = seconds(run, 3, device)
        forward = (before + seconds(lambda: hf(tokens).logits, 3, device)) / 2
        if turn >= 0:
            found.append(1e6 * (time - forward))
            plain.append(1e6 * forward)
    return {"added_us": statistics.median(found), "forward_us": statistics.median(plain)}


def grow(rounds: int, device: str) -> dict[str, Any]:
    """Per thing that grows, what a cache of everything and what hooks add at each of its values."""
    lines: dict[str, Any] = {}
    for what, values in GROWING.items():
        lines[what] = {"cache of everything": [], "hooks": []}
        for value in track(values, description=what):
            at = USUAL | {what: value}
            hf, model = build(at["layers"], device)
            tokens = torch.randint(1, VOCABULARY, (at["rows"], at["positions"])).to(device)
            names = [name for name in model.hook_dict if name.endswith(("hook_z", "hook_q", "hook_post", "hook_pre"))]
            names = (names * 8)[: at["hooks"]]
            runs: dict[str, Callable[[], Any]] = {
                "cache of everything": lambda model=model, tokens=tokens: model.run_with_cache(tokens),
                "hooks": lambda model=model, tokens=tokens, names=names: model.run_with_hooks(
                    tokens, fwd_hooks=[(name, halve) for name in names]
                ),
            }
            with torch.no_grad():
                for name, run in runs.items():
                    lines[what][name].append({"at": value} | added(hf, run, tokens, rounds, device))
    return lines


def soak(runs: int, device: str) -> dict[str, Any]:
    """Many runs of several kinds; what they leave behind."""
    hf, model = build(2, device)
    tokens = torch.randint(1, VOCABULARY, (1, 8)).to(device)
    engine = model.interior.engine

    def some() -> None:
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", halve)])
        model.run_with_cache(tokens)
        model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))[1]["pattern", 0].sum()
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", halve), ("blocks.1.mlp.hook_post", halve)]):
            model(tokens)

    with torch.no_grad():
        for _ in range(50):
            some()
        gc.collect()
        tracemalloc.start()
        kept, resident, plans = tracemalloc.get_traced_memory()[0], memory_mib("VmRSS"), engine.plans_made
        for _ in track(range(runs // 4), description="soak"):
            some()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    return {
        "runs": runs,
        "python_bytes": after - kept,
        "resident_mib": memory_mib("VmRSS") - resident,
        "hooks_left": sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values()),
        "torch_hooks_left": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()),
        "plans_made": engine.plans_made - plans,
    }


def markdown(result: dict[str, Any]) -> str:
    """One row for each thing that grows."""
    header = ["added to the plain forward, us", "cache of everything", "hooks"]
    rows = []
    for what, line in result["lines"].items():
        cells = []
        for task in header[1:]:
            cells.append(", ".join(f"{point['at']}: {point['added_us']:.0f}" for point in line[task]))
        rows.append([what, *cells])
    soak = result["soak"]
    text = (
        f"Soak: {soak['runs']} runs with hooks and caches left {soak['python_bytes'] / 1024:.0f} KiB of Python objects "
        f"and {soak['resident_mib']:.1f} MiB of resident memory, "
        f"{soak['hooks_left'] + soak['torch_hooks_left']} hooks, and made {soak['plans_made']} plans."
    )
    return report.page(result, header, rows, text)


def svg(result: dict[str, Any]) -> str:
    """A panel for each thing that grows: what is added, over its values."""
    panels, width, height = [], 260, 200
    for index, (what, line) in enumerate(result["lines"].items()):
        left = 50 + index * (width + 30)
        every = [point for points in line.values() for point in points]
        most, last = max(point["added_us"] for point in every), max(point["at"] for point in every)
        panels.append(f'<text x="{left}" y="40" font-weight="bold">{escape(what)}</text>')
        panels.append(f'<path d="M{left},50 v{height} h{width}" stroke="#999" fill="none"/>')
        panels.append(f'<text x="{left}" y="{70 + height}">0</text>')
        panels.append(f'<text x="{left + width}" y="{70 + height}" text-anchor="end">{last}</text>')
        panels.append(f'<text x="{left + 4}" y="60" font-size="10">{most:.0f} us</text>')
        for colour, (task, points) in zip(report.COLOURS[1:], line.items(), strict=False):
            places = [
                (left + width * point["at"] / last, 50 + height * (1 - point["added_us"] / most)) for point in points
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            panels.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            panels += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
            if index == 0:
                at = 60 + 16 * list(line).index(task)
                panels.append(f'<text x="{left + 90}" y="{at}" fill="{colour}">{escape(task)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{50 + 4 * (width + 30)}" height="290" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="18" font-weight="bold">{escape(result["title"])}</text>{"".join(panels)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="rounds per value")
    parser.add_argument("--soak", type=int, default=10000, help="runs of the soak")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", help="where the models are, cpu or cuda")
    parser.add_argument("--out", type=Path, help="directory for the JSON, the markdown table and the plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    result = {
        "size": "growth",
        "title": f"Growth of the cost, width {WIDTH} ({machine(arguments.threads, arguments.device)})",
        "lines": grow(arguments.rounds, arguments.device),
        "soak": soak(arguments.soak, arguments.device),
        "versions": versions(),
    }
    report.finish(result, markdown(result), svg(result), arguments.out)


if __name__ == "__main__":
    main()
