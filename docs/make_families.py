"""What does the page ``docs/families.md`` say? What `lensbridge.checking` finds on a tiny model of every family.

``python docs/make_families.py`` checks all families and writes the page, which takes minutes; with names of families it
checks these, and leaves the other rows as they are; with ``--data`` it checks none. What the table says goes into
``lensbridge/assets/families.json`` as well, which ``lensbridge models`` shows. The tests make the same checks and
compare each row.
"""

from __future__ import annotations

import ast
import json
import logging
import sys
import textwrap
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lensbridge.architectures import BY_CLASS
from lensbridge.checking import KNOWN, Report, check_model, hooked
from lensbridge.checking.baseline import ONE_COPY_EACH
from lensbridge.checking.families import family_class, refusal
from lensbridge.points import ABSENT
from lensbridge.tiny import FAMILIES, UNBUILDABLE, tiny_family

PAGE = Path(__file__).with_name("families.md")
DATA = Path(__file__).parent.parent / "lensbridge" / "assets" / "families.json"
COMPARED = Path(__file__).parent.parent / "compat_tests" / "rough_families.py"

#: column -> the groups of checks that it stands for.
COLUMNS = {
    "identities": ("identities", "identities, processed", "HuggingFace's values"),
    "edits": ("edits", "effects"),
    "gradients": ("gradients",),
    "HF exact": ("exactness", "bfloat16"),
    "weights": ("weights",),
    "processing": ("processing",),
    "padding": ("padding",),
    "generation": ("generation",),
}
#: letter -> why a point does not exist.
LETTERS = dict(zip([*ascii_lowercase, "aa", "bb", "cc", "dd", "ee"], [*ABSENT.values(), ONE_COPY_EACH], strict=False))
SCORES, NEURONS = "blocks.{l}.attn.hook_attn_scores", "blocks.{l}.mlp.hook_pre"
#: What the full vocabulary has in every layer, besides the neurons of MLPs that have them.
ATTENTION = (
    *(f"blocks.{{l}}.hook_{short}" for short in ("resid_pre", "attn_out", "mlp_out", "resid_post")),
    *(f"blocks.{{l}}.attn.hook_{short}" for short in ("q", "k", "v", "attn_scores", "pattern", "z", "result")),
)
NOT_SERVED = "not served:"
#: How many of the causal language models of transformers TransformerLens 4.3.0's TransformerBridge lists.
BRIDGE = 95

HEAD = """\
# Families

<!-- Made by docs/make_families.py; `make families` checks everything and writes it anew. -->

Every family of causal language models in transformers, by its `model_type`, and variants of some. All of this is
checked on a tiny random model of each, against HuggingFace's own forward. `lensbridge check gemma2` shows it check by
check, and `lensbridge check` with the name of a model makes the same checks on that model.

- **vocabulary**: "full" has the stream, attention and the neurons of its MLPs in every layer (not those of experts that
  are laid out in a way of their own); "attention in some layers" where others have a recurrence in its place;
  "attention" without some of its points, queries and keys before their rotation, say; "stream" without any of them
- **points**: how many kinds of hook points there are; the letters, explained below, say why there is none of another
  kind in some layer
- **identities**: the points' values fit together as [design.md](design.md) says, without processing and with the
  default, and are what HuggingFace's modules were given and gave back
- **edits**: an edit at each point has the effect that it must have, and no other
- **gradients**: they come by each point, and are HuggingFace's there and at the parameters
- **HF exact**: logits equal HuggingFace's bit by bit, without hooks, with a hook that looks on at every point, and
  with a full cache, with both implementations of attention, in float32 and bfloat16
- **weights**: those that TransformerLens has for such layers are there, as views of the parameters
- **processing**: log probabilities after `from_pretrained`'s default processing are HuggingFace's
- **padding**, **generation**: padded batches, on either side, and greedy generation with a cache give HuggingFace's
  logits and tokens
- **3.9.0**: every point, weight, edit and gradient is also compared with TransformerLens 3.9.0's
"""


def compared() -> set[str]:
    """The HuggingFace classes that are compared with TransformerLens 3.9.0; GPT-2 is in most files of that folder."""
    calls = [node for node in ast.walk(ast.parse(COMPARED.read_text("utf-8"))) if isinstance(node, ast.Call)]
    families = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Family"]
    return {"GPT2LMHeadModel", *(str(ast.literal_eval(call.args[1])) for call in families)}


def cell(report: Report, groups: tuple[str, ...]) -> str:
    """How the checks of a column went."""
    counts = sum((report.counts(group) for group in groups), start=report.counts(""))
    wrong = counts["known"] + counts["fails"]
    if not wrong:
        return "all"
    return f"all but {wrong}" if counts["holds"] else "none"


def points(report: Report) -> str:
    """How many kinds of points there are, and why there is none of the others."""
    outcomes = report.of("points")
    reasons = {reason for outcome in outcomes for reason in outcome.lacking}
    letters = [letter for letter, reason in LETTERS.items() if reason in reasons]
    return f"{sum(outcome.status == 'holds' for outcome in outcomes)} {' '.join(letters)}".strip()


