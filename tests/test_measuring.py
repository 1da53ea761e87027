"""Does measuring find out what the records say, recognise what nobody described, and refuse what it cannot know?"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from lensbridge import HookedTransformer, architectures, loading
from lensbridge.architectures import BY_CLASS, architecture_of
from lensbridge.architectures.record import Architecture, Block
from lensbridge.checking import GROUPS, check_model, hooked
from lensbridge.checking.families import recorded, refusal
from lensbridge.errors import UnknownPointError, UnsupportedModelError
from lensbridge.measuring import fallback, given_record, measured, measured_record, store, write_record
from lensbridge.measuring.derive import derive
from lensbridge.measuring.facts import measure, some_tokens
from lensbridge.measuring.flow import Flow
from lensbridge.measuring.norms import formula
from lensbridge.measuring.recording import record
from lensbridge.tiny import tiny_family

from .made_up_models import OddForCausalLM, odd_model

FAMILIES = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt2@upcast gpt_neo gptj gpt_neox gpt_neox@sequential opt "
    "bloom phi phi3 olmo olmo2 olmo3"
).split()
#: Fields of TransformerLens' config that a run does not show: what 3.9.0 says of a family without it acting (that a
#: norm is the last), which way of looking at positions config entries mean, and what is a name.
UNSEEN = {
    "llama": {"final_rms"},
    "qwen2": {"final_rms"},
    "qwen3": {"final_rms"},
    "gemma": {"final_rms"},
    "gemma2": {"final_rms"},
    "gemma3_text": {"final_rms"},
    # Its window is longer than what is run, and its config has its own name for the kinds of layers.
    "gpt_neo": {"use_local_attn", "attn_types", "window_size"},
}
#: What says how a record applies to other models, and what of one model is compared below.
OF_OTHERS = set(
    "also block kinds by_layer by_attribute variants refused lacks blocks config constants optional loaded_with "
    "rereads runs".split()
)

INKLING = (
    "attn_branch attn_through embed_norm expert_form experts extra factors gate k k_norm ln2 mlp mlp_in mlp_out "
    "mlp_through q q_norm qk_norm_heads_first qk_norm_over rotary router values"
)
#: Families of which measuring finds something else than their records say: the fields, and why.
DIFFERING = {
    "beam": (
        "attn_factor attn_residual expert_form experts extra gate ln2 ln2_post mlp mlp_factor mlp_in mlp_out "
        "mlp_residual router",
        "a stream with a factor of its own in each sum is not followed behind attention",
    ),
    "bloom@residual_after_norm": ("attn_skip extra gated_norms ln2 mlp_skip", "what is added to is a norm's output"),
    "diffllama": ("o softmax v z_from_call", "attention is called twice on halves of the values"),
    "doge": (
        "attn_residual extra gate ln2 mlp mlp_in mlp_out mlp_residual",
        "a stream with a factor of its own in each sum is not followed behind attention",
    ),
    "doge@experts": (
        "attn_residual extra ln2 mlp mlp_residual",
        "a stream with a factor of its own in each sum is not followed behind attention",
    ),
    "gemma4_text@experts": (
        "beside expert_form experts extra ln2 ln2_post mlp router values",
        "experts beside an MLP are something else that is added",
    ),
    "inkling_text": (INKLING, "convolutions between projections, heads and stream"),
    "inkling_text@padded": (f"after_unembed {INKLING}", "the same, and logits that are cut off"),
    "zaya": (
        "attn attn_bias attn_factor attn_residual between embed_extra expert_form experts extra ln1 ln2 mlp mlp_bias "
        "mlp_factor mlp_residual o q_gate rotary router softmax z_from_call",
        "both sides of each sum are scaled inside a module",
    ),
    **dict.fromkeys(("afmoe", "hunyuan_v1_moe"), ("router", "the module around the projection that scores experts")),
    "dbrx": ("clips qkv router", "queries, keys and values are clipped, in place, behind one projection"),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        ("extra values", "other words; values that are normed are no projection's"),
    ),
    "gemma4_text@keys_as_values": (
        "extra k_norm q_norm qk_norm_heads_first qk_norm_over values",
        "keys that are values, too, have two norms",
    ),
    "gemma4_text@shared_keys": (
        "extra q q_norm qk_norm_heads_first qk_norm_over rotary values",
        "keys of another layer tell nothing of the queries that meet them",
    ),
    "granitemoe_swa": ("sinks sinks_behind z_from_call", "a scale behind the heads is not looked into"),
    "jetmoe": ("o router z_from_call", "each head's projections are an expert's"),
    **dict.fromkeys(
        ("llama4", "llama4_text", "llama4_text@interleaved"),
        ("flat_mlp_out", "an output whose axes lie otherwise than its tokens is read as well"),
    ),
    "mimo_v2_flash": ("factors softmax v", "values are multiplied, and scores less their largest, inside attention"),
    "minimax": (
        "attn_skip expert_form experts extra key_value_cache ln2 mlp mlp_factor mlp_skip router",
        "what is added to is a norm's output",
    ),
    "minimax_m3_vl_text": ("gate_up mlp_in mlp_out", "gate and linear part are clamped before they are multiplied"),
    "xmod": ("extra gated_norms ln1 ln2 middle post_norm", "the norm behind the MLP is called for the adapter, too"),
    "xmod@pre_norm": ("extra", "other words"),
    "ctrl": ("embed_extra embed_factor embed_factor_power", "the root of an attribute is no attribute"),
    "falcon": ("qkv_layout query_argument rotary softmax", "one key-value head; rotated values are no arguments"),
    "falcon@new_decoder": ("query_argument rotary softmax", "rotated queries and keys are no call's arguments"),
    "falcon_h1": (
        "attn_also attn_also_factor attn_in_factor extra factors gate gated_norms mlp_in mlp_out",
        "products with numbers between modules are not followed",
    ),
    "gpt_bigcode": ("qkv_layout", "with one key-value head, both say the same"),
    "gpt_neox_japanese": ("extra o_bias", "a bias is added outside of the projections"),
    "granite_swa": ("sinks sinks_behind z_from_call", "a scale behind the heads is not looked into"),
    "granitemoehybrid": ("query_argument rotary", "queries are not rotated, which the record leaves open"),
    "longcat_flash": (
        "attn extra gate ln1 ln2 mlp mlp_in mlp_out o q_gate rotary softmax z_from_call",
        "of two attentions, the first is described, and the second is extra",
    ),
    "mixtral": ("weighs_all", "a choice of what is shown"),
    "olmoe": ("weighs_all", "a choice of what is shown"),
    "nanochat": ("embed_norm", "the final norm's module is called on the embedding, too"),
    "rwkv": ("embed_norm enters extra ln2 mlp", "a norm inside the first layer, and an MLP that sees other positions"),
    "stablelm@qk_layernorm": ("k_norm q_norm qk_norm_heads_first qk_norm_over", "a norm of its own for each head"),
    "whisper": ("embed_extra pos_embed", "a table that is no lookup"),
    "xglm": ("pos_embed pos_offset", "a table that is computed"),
    "zamba": ("gated_norms k ln1 o q query_argument v", "the mixer reads more than the stream"),
    "zamba2": ("gated_norms k ln1 o q query_argument v", "the mixer reads more than the stream"),
}
#: Families that measuring does not describe, and what it says.
NOT_MEASURED = {
    **dict.fromkeys(("cpmant", "deepseek_v4", "gemma3n_text", "hy_v4"), "no list of modules takes one tensor"),
    **dict.fromkeys(
        ("electra", "opt@post_norm_projected", "qwen4_exp", "qwen4_exp_text", "rembert", "roc_bert", "roformer"),
        "what enters the first layer is not the output of",
    ),
    **dict.fromkeys(("mllama", "openai-gpt", "prophetnet", "xlnet"), "no list of modules takes one tensor"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "its input embeddings are not one table of tokens"),
    "blt": "returns is not what 'model.local_decoder.layers.1' is given",
    "hrm_text": "a layer of 'model.L_module.layers' runs 6 times",
    "xlm": "what enters the first layer is not the output of",
}


def derived(hf: Any) -> Architecture:
    """The record that a run shows, unchecked, with the model's layers."""
    return derive(measure(hf), hf.config).for_model(hf)


