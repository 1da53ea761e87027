"""Do ``lensbridge hooks`` and ``lensbridge models`` say what there is, where it is, and what there is not?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from lensbridge import cli
from lensbridge.checking import hooked
from lensbridge.checking.families import family_class, recorded, refusal
from lensbridge.checking.subject import Subject
from lensbridge.errors import UnknownPointError
from lensbridge.listing import hooks, models
from lensbridge.listing.rows import absent_of, grouped_by_kind, ranges, rows_of
from lensbridge.listing.structure import structure_of, without_weights
from lensbridge.points import POINTS
from lensbridge.tiny import tiny_family

SERVED = [key for key in recorded() if refusal(key) is None]
SOME = ("gpt2", "falcon", "mixtral", "deepseek_v3", "jamba", "gemma2", "bloom", "opt", "qwen3_next", "gpt_neox")
#: Models that are built from the config of a part of theirs, which AutoModelForCausalLM does not take.
FROM_A_PART = {"emu3", "mllama", "musicgen", "musicgen_melody"}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(arguments)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# --- rows -------------------------------------------------------------------------------------------------------------


def check_rows(key: str) -> None:
    """Sizes are those of a run; places are modules; what is not there is absent."""
    subject = Subject(hooked(tiny_family(key), key))
    rows, paths = rows_of(subject.model), {path for path, _ in subject.hf.named_modules()}
    assert sorted({row.kind for row in rows} | {each.kind for each in absent_of(subject.model)}) == sorted(
        {point.name for point in POINTS}
    )
    assert len({row.name for row in rows}) == len(rows)
    seen: set[str] = set()
    for flags in subject.flags():
        with subject.turned_on(flags):
            look = subject.look()
            for row in rows:
                if row.name in look and row.name not in seen:
                    seen.add(row.name)
                    assert_fits(row, look[row.name].shape)
    assert seen | subject.idle >= {row.name for row in rows}
    for row in rows:
        assert any(f" {path}" in f" {row.where} " for path in paths if path), row
        assert (row.flag is None) == (row.setter is None)


def assert_fits(row: Any, shape: torch.Size) -> None:
    sizes = [size for size in row.sizes if size != "..."]
    for size, found in zip(sizes, shape[len(shape) - len(sizes) :], strict=True):
        assert isinstance(size, str) or size == found, (row.name, row.sizes, shape)


@pytest.mark.parametrize("key", SOME)
def test_rows_are_true(key: str) -> None:
    check_rows(key)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in SERVED if key not in SOME])
def test_rows_of_every_family_are_true(key: str) -> None:
    check_rows(key)


@pytest.mark.parametrize("key", SOME)
def test_a_model_without_weights_has_the_same_rows(key: str) -> None:
    whole = hooked(tiny_family(key), key)
    empty = without_weights(whole.hf_model.config, key)
    assert all(parameter.is_meta for parameter in empty.hf_model.parameters())
    assert rows_of(empty) == rows_of(whole) and absent_of(empty) == absent_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in SERVED if key not in FROM_A_PART | set(SOME)])
def test_a_model_of_every_family_without_weights_has_the_same_rows(key: str) -> None:
    whole = hooked(tiny_family(key), key)
    assert rows_of(without_weights(whole.hf_model.config, key)) == rows_of(whole)


def test_a_row_says_where_and_what() -> None:
    rows = {row.name: row for row in rows_of(hooked(tiny_family("llama")))}
    key = rows["blocks.1.attn.hook_k"]
    assert key.where == "output of model.layers.1.self_attn.k_proj" and key.sizes == ("batch", "pos", 2, 16)
    assert rows["blocks.0.attn.hook_pattern"].where == "output of the softmax in model.layers.0.self_attn"
    assert rows["blocks.0.ln1.hook_scale"].meaning.startswith("sqrt(mean(x^2) + eps)"), "RMS norms keep the mean"
    assert rows["blocks.0.mlp.hook_pre"].meaning.startswith("n @ W_in + b_in; n @ W_gate")
    result = rows["blocks.0.attn.hook_result"]
    assert (result.flag, result.setter, result.on) == ("use_attn_result", "set_use_attn_result", False)
    gpt2 = {row.name: row for row in rows_of(hooked(tiny_family("gpt2")))}
    assert gpt2["blocks.0.attn.hook_q"].where == "a part of the output of transformer.h.0.attn.c_attn"
    assert "x - mean x" in gpt2["ln_final.hook_normalized"].meaning


def test_points_of_grouped_queries() -> None:
    absent = {each.kind: each for each in absent_of(hooked(tiny_family("llama")))}
    assert "several query heads share a key" in absent["blocks.{l}.hook_attn_in"].reason
    assert absent["hook_pos_embed"].layers == ()
    assert absent["blocks.{l}.mlp.hook_expert_weights"].layers == (0, 1)


def test_layers_of_several_kinds_are_named() -> None:
    model = hooked(tiny_family("jamba"))
    groups = {row.name: [each.layer for each in group] for row, group in grouped_by_kind(rows_of(model))}
    with_pattern = [row.layer for row in rows_of(model) if row.kind.endswith("hook_pattern")]
    absent = next(each for each in absent_of(model) if each.kind.endswith("hook_pattern"))
    assert sorted([*with_pattern, *absent.layers]) == list(range(model.cfg.n_layers)) and with_pattern
    assert groups["blocks.{l}.hook_resid_pre"] == list(range(model.cfg.n_layers))


def test_ranges() -> None:
    assert ranges([3, 0, 1, 5]) == "0-1, 3, 5"
    assert ranges([]) == ""


# --- lensbridge hooks -------------------------------------------------------------------------------------------------


def test_hooks_of_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["hooks", "toy"], capsys)
    assert code == 0
    assert "toy: GPT2LMHeadModel, 4 layers, 98 points of 29 kinds" in out
    assert "blocks.{l}.attn.hook_q  batch pos head d_head  [batch, pos, 4, 32]" in out
    assert "a part of the output of transformer.h.{l}.attn.c_attn" in out
    assert "a copy of the input of transformer.h.{l} for each head" in out
    assert "off: model.set_use_attn_result(True)" in out


def test_hooks_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert structure_of("toy").cfg.n_layers == 4


def test_hooks_of_one_layer_and_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["hooks", "toy", "--layer", "2", "--filter", "*attn.hook_?"], capsys)
    names = [line.split()[0] for line in out.splitlines() if line.startswith("blocks")]
    assert code == 0 and names == [f"blocks.2.attn.hook_{letter}" for letter in "qkvz"]
    _, out, _ = run(["hooks", "toy", "--filter", "hook_resid_mid"], capsys)
    assert [line.split()[0] for line in out.splitlines() if line[0] == "b"] == ["blocks.{l}.hook_resid_mid"]


def test_hooks_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["hooks", "toy", "--json"], capsys)
    data = json.loads(out)
    assert code == 0 and data["schema"] == hooks.SCHEMA and data["n_layers"] == 4
    assert [each["name"] for each in data["points"]] == list(structure_of("toy").interior.points())
    row = next(each for each in data["points"] if each["name"] == "blocks.3.hook_mlp_out")
    assert row == {
        "name": "blocks.3.hook_mlp_out",
        "kind": "blocks.{l}.hook_mlp_out",
        "layer": 3,
        "shape": "batch pos d_model",
        "sizes": ["batch", "pos", 128],
        "meaning": "post @ W_out + b_out",
        "where": "output of transformer.h.3.mlp",
        "flag": None,
        "setter": None,
        "on": True,
    }
    assert {"kind": "embed.ln.hook_scale", "layers": [], "reason": "there is no norm behind the embedding"} in data[
        "absent"
    ]


def test_hooks_that_are_absent(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["hooks", "gpt_neox", "--absent"], capsys)
    assert code == 0
    assert "blocks.{l}.hook_resid_mid  attention and MLP read the same residual stream" in out
    assert "hook_resid_post" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy", "--filter", "*hook_zz"], "no hook point of this model fits '*hook_zz'"),
        (["toy", "--filter", "hook_patern"], "Closest: "),
        (["gpt_neox", "--filter", "hook_resid_mid"], "It is absent: attention and MLP read the same"),
        (["toy", "--layer", "4"], "there is no layer 4: the model has 4"),
        (["no-such/model"], "cannot load 'no-such/model'"),
    ],
)
def test_hooks_that_nobody_has_end_with_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["hooks", *arguments], capsys)
    assert code == 2 and said in err


def test_a_filter_on_a_model_of_our_own() -> None:
    from lensbridge import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="relu", d_mlp=16)
    rows, _ = hooks.chosen(HookedTransformer(cfg), "hook_pattern")
    assert [row.name for row in rows] == ["blocks.0.attn.hook_pattern"]
    with pytest.raises(UnknownPointError):
        hooks.chosen(HookedTransformer(cfg), "hook_rot_q")


# --- lensbridge models ------------------------------------------------------------------------------------------------


def test_all_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["models"], capsys)
    served = [key for key in SERVED if f"\n{key} " in f"\n{out}"]
    assert code == 0 and served == SERVED
    assert "TransformerLens 3.9.0 names 249 models" in out


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("pythia", ["gpt_neox GPTNeoXForCausalLM", "EleutherAI/pythia-70m "]),
        ("GPTNeoXForCausalLM", ["gpt_neox GPTNeoXForCausalLM", "stabilityai/stablelm-base-alpha-3b "]),
        ("solu-1l", ["NeelNanda/SoLU_1L512W_C4_Code "]),
        ("gpt2-small", ["gpt2 ", "stanford-crfm/alias-gpt2-small-x21 "]),
        ("Qwen-7B-Chat", ["Qwen/Qwen-7B-Chat "]),
        ("toy", ["toy "]),
    ],
)
def test_models_are_found_by_any_of_their_names(
    search: str, found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(["models", search], capsys)
    assert code == 0
    for start in found:
        assert any(" ".join(line.split()).startswith(start) for line in out.splitlines()), out


def test_models_that_nobody_knows_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["models", "pythiaaa"], capsys)
    assert code == 2 and "Closest: pythia" in err


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["models", "bloom", "--json"], capsys)
    data = json.loads(out)
    assert code == 0 and data["schema"] == models.SCHEMA
    family = next(each for each in data["families"] if each["key"] == "bloom")
    assert family["hf_class"] == "BloomForCausalLM" and family["served"] and family["found"]["3.9.0"] == "yes"
    assert {each["hub_id"] for each in data["models"]} >= {"bigscience/bloom-560m"}


def test_what_is_refused_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FAMILIES", {"gpt2": None, "bloom": None})
    monkeypatch.setattr(models, "BY_CLASS", {})
    monkeypatch.setattr(models, "REFUSED", {"bloom": ("BloomForCausalLM", "of a reason")})
    monkeypatch.setattr(models, "_asset", lambda name: {"families": {}, "architectures": {}})
    models.all_families.cache_clear()
    try:
        found = {each.key: each.not_served for each in models.all_families()}
        assert found == {"gpt2": "there is no record of it", "bloom": "of a reason"}
        _, out, _ = run(["models", "bloom"], capsys)
        assert "not served: of a reason" in out
    finally:
        models.all_families.cache_clear()
        models.all_names.cache_clear()


def test_what_is_served_can_be_loaded_and_nothing_else() -> None:
    families = {family.key: family for family in models.all_families()}
    assert [key for key, family in families.items() if family.served] == SERVED
    assert all(family.hf_class == family_class(key) for key, family in families.items())
    encoders = {name.hub_id: name.family for name in models.all_names() if name.family.startswith("Hooked")}
    assert encoders["google-t5/t5-small"] == "HookedEncoderDecoder"


def test_what_is_said_of_families_is_what_their_page_says() -> None:
    path = Path(__file__).parent.parent / "docs" / "make_families.py"
    spec = importlib.util.spec_from_file_location("make_families", path)
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    rows = maker.rows_of(maker.PAGE.read_text(encoding="utf-8"))
    assert maker.DATA.read_text(encoding="utf-8") == maker.data_of(rows), "run `python docs/make_families.py --data`"


@pytest.fixture(autouse=True)
def without_notices() -> Any:
    """transformers has something to say of some families' configs."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)