def vocabulary(report: Report) -> str:
    """Which of TransformerLens' points there are, in a word."""
    found = {outcome.check: outcome for outcome in report.of("points")}
    whole = all(found[point].status == "holds" and not found[point].lacking for point in ATTENTION)
    if found[SCORES].status != "holds":
        return "stream"
    if found[SCORES].lacking:
        return "attention in some layers"
    return "full" if whole and not set(found[NEURONS].lacking) - {ABSENT["neurons"]} else "attention"


def row(key: str, report: Report) -> str:
    """The line of a family that was checked."""
    cells = [vocabulary(report), points(report), *(cell(report, groups) for groups in COLUMNS.values())]
    return _line(key, cells, "yes" if family_class(key) in compared() else "")


def row_of_refused(key: str) -> str:
    """The line of a family that is not served."""
    reason = refusal(key) if family_class(key) in BY_CLASS else "there is no record of it"
    return _line(key, [f"{NOT_SERVED} {reason}", *[""] * (len(COLUMNS) + 1)], "")


def _line(key: str, cells: list[str], last: str) -> str:
    return f"| {' | '.join([f'`{key}`', f'`{family_class(key)}`', *cells, last])} |"


def served(key: str) -> bool:
    """Whether there is something to check."""
    return family_class(key) in BY_CLASS and refusal(key) is None


def exceptions() -> list[str]:
    """What is known not to hold, line by line."""
    return [
        f"- `{key}`, {group}, {check}: {reason}"
        for key, groups in sorted(KNOWN.items())
        for group, checks in groups.items()
        for check, reason in checks.items()
    ]


def totals(rows: dict[str, str]) -> str:
    """What the table adds up to, in words."""
    kinds = Counter(rows[key].split(" | ")[2] for key in FAMILIES if served(key) and "@" not in key)
    variants = sum(served(key) for key in FAMILIES) - sum(kinds.values())
    attending = sum(kinds.values()) - kinds["stream"]
    entries, served_ones = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), sum(kinds.values())
    sentence = (
        f"Of the {entries} entries in transformers' list of causal language models {served_ones} are served, "
        f"{kinds['full']} of them with TransformerLens' full vocabulary and {attending} with points inside attention; "
        f"and {variants} variants of them. TransformerLens 4.3.0's TransformerBridge lists {BRIDGE} of the entries."
    )
    return textwrap.fill(sentence, 120)


def render(rows: dict[str, str]) -> str:
    """The whole page, of the line of each family."""
    columns = ["family", "class", "vocabulary", "points", *COLUMNS, "3.9.0"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(rows[key] for key in FAMILIES)]
    letters = [f"- **{letter}**: {reason}" for letter, reason in LETTERS.items()]
    not_built = [f"- `{key}`: {reason}" for key, reason in UNBUILDABLE.items()]
    sections = [
        HEAD,
        totals(rows) + "\n",
        "\n".join(table) + "\n",
        "## Why a point is absent\n",
        "\n".join(letters) + "\n",
        "## What does not hold\n",
        "\n".join(exceptions() or ["Nothing that is known."]) + "\n",
        "## Not checked\n",
        "\n".join(not_built) + "\n",
    ]
    return "\n".join(sections)


def rows_of(page: str) -> dict[str, str]:
    """The line of each family of a page."""
    return {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}


def data_of(rows: dict[str, str]) -> str:
    """The table as JSON: family -> its class, and what each column says of it or why it is not served."""
    columns, found = ("vocabulary", "points", *COLUMNS, "3.9.0"), dict[str, dict[str, str]]()
    for key in [key for key in FAMILIES if key in rows]:
        _, hf_class, *cells = (cell.strip() for cell in rows[key].removeprefix("|").removesuffix("|").split("|"))
        found[key] = {"class": hf_class.strip("`")}
        if cells[0].startswith(NOT_SERVED):
            found[key]["not served"] = cells[0].removeprefix(NOT_SERVED).strip()
        else:
            found[key] |= dict(zip(columns, cells, strict=True))
    about = "What docs/families.md says of each family; both are made by docs/make_families.py."
    return json.dumps({"about": about, "families": found}, indent=1) + "\n"


def write(rows: dict[str, str]) -> None:
    """Write the page and its data."""
    PAGE.write_text(render(rows), encoding="utf-8")
    DATA.write_text(data_of(rows), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Check families, all of them if none is named, and write the page."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = rows_of(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    if arguments == ["--data"]:
        DATA.write_text(data_of(rows), encoding="utf-8")
        return
    wanted = [
        key
        for key in FAMILIES
        if served(key) and (not arguments or key in arguments or NOT_SERVED in rows.get(key, NOT_SERVED))
    ]
    rows |= {key: _line(key, [NOT_SERVED, *[""] * (len(COLUMNS) + 1)], "") for key in wanted}
    rows |= {key: row_of_refused(key) for key in FAMILIES if not served(key)}
    for key in wanted:
        report = check_model(hooked(tiny_family(key), key), KNOWN.get(key))
        print(key, *(f"\n    {each.group}: {each.check}: {each.detail}" for each in report.failures), flush=True)
        rows[key] = row(key, report)
        # Whoever loses patience keeps what was found.
        write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