def roles(block: Block) -> dict[str, Any]:
    """What a block says, of what is of use in it."""
    values = {each.name: getattr(block, each.name) for each in dataclasses.fields(block) if each.name != "refusals"}
    unused = {"q", "k", "v"} if block.qkv is not None else set()
    if block.attn is None:
        unused |= {"q", "k", "v", "o", "rotary", "softmax", "qk_norm_over", "q_gate", "z_from_call"}
    if block.q_norm is None:
        unused |= {"qk_norm_heads_first", "qk_norm_over"}
    if not block.rotary and block.v is not None:
        unused.add("query_argument")
    return {name: value for name, value in values.items() if name not in unused}


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records are kept for one test only."""
    monkeypatch.setenv("LENSBRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(fallback, "_KNOWN", {})
    monkeypatch.setattr(fallback, "_TOLD", set())
    return tmp_path


# --- families that have a record --------------------------------------------------------------------------------------


def differences(mine: Architecture, theirs: Architecture) -> set[str]:
    """The fields in which two records of a model differ, around the layers and in any of them."""
    names = [each.name for each in dataclasses.fields(Architecture) if each.name not in OF_OTHERS]
    found = {name for name in names if getattr(mine, name) != getattr(theirs, name)}
    for one, other in zip(map(roles, mine.blocks), map(roles, theirs.blocks), strict=True):
        found |= {name for name in {*one, *other} if one.get(name) != other.get(name)}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_is_what_the_record_says(family: str) -> None:
    hf = tiny_family(family)
    mine, theirs = derived(hf), architecture_of(hf)
    assert not differences(mine, theirs) - {"model_type"}
    shown, expected = (loading.read_config(hf, each, loading.Wish(family), family).to_dict() for each in (mine, theirs))
    assert {name for name in expected if not same(shown[name], expected[name])} <= UNSEEN.get(family, set())


@pytest.mark.slow
@pytest.mark.parametrize("family", [key for key in recorded() if key not in FAMILIES and not refusal(key)])
def test_what_is_measured_of_other_families(family: str) -> None:
    hf = tiny_family(family)
    if family in NOT_MEASURED:
        with pytest.raises(UnsupportedModelError, match=NOT_MEASURED[family]):
            measure(hf)
        return
    fields, _ = DIFFERING.get(family, ("", ""))
    assert differences(derived(hf), architecture_of(hf)) - {"model_type"} == set(fields.split())


def same(one: Any, other: Any) -> bool:
    return one == pytest.approx(other) if isinstance(one, float) else one == other


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere2", "qwen3_moe@dense_first"])
def test_a_record_survives_the_file_and_the_source(family: str) -> None:
    hf = tiny_family(family)
    mine = measured(hf)
    assert not mine.blocks
    assert store.from_json(json.loads(json.dumps(store.to_json(mine)))) == mine
    source = write_record(mine)
    assert max(map(len, source.splitlines())) <= 120
    written = executed(source).for_model(hf)
    assert list(map(roles, written.blocks)) == list(map(roles, mine.for_model(hf).blocks))
    assert dataclasses.replace(written, block=mine.block, kinds=mine.kinds, blocks=()) == mine


def executed(source: str) -> Architecture:
    """The record that a family's file defines."""
    names: dict[str, Any] = {}
    exec(source.replace("from .", "from lensbridge.architectures."), names)
    return next(value for value in names.values() if isinstance(value, Architecture))


