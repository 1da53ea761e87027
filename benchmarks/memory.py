"""How much memory does looking take?

    python benchmarks/memory.py --out benchmarks/results

Of a cache of everything, the bytes that are really held: each storage once, and whatever entries that wait to be
computed keep alive. Then the peak of resident memory of long contexts, each task in a process of its own, against
HuggingFace's own forward.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
sys.path.append(str(Path(__file__).parent.parent))

import report
import torch
from compare import machine, versions
from loading import memory_mib
from rich.progress import track
from subjects import SIZES, load_lensbridge, load_lensbridge_raw, load_transformer_lens, quiet, save_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

LENGTHS = (15, 128, 512)
#: For the long context: 4 layers of GPT-2 small's width, and tokens.
LAYERS, CONTEXT = 4, 4096
TASKS = ("HuggingFace", "cache of every resid_post", "pattern of one layer", "pattern of every layer, last position")


def held(values: Iterable[torch.Tensor], but: Iterable[torch.Tensor] = ()) -> int:
    """The bytes behind some tensors, each storage once, without those that are held anyway."""
    without = {value.untyped_storage().data_ptr() for value in but}
    storages = [value.untyped_storage() for value in values]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in without}.values())


def caches() -> dict[str, Any]:
    """Per length of the prompt and contender: the bytes of a cache of everything, with and without the logits."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = save_checkpoint(SIZES["small"], Path(folder))
        with quiet():
            theirs, mine, raw = (
                load(directory) for load in (load_transformer_lens, load_lensbridge, load_lensbridge_raw)
            )
        for length in track(LENGTHS, description="caches"):
            tokens = torch.randint(1, 900, (1, length), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                logits, cache = theirs.run_with_cache(tokens)
                names = set(cache)
                values = list(cache.values())
                found[str(length)] = {"TransformerLens 3.9.0": {"all": held(values), "besides": held(values, [logits])}}
                for name, model in (("lensbridge", mine), ("lensbridge, no processing", raw)):
                    logits, cache = model.run_with_cache(tokens)
                    assert set(cache) == names, set(cache) ^ names
                    values = cache.cache_dict.held()
                    found[str(length)][name] = {"all": held(values), "besides": held(values, [logits])}
    return found


def long_context(task: str) -> dict[str, float]:
    """One task on a long context, in this process; its peak, and what it keeps."""
    from lensbridge import HookedTransformer

    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_positions=CONTEXT, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    hf = GPT2LMHeadModel(config).eval()
    hf.set_attn_implementation("sdpa")
    with quiet():
        model = HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hf)
    tokens = torch.randint(1, 1000, (1, CONTEXT))
    cache: Any = {}
    with torch.no_grad():
        # What is made once should not count.
        model.run_with_cache(tokens[:, :4])
        before = memory_mib("VmHWM")
        if task == TASKS[0]:
            hf(tokens)
        elif task == TASKS[1]:
            cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("resid_post"))[1]
        elif task == TASKS[2]:
            cache = model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")[1]
        else:
            cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("pattern"), pos_slice=-1)[1]
    return {
        "before_mib": before,
        "peak_mib": memory_mib("VmHWM"),
        "kept_mib": held(cache.values()) / 2**20 if cache else 0.0,
    }


def in_a_process(task: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--task", task], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def markdown(result: dict[str, Any]) -> str:
    """Two tables: caches, long contexts."""
    contenders = list(next(iter(result["caches"].values())))
    base = contenders[0]
    header = ["cache of everything, MiB", *contenders]
    rows = []
    for length, cells in result["caches"].items():
        for what, words in (("besides", "besides the logits"), ("all", "with the logits")):
            row = [f"{length} tokens, {words}"]
            for name in contenders:
                size, ratio = cells[name][what] / 2**20, cells[name][what] / cells[base][what]
                row.append(f"{size:.1f}" if name == base else f"{size:.1f} ({ratio:.2f} x)")
            rows.append(row)
    plain = result["long"][TASKS[0]]["peak_mib"]
    peaks = [
        [task, f"{cell['peak_mib']:.0f}", f"{cell['peak_mib'] - plain:+.0f}", f"{cell['kept_mib']:.0f}"]
        for task, cell in result["long"].items()
    ]
    title = f"{LAYERS} layers of GPT-2 small's width, {CONTEXT} tokens, sdpa"
    second = report.table([title, "peak, MiB", "more than HF", "kept, MiB"], peaks)
    return report.page(result, header, rows, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="measure this one here, and print a line of JSON")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="directory for the JSON and the markdown table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    if arguments.task:
        print(json.dumps(long_context(arguments.task)))
        return
    result = {
        "size": "memory",
        "title": f"Memory ({machine(arguments.threads, 'cpu')})",
        "caches": caches(),
        "long": {task: in_a_process(task) for task in track(TASKS, description="long contexts")},
        "versions": versions(),
    }
    report.finish(result, markdown(result), None, arguments.out)


if __name__ == "__main__":
    main()
