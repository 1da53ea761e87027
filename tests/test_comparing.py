"""Does a comparison find what is wrong, and say so in the terminal, in JSON, on the page and by its exit code?

TransformerLens is left out here; compat_tests/test_comparing.py asks it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import cli
from lensbridge.basis import Basis
from lensbridge.checking import hooked
from lensbridge.checking.families import recorded, refusal
from lensbridge.comparing import children, worker
from lensbridge.comparing.command import compare
from lensbridge.comparing.costs import cost_of
from lensbridge.comparing.gaps import Gap
from lensbridge.comparing.huggingface import HuggingFaceComparison
from lensbridge.comparing.prompts import PROMPTS, token_batches
from lensbridge.comparing.result import (
    HUGGINGFACE,
    LOG_PROBABILITIES,
    LOGITS,
    PROCESSED,
    RAW,
    SCHEMA,
    Comparison,
    Difference,
    worst_by_kind,
)
from lensbridge.engine.sites import PlainSite, Run, StreamSite
from lensbridge.errors import LensbridgeError
from lensbridge.tiny import tiny_family

#: Nothing but this process.
ALONE = ["--without-reference", "--rounds", "0", "--device", "cpu", "--quiet"]
SERVED = [key for key in recorded() if refusal(key) is None]
#: One of each build: sequential, parallel, experts, latent attention, a recurrence, norms around, scaled embeddings.
SOME = ("gpt2", "falcon", "mixtral", "deepseek_v3", "jamba", "gemma2", "bloom", "roberta")


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is wrong at one kind of point: neurons come out a hundredth too large."""
    read = Run.read

    def record(self: PlainSite, run: Run) -> None:
        run.keep(self.names[0], read(run, self.place) * (1.01 if self.names[0].endswith("mlp.hook_post") else 1))

    monkeypatch.setattr(PlainSite, "record", record)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_gap_is_over_all_pairs() -> None:
    gap = Gap()
    gap.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    gap.add(torch.tensor([[10.0, 10.0]]), torch.tensor([[10.0, 9.0]]))
    assert (gap.largest, gap.mean) == (2.0, 3 / 4)
    assert (gap.relative, gap.relative_mean) == (0.5, 3 / 24)
    assert not gap.same_bits and not gap.problem


def test_a_gap_of_the_same_tensors_is_none() -> None:
    gap = Gap()
    gap.add(torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf]))
    assert gap.same_bits and gap.relative == gap.relative_mean == 0.0


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.tensor([math.nan, 1.0]), torch.ones(2)),
        (torch.tensor([math.inf]), torch.tensor([-math.inf])),
    ],
)
def test_what_cannot_be_subtracted_is_infinitely_far(mine: Tensor, theirs: Tensor) -> None:
    gap = Gap()
    gap.add(mine, theirs)
    assert gap.problem and gap.relative == gap.mean == math.inf
    assert Difference.of(HUGGINGFACE, RAW, "hook_embed", "", gap, 1e-4).status == "fails"


def test_equal_numbers_of_another_dtype_have_other_bits() -> None:
    gap = Gap()
    gap.add(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert gap.relative == 0.0 and not gap.same_bits


def test_the_worst_of_a_kind_is_one_that_fails() -> None:
    near, far = Gap(), Gap()
    near.add(torch.tensor([1.001]), torch.tensor([1.0]))
    far.add(torch.tensor([1.01]), torch.tensor([1.0]))
    rows = [
        Difference.of(HUGGINGFACE, RAW, "blocks.0.hook_resid_pre", "", far, 1e-4, "a reason"),
        Difference.of(HUGGINGFACE, RAW, "blocks.1.hook_resid_pre", "", near, 1e-4),
        Difference.of(HUGGINGFACE, RAW, "blocks.2.hook_resid_pre", "", near, 1e-2),
    ]
    assert [row.status for row in rows] == ["known", "fails", "holds"]
    assert [row.layer for row in worst_by_kind(rows)] == [1]


# --- next to HuggingFace ----------------------------------------------------------------------------------------------


def compared(key: str) -> HuggingFaceComparison:
    model = hooked(tiny_family(key), key)
    comparison = HuggingFaceComparison((RAW, PROCESSED), 1e-4)
    comparison.add(model, token_batches(model, None)[0][1])
    return comparison


def check_family(key: str) -> None:
    comparison = compared(key)
    broken = [promise for promise in comparison.promises() if promise.holds is False]
    assert not broken, broken
    logits = [each for each in comparison.differences() if each.point == LOGITS]
    assert [each.same_bits for each in logits] == [True]


@pytest.mark.parametrize("key", SOME)
def test_a_family_is_as_far_from_huggingface_as_it_may_be(key: str) -> None:
    check_family(key)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in SERVED if key not in SOME])