def test_a_run_leaves_the_model_as_it_was() -> None:
    hf = tiny_family("llama")
    hf.set_attn_implementation("sdpa")
    hf.train()
    hf.model.layers[0].eval()
    modes = [module.training for module in hf.modules()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    derived(hf)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in hf.modules()] == modes
    assert hf.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


# --- a class of a user's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"parallel": True}], ids=["sequential", "parallel"])
def test_a_made_up_model_is_recognised_and_keeps_every_promise(options: dict[str, Any]) -> None:
    model = hooked(odd_model(**options))
    block = model.interior.architecture.blocks[0]
    assert (block.ln1, block.ln1_post, block.ln2) == ("before_look", "after_look", "before_think")
    assert (block.qkv, block.qkv_layout.order, block.parallel) == ("look.kqv", "kqv", bool(options))
    assert (model.cfg.n_heads, model.cfg.d_head, model.cfg.act_fn, model.cfg.attn_scale) == (6, 8, "sigmoid", 5.0)
    # transformers gives such a class no generate() to compare with.
    report = check_model(model, groups=[group for group in GROUPS if group != "generation"])
    assert not report.failures
    assert len(report.outcomes) > 100


def lacking(**options: Any) -> tuple[Any, set[str]]:
    """(a made-up model, which points it lacks that it would have without the options)."""
    model, plain = (hooked(odd_model(**each)) for each in (options, {}))
    return model, {name for name in plain.interior.points() if name not in model.interior.points()}


