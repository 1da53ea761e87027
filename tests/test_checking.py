"""Do the checks find out what is wrong, and say so?

A check that cannot fail is worth nothing, so here records are wrong in one place each, and the engine loses writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lensbridge import cli, loading
from lensbridge.architectures import Architecture, architecture_of
from lensbridge.architectures.forms import PARTS
from lensbridge.checking import GROUPS, KNOWN, check_model, hooked
from lensbridge.checking.capture import capturing
from lensbridge.checking.outcome import TOLERANCE, Findings, Outcome, relative_difference
from lensbridge.checking.report import Report
from lensbridge.checking.subject import Subject
from lensbridge.engine.places import Place
from lensbridge.engine.sites import Run, StreamSite
from lensbridge.tiny import tiny_config, tiny_family, tiny_model

#: family -> changes to its blocks -> the group and check that must find them out
WRONG_BLOCKS: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    ("llama", {"gate": "mlp.up_proj", "mlp_in": "mlp.gate_proj"}, ("identities", "blocks.{l}.mlp.hook_post")),
    ("llama", {"ln2": "input_layernorm"}, ("identities", "blocks.{l}.hook_resid_mid")),
    ("llama", {"ln1": "post_attention_layernorm"}, ("identities", "blocks.{l}.attn.hook_q")),
    ("llama", {"parallel": True}, ("identities", "blocks.{l}.ln2.hook_scale")),
    ("llama", {"rotary": False}, ("identities", "blocks.{l}.attn.hook_attn_scores")),
    ("llama", {"k": "self_attn.v_proj", "v": "self_attn.k_proj"}, ("identities", "blocks.{l}.attn.hook_z")),
    ("llama", {"attn_branch": "self_attn.q_proj"}, ("identities", "blocks.{l}.hook_resid_mid")),
    ("llama", {"mlp_branch": "post_attention_layernorm"}, ("identities", "blocks.{l}.hook_resid_post")),
    ("llama", {"middle": "self_attn"}, ("identities", "blocks.{l}.hook_resid_mid")),
    ("phi", {"ln2": "self_attn.dense"}, ("identities", "cache")),
    ("gpt_neox", {"qkv_layout": PARTS}, ("identities", "blocks.{l}.attn.hook_rot_q")),
    ("gpt_neox@sequential", {"parallel": True}, ("identities", "blocks.{l}.ln2.hook_scale")),
    ("gemma2", {"ln1_post": None}, ("identities", "blocks.{l}.hook_resid_mid")),
    ("gemma2", {"ln2_post": None}, ("identities", "blocks.{l}.hook_resid_post")),
    ("gemma3_text", {"qk_norm_heads_first": False}, ("identities", "blocks.{l}.attn.q_norm.hook_scale")),
    (
        "olmo2",
        {"q_norm": "self_attn.k_norm", "k_norm": "self_attn.q_norm"},
        ("identities", "blocks.{l}.attn.hook_rot_q"),
    ),
    ("qwen3", {"q_norm": None}, ("identities", "blocks.{l}.attn.hook_rot_q")),
    ("bloom", {"attn_branch": "self_attention"}, ("identities", "blocks.{l}.hook_resid_mid")),
]
#: The same for what is around the blocks.
WRONG_RECORDS: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    ("llama", {"norm_eps": 0.1}, ("HuggingFace's values", "norms' outputs")),
    ("llama", {"norm": "LN"}, ("HuggingFace's values", "norms' outputs")),
    ("llama", {"ln_final": "model.layers.0.input_layernorm"}, ("identities", "ln_final.hook_scale")),
    ("gemma", {"embed_scale": None}, ("identities", "hook_embed")),
    ("gemma", {"gain_offset": 0.0}, ("HuggingFace's values", "norms' outputs")),
    ("gemma2", {"after_unembed": None}, ("exactness", "a full cache")),
    ("opt", {"pos_offset": 0}, ("identities", "hook_pos_embed")),
    ("gpt2", {"pos_embed": None}, ("identities", "blocks.{l}.hook_resid_pre")),
    ("bloom", {"embed_norm": None}, ("identities", "blocks.{l}.hook_resid_pre")),
]


@pytest.fixture
def with_record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    """The tiny model of a family, hooked by a changed record."""

    def build(key: str, change: Callable[[Architecture], Architecture]) -> Subject:
        monkeypatch.setattr(loading, "architecture_of", lambda hf: change(architecture_of(hf)))
        return Subject(hooked(tiny_family(key)))

    return build


def failing(outcomes: list[Outcome]) -> set[str]:
    return {outcome.check for outcome in outcomes if outcome.status == "fails"}


def described(case: Any) -> str:
    return ", ".join(map(str, case.items())) if isinstance(case, dict) else str(case)


@pytest.mark.parametrize(("key", "changes", "found_by"), WRONG_BLOCKS, ids=described)
def test_a_wrong_role_is_found_out(
    key: str, changes: dict[str, Any], found_by: tuple[str, str], with_record: Callable[..., Subject]
) -> None:
    def change(right: Architecture) -> Architecture:
        return replace(right, blocks=tuple(replace(block, **changes) for block in right.blocks))

    assert found_by[1] in failing(GROUPS[found_by[0]](with_record(key, change)))


@pytest.mark.parametrize(("key", "changes", "found_by"), WRONG_RECORDS, ids=described)
def test_a_wrong_record_is_found_out(
    key: str, changes: dict[str, Any], found_by: tuple[str, str], with_record: Callable[..., Subject]
) -> None:
    subject = with_record(key, lambda right: replace(right, **changes))
    assert found_by[1] in failing(GROUPS[found_by[0]](subject))


def test_queries_and_keys_that_are_exchanged_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are projections of the same norm's output, and their weights are exchanged as well."""

    def change(right: Architecture) -> Architecture:
        exchanged = {"q": "self_attn.k_proj", "k": "self_attn.q_proj"}
        return replace(right, blocks=tuple(replace(block, **exchanged) for block in right.blocks))

    monkeypatch.setattr(loading, "architecture_of", lambda hf: change(architecture_of(hf)))
    subject = Subject(hooked(tiny_model(tiny_config("llama", num_key_value_heads=4))))
    rotated = {f"blocks.{{l}}.attn.hook_rot_{letter}" for letter in "qk"}
    assert failing(GROUPS["identities"](subject)) == rotated
    assert {"a query changes its own scores", "a key changes its own scores"} <= failing(GROUPS["effects"](subject))