def test_every_family_is_as_far_from_huggingface_as_it_may_be(key: str) -> None:
    check_family(key)


def test_every_point_is_compared_in_both_bases() -> None:
    comparison, model = compared("gpt2"), hooked(tiny_family("gpt2"))
    for basis, whole in ((RAW, LOGITS), (PROCESSED, LOG_PROBABILITIES)):
        points = [each.point for each in comparison.differences() if each.basis == basis]
        assert sorted(points) == sorted([*model.interior.points(), whole])


def test_what_a_module_shows_is_compared_with_it() -> None:
    rows = {each.point: each for each in compared("gpt2").differences() if each.basis == RAW}
    for point, source in (
        ("hook_embed", "output of transformer.wte"),
        ("blocks.1.hook_resid_pre", "input of transformer.h.1"),
        ("blocks.0.attn.hook_q", "output of transformer.h.0.attn.c_attn"),
        ("blocks.0.attn.hook_pattern", "HuggingFace's output_attentions"),
        ("blocks.0.attn.hook_z", "input of transformer.h.0.attn.c_proj"),
        ("blocks.0.ln2.hook_normalized", "output of transformer.h.0.ln_2"),
        ("blocks.1.mlp.hook_post", "input of transformer.h.1.mlp.c_proj"),
    ):
        assert rows[point].source == source
        assert rows[point].same_bits or point.endswith("normalized")
    assert rows["blocks.0.attn.hook_result"].source == "z @ W_O, by head"


@pytest.mark.parametrize("basis", [RAW, PROCESSED])
def test_a_stream_that_is_wrong_is_found_out(basis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamSite, "record", lambda self, run: run.keep(self.names[0], run.read(self.place) * 1.001))
    wrong = {each.kind for each in compared("llama").differences() if each.basis == basis and each.status == "fails"}
    assert {"blocks.{l}.hook_resid_pre", "blocks.{l}.hook_resid_mid", "blocks.{l}.hook_resid_post"} <= wrong
    assert "blocks.{l}.attn.hook_q" not in wrong, "queries are compared with the projection's own output"


def test_processing_that_changes_probabilities_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Basis.logits
    monkeypatch.setattr(Basis, "logits", lambda self, value, ours=False: 1.001 * logits(self, value, ours))
    promises = {promise.name: promise.holds for promise in compared("gpt2").promises()}
    assert promises["log probabilities are HuggingFace's, with processing"] is False


def test_an_equation_that_cannot_be_computed_is_a_known_one_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(look: Any) -> Tensor:
        raise ZeroDivisionError("no such thing")

    from lensbridge.comparing import sources

    own = sources.identities_of
    monkeypatch.setattr(
        sources,
        "identities_of",
        lambda subject: [
            each._replace(value=fail) if each.point == "blocks.0.attn.hook_attn_scores" else each
            for each in own(subject)
        ],
    )
    rows = {(each.basis, each.point): each for each in compared("gpt2").differences()}
    row = rows[RAW, "blocks.0.attn.hook_attn_scores"]
    assert row.status == "fails" and row.reason == "ZeroDivisionError: no such thing"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_runs_on_random_tokens() -> None:
    model = hooked(tiny_family("gpt2"))
    batches = token_batches(model, None)
    assert [tokens.shape[0] for _, tokens in batches] == [2, 2]
    assert all("random" in name for name, _ in batches)
    with pytest.raises(LensbridgeError, match="it has no tokenizer"):
        token_batches(model, ["Hello"])


def test_prompts_are_tokenized_one_by_one(raw: Any) -> None:
    batches = token_batches(raw, ["The cat", "The cat sat on the mat"])
    assert [name for name, _ in batches] == ["The cat", "The cat sat on the mat"]
    assert all(torch.equal(tokens, raw.to_tokens(name)) for name, tokens in batches)
    long = token_batches(raw, ["The cat sat on the mat. " * 20])
    assert long[0][1].shape[1] == raw.cfg.n_ctx