def in_layers(*names: str) -> set[str]:
    return {f"blocks.{layer}.{name}" for layer in range(2) for name in names}


def test_a_softmax_out_of_sight_costs_scores_and_pattern_only() -> None:
    model, missing = lacking(hidden_softmax=True)
    assert missing == in_layers("attn.hook_attn_scores", "attn.hook_pattern")
    with pytest.raises(
        UnknownPointError, match=r"too deep inside Look.forward .*calls attend, then weigh, then deeper"
    ):
        model.run_with_cache(some_tokens(model.hf_model), names_filter=["blocks.0.attn.hook_pattern"])
    assert not check_model(model, groups=["points", "identities", "exactness", "edits"]).failures


def test_a_factor_that_is_nowhere_stored_costs_what_it_multiplies() -> None:
    model, missing = lacking(unreachable_factor=True)
    assert missing == in_layers("hook_mlp_out")
    with pytest.raises(UnknownPointError, match="multiplied by something that is no attribute of the layer"):
        model.add_hook("blocks.1.hook_mlp_out", lambda value, hook: None)


def test_a_norm_of_its_own_kind_costs_what_is_in_front_of_it() -> None:
    model, missing = lacking(strange_norm=True)
    norms = ("ln1.hook_scale", "ln1.hook_normalized", "ln1_post.hook_scale", "ln1_post.hook_normalized")
    assert missing == in_layers(*norms, "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
    assert "before_look computes neither LayerNorm nor RMSNorm" in model.interior.why_absent("blocks.0.ln1.hook_scale")


def test_what_does_not_hold_is_refused() -> None:
    hf = odd_model()
    right = measured(hf)
    wrong = dataclasses.replace(right, constants={**right.constants, "attn_scale": 3.0})
    (refusal,) = fallback.checked(hf, wrong).lacks
    assert refusal.points == ("blocks.{l}.attn.hook_attn_scores",)
    assert "was measured, but is not q . k / attn_scale" in refusal.reason


# --- models without a stream ------------------------------------------------------------------------------------------


def test_a_model_without_a_head_is_refused() -> None:
    model = GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=40, n_positions=32))
    with pytest.raises(UnsupportedModelError, match="GPT2Model has no record, and none could be measured: .*logits"):
        architecture_of(model)


def test_a_layer_that_runs_again_and_again_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="runs 2 times in a forward pass"):
        measure(Again(odd_model().config))


