"""How fast is a model that exists only as a config, next to TransformerLens 3.9.0's own of the same config?

    python benchmarks/native.py --rounds 61 --out benchmarks/results

There is no HuggingFace model to measure against here, so a cell is the time of a task as a multiple of TransformerLens'
for the same task. Both have the same weights, in one process. In each round one does a task right after the other, who
goes first alternates, and the median over the rounds discards the slow moments of the machine.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# No contender shows its own progress bars.
os.environ["TQDM_DISABLE"] = "1"

import report
import torch
from compare import machine, seconds, versions
from rich.progress import track
from subjects import quiet
from tasks import all_tasks, halve
from torch.nn.functional import cross_entropy

Tensor = torch.Tensor
#: Two layers, as small as the tiny shape of ``compare.py``.
SHAPE: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 4,
    "d_model": 64,
    "d_head": 16,
    "n_ctx": 128,
    "d_vocab": 1000,
    "seed": 0,
    "device": "cpu",
}
KINDS: dict[str, dict[str, Any]] = {
    "attention only": {"attn_only": True, "normalization_type": None},
    "ReLU, no norm": {"act_fn": "relu", "normalization_type": None},
    "GELU, layer norm": {"act_fn": "gelu", "normalization_type": "LN"},
    "bidirectional, 2 logits": {"act_fn": "relu", "attention_dir": "bidirectional", "d_vocab_out": 2},
}
#: Tokens in a row, and rows where there are gradients.
LENGTH, ROWS = 15, 32
NOTE = (
    "Time as a multiple of TransformerLens 3.9.0's for the same task on the same two-layer model of a config;\n"
    f"below 1 is faster. Tasks from the loss on take {ROWS} rows."
)


class Contender:
    """One library's model with its optimiser, and the tasks that are about training."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)

    def loss(self, tokens: Tensor) -> Tensor:
        """Next-token loss; of a classifier, that of one class per row."""
        if self.model.cfg.d_vocab_out == 2:
            return cross_entropy(self.model(tokens)[:, 0], tokens[:, 0] % 2)
        return self.model(tokens, return_type="loss")

    def gradients(self, tokens: Tensor) -> None:
        self.loss(tokens).backward()
        self.optimiser.zero_grad()

    def step(self, tokens: Tensor) -> None:
        self.loss(tokens).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def hooked_step(self, tokens: Tensor) -> None:
        with self.model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", halve)]):
            self.step(tokens)

    def cached_gradients(self, tokens: Tensor) -> dict[str, Tensor]:
        cache, forward, backward = self.model.get_caching_hooks(incl_bwd=True)
        with self.model.hooks(fwd_hooks=forward, bwd_hooks=backward):
            self.gradients(tokens)
        return cache


#: What a row does with a contender, and how often in a round.
Row = tuple[Callable[[Contender], Any], int]


def rows(classifies: bool) -> Iterator[tuple[str, Row]]:
    """The rows of the table, in order."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, SHAPE["d_vocab"], (1, LENGTH), generator=generator)
    batch = torch.randint(1, SHAPE["d_vocab"], (ROWS, LENGTH), generator=generator)
    for task in all_tasks(1, 3, SHAPE["n_layers"], SHAPE["n_heads"], LENGTH):
        if classifies and "sweep" in task.name:
            # Its metric is about two tokens of the vocabulary.
            continue
        yield task.name, (partial(without_gradient, run=task.run, tokens=prompt), max(1, 20 // task.forwards))
    training = {
        "loss": Contender.loss,
        "loss and gradients": Contender.gradients,
        "training step, AdamW": Contender.step,
        "training step with a hook": Contender.hooked_step,
        "cache with gradients": Contender.cached_gradients,
    }
    for name, method in training.items():
        yield name, (partial(method, tokens=batch), 5)


def without_gradient(contender: Contender, run: Callable[[Any, Tensor], Any], tokens: Tensor) -> Any:
    with torch.no_grad():
        return run(contender.model, tokens)


def pair(kind: str) -> tuple[Contender, Contender]:
    """Ours and TransformerLens', after a look at whether they compute the same."""
    from transformer_lens import HookedTransformer as Reference
    from transformer_lens.config import HookedTransformerConfig as ReferenceConfig

    from lensbridge import HookedTransformer, HookedTransformerConfig

    fields = SHAPE | KINDS[kind]
    with quiet():
        mine, theirs = HookedTransformer(HookedTransformerConfig(**fields)), Reference(ReferenceConfig(**fields))
    tokens = torch.arange(30).reshape(2, LENGTH)
    torch.testing.assert_close(mine(tokens), theirs(tokens), rtol=1e-4, atol=1e-4, msg=kind)
    return Contender(mine), Contender(theirs)


def benchmark(rounds: int, threads: int) -> dict[str, Any]:
    """Every row for every kind of model, as plain data."""
    contenders = {kind: pair(kind) for kind in KINDS}
    ratios: dict[str, dict[str, Any]] = {}
    forward_ms: list[float] = []
    for kind, both in contenders.items():
        found: dict[str, list[float]] = {}
        tasks = list(rows(classifies=KINDS[kind].get("d_vocab_out") == 2))
        # The first round warms up.
        for turn in track(range(-1, rounds), description=kind):
            gc.collect()
            for name, (run, repeats) in tasks:
                first = turn % 2
                times = [0.0, 0.0]
                for index in (first, 1 - first):
                    times[index] = seconds(partial(run, both[index]), repeats)
                if turn >= 0:
                    found.setdefault(name, []).append(times[0] / times[1])
                    if name == "forward":
                        forward_ms.append(1000 * times[1])
        for name, values in found.items():
            cell = {"median": statistics.median(values), "min": min(values), "rounds": values}
            ratios.setdefault(name, {})[kind] = cell
    return {
        "size": "native",
        "title": f"Models of a config, {rounds} rounds; TransformerLens' forward "
        f"{statistics.median(forward_ms):.2f} ms ({machine(threads, 'cpu')})",
        "note": NOTE,
        "prompt_length": LENGTH,
        "rounds": rounds,
        "threads": threads,
        "contenders": list(KINDS),
        "missing": {},
        "ratios": ratios,
        "loading": {},
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61, help="rounds per kind of model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="directory for the JSON, the markdown table and the plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = benchmark(arguments.rounds, arguments.threads)
    report.show(result)
    if arguments.out is not None:
        for path in report.write(result, arguments.out):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