# --- the command ------------------------------------------------------------------------------------------------------


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["compare", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_bundled_model_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--without-reference", "--rounds", "0", "--device", "cpu", "--prompt", "Mary and John", "--json"]
    code, out, err = run([*arguments, str(file)], capsys)
    assert code == 0
    assert "Difference from HuggingFace, with processing" in out and "equal to the last bit" in out
    assert "Every promise holds." in out and "HuggingFace, without processing" in err, "the progress bar"
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["schema"] == SCHEMA and data["holds"] is True
    assert set(data) == {
        "schema", "lensbridge", "holds", "setting", "promises", "differences", "costs", "absent", "notes"
    }  # fmt: skip
    assert data["setting"]["prompts"] == ["Mary and John"] and data["setting"]["tolerance"] == 1e-4
    row = next(each for each in data["differences"] if each["point"] == "blocks.3.attn.hook_attn_scores")
    assert row["kind"] == "blocks.{l}.attn.hook_attn_scores" and row["layer"] == 3 and row["against"] == HUGGINGFACE
    assert {"basis", "source", "status", "largest", "mean", "relative", "relative_mean", "same_bits", "reason"} < set(
        row
    )
    assert 0 <= row["mean"] <= row["largest"] and row["relative"] < 1e-4
    assert len(data["differences"]) == 2 * 99


def test_one_basis_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*ALONE, "--no-processing"], capsys)
    assert code == 0 and "without processing" in out and "with processing" not in out
    code, out, _ = run([*ALONE, "--processing"], capsys)
    assert code == 0 and "with processing" in out and "without processing" not in out


def test_a_narrow_terminal_shows_whole_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--without-reference", "--rounds", "0", "--device", "cpu", "--no-processing", "--prompt", "Mary and"]
    _, out, _ = run(arguments, capsys)
    table = out[out.index("Difference") : out.index("holds")]
    assert "attn.hook_attn_scores" in table and "mean rel" in table and "\u2026" not in table


def test_quiet_prints_the_promises_alone(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(ALONE, capsys)
    assert [line.split()[0] for line in out.splitlines()] == ["holds"] * 4 + ["Every"]
    assert "it/s" not in err


@pytest.mark.usefixtures("shifted")
def test_a_point_that_is_broken_ends_with_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "numbers.json", tmp_path / "page.html"
    code, out, _ = run([*ALONE, "--no-processing", "--json", str(file), "--html", str(page)], capsys)
    assert code == 1 and "BROKEN" in out and "mlp.hook_post" in out and "A promise is broken." in out
    data = json.loads(file.read_text(encoding="utf-8"))
    wrong = {each["point"] for each in data["differences"] if each["status"] == "fails"}
    assert wrong >= {f"blocks.{layer}.mlp.hook_post" for layer in range(4)}
    assert data["holds"] is False and '<p class="verdict none">A promise is broken.' in page.read_text("utf-8")


def test_logits_that_are_not_huggingfaces_end_with_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lensbridge.comparing.huggingface import OnTokens

    monkeypatch.setattr(OnTokens, "run", lambda self: self.plain.logits * (1 + 1e-6))
    code, out, _ = run([*ALONE, "--no-processing"], capsys)
    assert code == 1 and "logits are HuggingFace's, without processing: apart by up to" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-directory/model"], "cannot load"),
        (["--json", "no-such-directory/file.json"], "there is no directory"),
        (["--prompts", "no-such-file.txt"], "No such file"),
    ],
)
def test_what_a_user_can_put_right_ends_with_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run([*ALONE, *arguments], capsys)
    assert code == 2 and said in err and err.count("lensbridge compare:") == 1


@pytest.mark.parametrize(
    "arguments", [["--processing", "--no-processing"], ["--prompt", "a", "--prompts", "b"], ["--dtype", "int8"]]
)
def test_wrong_usage_ends_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *arguments])
    assert stop.value.code == 2


def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, numbers = tmp_path / "prompts.txt", tmp_path / "numbers.json"
    file.write_text("Mary and John\n\nThe dog\n", encoding="utf-8")
    assert run([*ALONE, "--no-processing", "--prompts", str(file), "--json", str(numbers)], capsys)[0] == 0
    assert json.loads(numbers.read_text("utf-8"))["setting"]["prompts"] == ["Mary and John", "The dog"]
    file.write_text("\n", encoding="utf-8")
    assert run([*ALONE, "--prompts", str(file)], capsys)[0] == 2


def test_a_model_in_a_directory_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_family("llama").save_pretrained(tmp_path / "llama")
    code, out, _ = run([*ALONE, str(tmp_path / "llama")], capsys)
    assert code == 0 and "Every promise holds." in out