class Again(OddForCausalLM):
    """Every layer runs twice."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for storey in self.tower:
            forward = storey.forward
            storey.forward = lambda x, mask, forward=forward: forward(forward(x, mask)[0], mask)
        self.tower = nn.ModuleList(self.tower)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        for storey in self.tower:
            storey(self.words(input_ids), torch.zeros(1))
        return super().forward(input_ids, **kwargs)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_record_is_measured_once(monkeypatch: pytest.MonkeyPatch, own_directory: Path) -> None:
    hf = without_record(monkeypatch, "llama")
    first = architecture_of(hf)
    files = list((own_directory / "records").iterdir())
    assert [file.name.rsplit("-", 1)[0] for file in files] == [f"LlamaForCausalLM-{transformers_version()}"]
    monkeypatch.setattr(fallback, "measured", lambda hf: pytest.fail("measured again"))
    assert architecture_of(hf) == first
    monkeypatch.setattr(fallback, "_KNOWN", {})
    assert architecture_of(tiny_family("llama", seed=1)) == first


def without_record(monkeypatch: pytest.MonkeyPatch, family: str) -> Any:
    """A tiny model of a family whose record is forgotten for a while."""
    hf = tiny_family(family)
    monkeypatch.setattr(architectures, "BY_CLASS", {k: v for k, v in BY_CLASS.items() if k != type(hf).__name__})
    known = {key: value for key, value in loading.BY_MODEL_TYPE.items() if key != hf.config.model_type}
    monkeypatch.setattr(loading, "BY_MODEL_TYPE", known)
    return hf


def transformers_version() -> str:
    import transformers

    return transformers.__version__


def test_a_file_that_cannot_be_read_is_ignored(
    monkeypatch: pytest.MonkeyPatch, own_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = without_record(monkeypatch, "llama")
    path = store.path_of(type(hf), hf.config)
    path.parent.mkdir()
    for content in ('{"is": "Archi', '{"is": "Architecture", "colour": 3}', '{"is": "Building"}', "[]"):
        path.write_text(content, encoding="utf-8")
        monkeypatch.setattr(fallback, "_KNOWN", {})
        assert architecture_of(hf).hf_class == "LlamaForCausalLM"
        assert isinstance(store.read(path), Architecture)
    assert caplog.text.count("is ignored, because it cannot be read") == 3


def test_what_cannot_be_kept_is_only_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    store.write(tmp_path / "file" / "record.json", measured(odd_model()))
    assert "cannot be kept in" in caplog.text


def test_the_file_is_of_the_class_and_of_its_options_but_not_of_its_size() -> None:
    small, large, parallel = (odd_model(**o).config for o in ({}, {"width": 24, "depth": 3}, {"parallel": True}))
    assert store.path_of(OddForCausalLM, small) == store.path_of(OddForCausalLM, large)
    assert store.path_of(OddForCausalLM, small) != store.path_of(OddForCausalLM, parallel)
    assert store.path_of(OddForCausalLM, small) != store.path_of(Again, small)


def test_a_record_with_one_models_numbers_is_not_kept(own_directory: Path) -> None:
    # Its heads' size is nothing that the config says.
    assert "d_head" in measured_record(odd_model()).constants
    assert not (own_directory / "records").exists()
    assert measured_record(odd_model(heads=4)).constants["d_head"] == 12


def test_that_a_record_was_measured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            measured_record(odd_model())
    assert caplog.text.count("OddForCausalLM has no record, so that one was measured") == 1


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_family_without_record_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hf = without_record(monkeypatch, "qwen3")
    hf.save_pretrained(tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        model = HookedTransformer.from_pretrained_no_processing(str(tmp_path / "model"), dtype=dtype, device="cpu")
        assert model.interior.architecture.blocks[0].q_norm == "self_attn.q_norm"
    tokens = some_tokens(hf)
    assert torch.equal(model(tokens), model.hf_model(tokens).logits)
    short = HookedTransformer.from_pretrained_no_processing(str(tmp_path / "model"), first_n_layers=1, device="cpu")
    assert short.cfg.n_layers == 1


def test_a_model_in_half_precision_is_measured_on_a_tiny_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(fallback, "measure", lambda hf: seen.append(hf) or measure(hf))
    hf = tiny_family("llama").to(torch.bfloat16)
    assert measured(hf).layers == "model.layers"
    assert len(seen) == 1 and seen[0] is not hf and seen[0].dtype == torch.float32


def test_a_class_that_no_copy_can_be_made_of_is_measured_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ValueError("too odd")

    monkeypatch.setattr(fallback, "tiny_config", fails)
    record = measured(tiny_family("gpt2").to(torch.bfloat16))
    assert (record.layers, record.norm, record.block.qkv) == ("transformer.h", "LN", "attn.c_attn")
    meta = odd_model().to("meta")
    with pytest.raises(UnsupportedModelError, match="can only be measured on a model whose weights are loaded"):
        measured(meta)


def test_a_record_can_be_passed() -> None:
    hf = odd_model()
    own = measured(hf)
    model = HookedTransformer.from_pretrained_no_processing("odd", hf_model=hf, architecture=own)
    assert model.interior.architecture == given_record(own, hf)
    tokens = some_tokens(hf)
    assert torch.equal(model(tokens), hf(tokens).logits)


def test_a_record_that_does_not_fit_is_refused() -> None:
    hf = odd_model()
    own = measured(hf)
    with pytest.raises(TypeError, match="architecture must be a lensbridge.architectures.Architecture, not 'llama'"):
        HookedTransformer.from_pretrained("odd", hf_model=hf, architecture="llama")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="the layers are 'model.layers', which is no module"):
        given_record(BY_CLASS["LlamaForCausalLM"], hf)
    block = dataclasses.replace(own.block, mlp_in="think.broad")
    with pytest.raises(UnsupportedModelError, match="no such modules: mlp_in: tower.0.think.broad, mlp_in: tower.1"):
        given_record(dataclasses.replace(own, block=block, blocks=()), hf)


# --- the pieces -------------------------------------------------------------------------------------------------------


class Root(nn.Module):
    """RMSNorm under other names: an epsilon in the code, a gain that is no ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.amount


