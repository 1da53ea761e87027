"""Which numbers stand in the README? Those that were measured: of the bundled model, and of the benchmark.

``python docs/make_readme.py`` fills the sections that begin with ``<!-- toy -->`` and ``<!-- benchmark -->``. The
scores of the bundled model lie beside it; a benchmark's results exist only where one was run (``benchmarks/results``,
or the directory that is named on the command line), and without them that section stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

from lensbridge.assets import TOY_DIRECTORY

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

HOW_TO_READ = """\
A run has a fixed cost and one for each point that it keeps, which do not grow with the model: the first table has them
in microseconds beside the ratio to a plain HuggingFace forward pass of the same attention implementation. Further down,
time is a multiple of that pass, median (minimum) over the rounds. The runs of a sweep can share forward passes, so that
one of them may take less time than a pass of its own. `make benchmarks` measures all of it anew;
[benchmarks/](benchmarks/README.md) says what each row does."""


def head(score: dict[str, Any]) -> str:
    """``L2H1 (0.93)`` for head 1 of layer 2."""
    return "L{}H{}".format(*score["head"].split(".")) + f" ({score['score']:.2f})"


def toy_section(scores: dict[str, Any]) -> str:
    """What the bundled model can do, in a paragraph."""
    losses, ioi = scores["repeated_tokens_loss"], scores["ioi"]
    pairs, templates = ioi["held_out_pairs"], ioi["held_out_templates"]
    text = f"""
    `"toy"` is a GPT-2 with 4 layers of width 128 and a tokenizer of its own, trained by
    [examples/train_toy.py](examples/train_toy.py) to show the circuits that the demo looks for. Measured on rows and
    sentences that it was not trained on: on random tokens that come twice, its best induction head is
    {head(scores["induction_head"])} and its best previous-token head {head(scores["previous_token_head"])}, in mean
    attention; the loss is {losses["first_copy"]:.2f} nats per token in the first copy and {losses["second_copy"]:.2f}
    in the second. It prefers the indirect object to the subject in {pairs["accuracy"]:.1%} of sentences with new pairs
    of names and {templates["accuracy"]:.1%} in new templates, with mean logit differences of
    {pairs["logit_difference"]:.2f} and {templates["logit_difference"]:.2f}. How each is measured stands in
    [scores.json](lensbridge/assets/toy/scores.json)."""
    return fill(" ".join(text.split()), width=120, break_long_words=False, break_on_hyphens=False)


def benchmark_section(results: list[str]) -> str:
    """The tables of a benchmark, one page of results per model shape, under a sentence that says how to read them."""
    pages = [re.sub(r"^### (.*)$", r"**\1**", page, flags=re.MULTILINE).strip() for page in results]
    versions = re.search(r"^Versions: .*$", pages[-1], re.MULTILINE)
    tables = [re.sub(r"^Versions: .*$", "", page, flags=re.MULTILINE).strip() for page in pages]
    return "\n\n".join([HOW_TO_READ, *tables, *([versions[0]] if versions else [])])


def filled(text: str, name: str, section: str) -> str:
    """``text`` with the part between the two marks of a section replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def render(results: Path = RESULTS) -> str:
    """The README with its sections filled."""
    scores = json.loads((TOY_DIRECTORY / "scores.json").read_text(encoding="utf-8"))["scores"]
    text = filled(README.read_text(encoding="utf-8"), "toy", toy_section(scores))
    pages = [results / f"{name}.md" for name in ("sizes", "memory", "small", "tiny", "native", "growth")]
    found = [page.read_text(encoding="utf-8") for page in pages if page.exists()]
    return filled(text, "benchmark", benchmark_section(found)) if found else text


if __name__ == "__main__":
    README.write_text(render(*map(Path, sys.argv[1:2])), encoding="utf-8")