def test_half_precision(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*ALONE, "--dtype", "bfloat16"], capsys)
    assert code == 0 and "equal to the last bit" in out


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads, runs and holds."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.policy = ""
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.loaded += [values[name] for name in ("src", "href", "srcset", "data") if values.get(name)]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    model = hooked(tiny_family("gpt2"), "gpt2")
    return compare(model, "dir/<toy> & co", token_batches(model, None), rounds=0, reference=False)


def test_the_page_loads_nothing_and_runs_its_own_script_only(comparison: Comparison) -> None:
    from lensbridge.comparing.page import render_page

    html = render_page(comparison, "1.2.3")
    page = Page(html)
    assert page.loaded == [] and "url(" not in html and "@import" not in html
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert page.policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "<toy>" not in html and "dir/<toy> & co" in "".join(page.text)
    assert 'name="color-scheme" content="light dark"' in html


def test_the_page_has_every_row_and_every_promise(comparison: Comparison) -> None:
    from lensbridge.comparing.page import render_page

    html = render_page(comparison, "1.2.3")
    text = "".join(Page(html).text)
    for promise in comparison.promises:
        assert promise.name in text and promise.detail in text
    for basis in (RAW, PROCESSED):
        rows = comparison.of(HUGGINGFACE, basis)
        assert f"All {len(rows)} rows" in text
    assert html.count('<th scope="row"><code>blocks.1.hook_resid_post</code>') == 2
    assert "there is no norm behind the embedding" in text


# --- other processes --------------------------------------------------------------------------------------------------


def test_without_transformer_lens_the_comparison_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(children.metadata, "version", missing)
    code, out, _ = run(["--rounds", "0", "--device", "cpu", "--quiet", "--no-processing", "--prompt", "A"], capsys)
    assert code == 0
    assert "not tried points and logits are TransformerLens 3.9.0's" in out
    assert "pip install transformer-lens==3.9.0" in out


def test_another_version_is_not_3_9_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children.metadata, "version", lambda package: "4.3.0")
    assert children.why_no_reference() == "transformer-lens 4.3.0 is installed, which is not 3.9.0"


def test_time_and_memory_are_measured_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "numbers.json", tmp_path / "page.html"
    arguments = ["--without-reference", "--rounds", "3", "--device", "cpu", "--no-processing", "--prompt", "Mary and"]
    code, out, _ = run([*arguments, "--json", str(file), "--html", str(page)], capsys)
    assert code == 0 and "cache of everything, ms" in out
    costs = {cost["tool"]: cost for cost in json.loads(file.read_text("utf-8"))["costs"]}
    assert list(costs) == ["HuggingFace", "lensbridge"]
    for cost in costs.values():
        assert cost["problem"] == "" and cost["milliseconds"]["forward"] >= cost["fastest"]["forward"] > 0
        assert cost["mebibytes"]["peak"] > cost["mebibytes"]["parameters"] > 0
    assert "cache of everything" not in costs["HuggingFace"]["milliseconds"]
    stored = [cost["mebibytes"]["parameters"] for cost in costs.values()]
    assert stored[0] == stored[1], "there is one copy of the weights"
    assert "Time and memory" in page.read_text("utf-8")


def test_a_process_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; print('out of memory', file=sys.stderr); sys.exit(3)", encoding="utf-8")
    monkeypatch.setattr(children, "WORKER", script)
    loading = children.Loading("m", "m", "float32", "cpu", "eager", None, 1, {})
    answer = children.ask(loading, tmp_path, "measure")
    assert answer == {"problem": "its process ended with code 3: out of memory"}
    assert cost_of("lensbridge", answer).problem == answer["problem"]


def test_what_a_tool_fails_with_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Any) -> Any:
        raise ValueError("two\n  lines " + "x" * 1000)

    monkeypatch.setattr(worker, "measure", fail)
    problem = worker.answer({"task": "measure"})["problem"]
    assert problem.startswith("ValueError: two lines x") and problem.endswith("...") and len(problem) < 400


def test_parameters_that_share_memory_count_once() -> None:
    module = nn.Linear(256, 1024, bias=False)
    tied = nn.ModuleDict({"a": module, "b": nn.Linear(256, 1024, bias=False)})
    tied["b"].weight = module.weight
    assert worker.stored_mib(tied) == 1.0


def test_rounds_end_when_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.0)
    calls: list[int] = []
    task: Callable[[], None] = lambda: calls.append(1)  # noqa: E731
    assert len(worker.rounds(task, 9, False)) == 3 and len(calls) == 4
    assert len(worker.rounds(task, 2, False)) == 2


def test_the_default_prompts_fit_the_bundled_model() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) > 1