def test_a_norm_is_known_by_what_it_computes() -> None:
    x = torch.randn(2, 5, 8)
    layer = nn.LayerNorm(8, eps=1e-3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    found = formula(layer, x)
    assert found is not None
    assert (found.kind, found.eps, found.eps_attribute, found.offset, found.obstacle) == ("LN", 1e-3, "eps", 0.0, None)
    root = nn.RMSNorm(8, eps=1e-5)
    found = formula(root, x)
    assert found is not None and (found.kind, found.offset) == ("RMS", 0.0)
    found = formula(Root(), x)
    assert found is not None and (found.kind, found.eps, found.eps_attribute) == ("RMS", 1e-6, None)
    assert found.obstacle == "its gain is not kept as 'weight' (it has amount)"
    for other in (nn.Identity(), nn.Linear(8, 8), nn.Dropout(0.0), nn.GELU(), nn.Softmax(dim=-1)):
        assert formula(other, x) is None


class Editing(nn.Module):
    """Edits in place: the whole of a tensor, and a part of it."""

    config = type("Config", (), {})()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> tuple[torch.Tensor]:
        x = input_ids.float() * 2
        y = x + 1
        x += 10
        y[0] = x[0]
        return (y * 3,)


def test_a_value_that_is_edited_is_another_value_afterwards() -> None:
    recording = record(Editing(), torch.tensor([[1, 2], [3, 4]]))
    flow = Flow(recording)
    before = next(op for op in recording.ops if op.name == "mul")
    assert flow.tensor(before.outputs[0]).tolist() == [[2.0, 4.0], [6.0, 8.0]]
    assert flow.tensor(recording.logits).tolist() == [[36.0, 42.0], [21.0, 27.0]]
    # Both the sum and the edit reach the end, and so does what they were made from.
    names = {op.name for op in map(flow.maker, flow.ancestors(recording.logits)) if op is not None}
    assert {"mul", "add", "add_", "edit", "copy_"} <= names