# --- an engine that is wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> Subject:
    return Subject(hooked(tiny_family("llama")))


def test_a_write_that_is_lost_is_found_out(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "write", lambda self, view, value: None)
    found = failing(GROUPS["edits"](llama))
    assert {"hook_embed", "blocks.{l}.hook_mlp_out", "blocks.{l}.ln2.hook_scale"} <= found
    assert "adding to hook_mlp_out is adding to hook_resid_post" in failing(GROUPS["effects"](llama))


def test_a_middle_of_the_stream_that_only_the_mlp_sees_is_found_out(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = StreamSite.visit

    def replacing(self: StreamSite, run: Run) -> None:
        self.in_place = False
        visit(self, run)

    monkeypatch.setattr(StreamSite, "visit", replacing)
    assert "blocks.{l}.hook_resid_mid" in failing(GROUPS["edits"](llama))
    assert "adding to hook_attn_out is adding to hook_resid_mid" in failing(GROUPS["effects"](llama))


def test_a_hook_that_is_shown_the_live_tensor_is_found_out(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit in place would change what was cached before."""
    fire = Run.fire
    monkeypatch.setattr(Run, "fire", lambda self, name, value, live: fire(self, name, value, live=False))

    def add(value: torch.Tensor, hook: Any) -> None:
        value += 1

    before = llama.look()["blocks.0.hook_resid_post"]
    assert not torch.equal(llama.look([("blocks.1.hook_resid_pre", add)])["blocks.0.hook_resid_post"], before)


def test_gradients_that_do_not_come_by_are_found_out(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    fire = Run.fire

    def detached(self: Run, name: str, value: torch.Tensor, live: bool) -> tuple[torch.Tensor, bool]:
        return fire(self, name, value.detach() if name == "blocks.0.mlp.hook_post" else value, live)

    monkeypatch.setattr(Run, "fire", detached)
    assert failing(GROUPS["gradients"](llama)) == {"blocks.{l}.mlp.hook_post"}


def test_logits_that_are_not_huggingfaces_are_found_out(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    basis = type(llama.model.interior.basis)
    monkeypatch.setattr(basis, "logits", lambda self, logits, ours=False: logits * (1 + 1e-7))
    assert {"no hooks", "a full cache", "a reading hook at every point"} <= failing(GROUPS["exactness"](llama))
    assert {"right", "left"} <= failing(GROUPS["padding"](llama))


def test_a_point_that_does_not_fire_is_found_out(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    points = llama.model.interior.points()
    monkeypatch.setattr(llama.model.interior, "points", lambda: (*points, "blocks.0.hook_new"))
    monkeypatch.setattr("lensbridge.checking.baseline.TEMPLATES", ("blocks.{l}.hook_new",))
    llama.__dict__.pop("all_names", None)
    outcomes = GROUPS["points"](llama)
    assert "blocks.0.hook_new did not fire" in outcomes[0].detail
    assert "there is no blocks.1.hook_new, and nothing says why" in outcomes[0].detail
    assert failing(GROUPS["identities"](llama)) == {"blocks.{l}.hook_new"}


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_when_tensors_count_as_equal() -> None:
    x = torch.tensor([1.0, -4.0, -torch.inf])
    assert relative_difference(x, x.clone()) == 0
    assert relative_difference(torch.tensor([1.0, -4.1, -torch.inf]), x) == pytest.approx(0.025)
    assert relative_difference(torch.tensor([1.0, -torch.inf, -torch.inf]), x) == float("inf")
    assert relative_difference(-x, x) == float("inf")
    assert relative_difference(x[:2], x) == float("inf")
    assert relative_difference(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0


def test_findings_become_outcomes() -> None:
    findings = Findings("group", {"group": {"odd*": "it is odd"}})
    one, other = torch.ones(2), torch.full((2,), 2.0)
    findings.compare("compared", one, one * (1 + TOLERANCE / 2), "here")
    findings.compare("odd numbers", one, other, "here")
    findings.compare("wrong", one, other, "here")
    findings.compare("wrong", one, torch.ones(3), "there")
    findings.same("same", one, one * (1 + 1e-6), "here")
    findings.absent("absent", "why not")
    findings.absent("absent", "why not")
    with findings.trying("raising", "here"):
        raise ValueError("no")
    found = {outcome.check: outcome for outcome in findings.outcomes()}
    assert {check: outcome.status for check, outcome in found.items()} == {
        **{"compared": "holds", "odd numbers": "known", "wrong": "fails"},
        **{"same": "fails", "absent": "absent", "raising": "fails"},
    }
    assert found["wrong"].detail == "here: relative difference 5.0e-01; there: shape [2] instead of [3]"
    assert found["odd numbers"].detail == "it is odd"
    assert found["absent"].detail == "why not"
    assert found["raising"].detail == "here: ValueError: no"
    assert "not equal" in found["same"].detail


def test_a_report_says_what_is_listed_needlessly() -> None:
    known = {"a": {"x*": "why", "y": "why"}, "b": {"z": "why"}}
    outcomes = (Outcome("a", "x1", "holds"), Outcome("a", "x2", "known"), Outcome("a", "y", "holds"))
    report = Report("Class", "type", outcomes, known)
    assert list(report.unneeded()) == ["a: y"]
    assert report.holds
    assert not Report("Class", "type", (*outcomes, Outcome("a", "w", "fails")), known).holds


def test_a_group_that_cannot_run_is_a_failure(monkeypatch: pytest.MonkeyPatch, llama: Subject) -> None:
    def broken(subject: Subject) -> list[Outcome]:
        raise RuntimeError("broken")

    monkeypatch.setitem(GROUPS, "weights", broken)
    report = check_model(llama.model, groups=["weights", "points"])
    assert [outcome.detail for outcome in report.failures] == ["RuntimeError: broken"]
    assert report.counts("points")["holds"] == 30


def test_captured_values_are_those_of_the_moment() -> None:
    """Also where a module's output is changed in place afterwards, and where a module runs twice."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            first = self.inner(x)
            first += 1
            return self.inner(first), None

    model, x = Twice(), torch.ones(1, 2)
    with torch.no_grad(), capturing(model) as found:
        out = model(x)[0]
    assert torch.equal(found.output(""), out)
    assert torch.equal(found.calls["inner"][0].output, model.inner(x))
    with pytest.raises(LookupError, match="called 2 times"):
        found.output("inner")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- on the model -----------------------------------------------------------------------------------------------------


def test_a_model_is_left_as_it_was(llama: Subject) -> None:
    model = llama.model
    before = {name: parameter.clone() for name, parameter in model.hf_model.named_parameters()}
    flags = {name: getattr(model.cfg, name) for name in vars(model.cfg) if name.startswith("use_")}
    assert check_model(model).holds
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.hf_model.named_parameters())
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    assert {name: getattr(model.cfg, name) for name in flags} == flags
    assert not model.interior.weights.processing.any
    assert model.list_hooks() == {}


def test_known_exceptions_say_why() -> None:
    assert all(len(reason) > 20 for groups in KNOWN.values() for entry in groups.values() for reason in entry.values())


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_checks_a_family_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outcomes.json"
    arguments = ["check", "llama", "--group", "identities", "--group", "points", "--json", str(path)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert "Everything holds" in shown
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["holds"] is True
    assert {outcome["group"] for outcome in written["outcomes"]} == {"identities", "points"}


@pytest.mark.parametrize("arguments", [["LlamaForCausalLM"], ["--tiny", "toy"], ["toy", "--verbose"]])
def test_the_command_takes_a_class_a_config_and_a_checkpoint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--group", "weights", "--device", "cpu", *arguments]) == 0
    assert ("holds weights: attn.W_O" in capsys.readouterr().out) == ("--verbose" in arguments)


def test_the_command_fails_where_something_does_not_hold(
    with_record: Callable[..., Subject], capsys: pytest.CaptureFixture[str]
) -> None:
    with_record("llama", lambda right: replace(right, norm_eps=0.1))
    assert cli.main(["check", "llama", "--group", "HuggingFace's values"]) == 1
    shown = capsys.readouterr().out
    assert "fails HuggingFace's values: norms' outputs" in shown
    assert "1 checks fail" in shown


def test_the_command_says_what_it_cannot_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert cli.main(["check", "llama", "--json", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert cli.main(["check", "BertModel"]) == 2
