"""What does looking cost, from a model as small as they come to one of a billion parameters?

    python benchmarks/sizes.py --rounds 15 --out benchmarks/results

A run has a fixed cost and a cost for each point, which do not grow with the model: they are most of what a run on two
layers of width 64 takes, and little of what one on a billion parameters does. So the table has both, the ratio to the
plain forward and the time that is added to it. In each round a task stands between two plain forwards.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import report
import torch
from compare import machine, seconds, versions
from rich.progress import track
from subjects import quiet
from tasks import halve
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LENGTH = 15


def tiny() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=128, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    )


def small() -> Any:
    return GPT2LMHeadModel(GPT2Config())


def billion() -> Any:
    """TinyLlama's shape, in bfloat16."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


#: What is built, as what HuggingFace knows it, how often a task is repeated, and for how many rounds at most.
SHAPES: dict[str, tuple[Callable[[], Any], str, int, int]] = {
    "2 layers of width 64": (tiny, "gpt2", 20, 1000),
    "GPT-2 small": (small, "gpt2", 1, 1000),
    "Llama, 1.1 billion, bfloat16": (billion, "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1, 5),
}


def tasks(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The rows."""
    middle = f"blocks.{model.cfg.n_layers // 2}"
    return {
        "forward": lambda: model(tokens),
        "cache of one point": lambda: model.run_with_cache(tokens, names_filter=f"{middle}.hook_resid_post"),
        "cache of every resid_post": lambda: model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_resid_post")
        ),
        "one editing hook": lambda: model.run_with_hooks(tokens, fwd_hooks=[(f"{middle}.attn.hook_z", halve)]),
        "cache of everything": lambda: model.run_with_cache(tokens),
    }


def measure(
    hf: Any, model: Any, tokens: torch.Tensor, repeats: int, rounds: int, device: str, description: str
) -> tuple[dict[str, dict[str, float]], float]:
    """Per task the median ratio to the plain forward and the median of what is added, in microseconds; the forward."""
    found: dict[str, list[tuple[float, float]]] = {}
    plain_ms: list[float] = []
    with torch.no_grad():
        for turn in track(range(-1, rounds), description=description):
            gc.collect()
            for name, run in tasks(model, tokens).items():
                before = seconds(lambda: hf(tokens).logits, repeats, device)
                time = seconds(run, repeats, device)
                plain = (before + seconds(lambda: hf(tokens).logits, repeats, device)) / 2
                if turn >= 0:
                    found.setdefault(name, []).append((time / plain, 1e6 * (time - plain)))
                    plain_ms.append(1e3 * plain)
    cells = {
        name: {
            "ratio": statistics.median(ratio for ratio, _ in values),
            "added_us": statistics.median(added for _, added in values),
        }
        for name, values in found.items()
    }
    return cells, statistics.median(plain_ms)


def benchmark(rounds: int, threads: int, device: str) -> dict[str, Any]:
    """Every row for every size, as plain data."""
    from lensbridge import HookedTransformer

    shapes: dict[str, Any] = {}
    for title, (build, name, repeats, most) in SHAPES.items():
        torch.manual_seed(0)
        hf = build().eval().to(device)
        hf.set_attn_implementation("eager")
        tokens = torch.randint(1, 900, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
        for kind, load in (
            ("as processed", HookedTransformer.from_pretrained),
            ("no processing", HookedTransformer.from_pretrained_no_processing),
        ):
            with quiet():
                model = load(name, hf_model=hf)
            points = len(model.run_with_cache(tokens)[1])
            cells, plain = measure(hf, model, tokens, repeats, min(rounds, most), device, f"{title}, {kind}")
            shapes[f"{title}, {kind}"] = {"points": points, "forward_ms": plain, "tasks": cells}
        del hf, model
    return {
        "size": "sizes",
        "title": f"Cost by size, batch 1 x {LENGTH} tokens, {rounds} rounds ({machine(threads, device)})",
        "shapes": shapes,
        "versions": versions(),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table: a ratio, and what is added in microseconds, per run and for each point."""
    header = ["ratio (added, us)", *result["shapes"]]
    first = next(iter(result["shapes"].values()))
    rows = [["plain HF forward, ms", *(f"{shape['forward_ms']:.2f}" for shape in result["shapes"].values())]]
    for task in first["tasks"]:
        cells = (shape["tasks"][task] for shape in result["shapes"].values())
        rows.append([task, *(f"{cell['ratio']:.3f} ({cell['added_us']:.0f})" for cell in cells)])
    each = []
    for shape in result["shapes"].values():
        one, every = (shape["tasks"][task]["added_us"] for task in ("cache of one point", "cache of everything"))
        each.append(f"{(every - one) / (shape['points'] - 1):.1f} ({shape['points']} points)")
    rows.append(["each further point, us", *each])
    return report.page(result, header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds per size")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", help="where the models are, cpu or cuda")
    parser.add_argument("--out", type=Path, help="directory for the JSON and the markdown table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    result = benchmark(arguments.rounds, arguments.threads, arguments.device)
    report.finish(result, markdown(result), None, arguments.out)


if __name__ == "__main__":
    main()
