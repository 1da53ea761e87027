"""Does a name, a directory or a loaded model become the right model, and is everything else refused with a reason?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification

from lensbridge import HookedTransformer, HookedTransformerConfig, loading
from lensbridge.errors import ModelNotFoundError, UnknownArgumentError, UnsupportedModelError

load = HookedTransformer.from_pretrained


@pytest.fixture
def directory(hf: Any, tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A model with its tokenizer, as ``save_pretrained`` writes them."""
    hf.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def spied(hf: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """What transformers is asked for, instead of the hub: the config, the model and the tokenizer."""
    asked: dict[str, dict] = {}

    def answer(kind: str, found: Any) -> Callable:
        def from_pretrained(name: str, **kwargs: Any) -> Any:
            asked[kind] = {"name": name, **kwargs}
            return found

        return from_pretrained

    monkeypatch.setattr(AutoConfig, "from_pretrained", answer("config", hf.config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", answer("model", hf))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", answer("tokenizer", type("Empty", (), {"vocab_size": 0})()))
    return asked


# --- from a directory ------------------------------------------------------------------------------------------------


def test_a_directory_with_its_tokenizer(hf: Any, directory: Path, tokens: Tensor, capsys: Any) -> None:
    model = load(str(directory), device="cpu", fold_ln=False, center_writing_weights=False, center_unembed=False)
    assert capsys.readouterr().out == f"Loaded pretrained model {directory} into HookedTransformer\n"
    assert torch.allclose(model(tokens), hf(tokens).logits, atol=1e-5)
    assert model.to_tokens("The cat").shape[0] == 1 and model.tokenizer.pad_token == "<|endoftext|>"
    assert model.hf_model.config._attn_implementation == "eager" and not model.training
    cfg = model.cfg
    assert isinstance(cfg, HookedTransformerConfig)
    expected = {
        "n_layers": 2, "n_heads": 4, "d_model": 20, "d_head": 5, "d_mlp": 80, "n_ctx": 24, "d_vocab": 290,
        "d_vocab_out": 290, "act_fn": "gelu_new", "eps": 1e-5, "attn_scale": 5**0.5, "device": "cpu",
        "dtype": torch.float32, "model_name": directory.name, "tokenizer_name": str(directory),
        "original_architecture": "GPT2LMHeadModel", "normalization_type": "LN", "default_prepend_bos": True,
        "from_checkpoint": False,
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_a_directory_without_tokenizer_takes_tokens_only(
    hf: Any, tmp_path: Path, tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    hf.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert model.tokenizer is None and "the model takes tokens only" in caplog.text
    assert model(tokens).shape == (2, 7, 290)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes(directory: Path, dtype: Any, expected: torch.dtype) -> None:
    model = load(str(directory), dtype=dtype)
    assert model.cfg.dtype == model.W_E.dtype == model.hf_model.dtype == expected


def test_dtype_by_the_name_that_huggingface_uses(directory: Path) -> None:
    assert load(str(directory), torch_dtype=torch.float64).W_E.dtype == torch.float64


def test_float16_on_a_cpu_is_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(str(directory), dtype="float16", device="cpu").W_E.dtype == torch.float16
    if not torch.cuda.is_available():
        assert "float16 models may be slow" in caplog.text


def test_wrong_dtypes(directory: Path) -> None:
    with pytest.raises(KeyError, match="unknown dtype 'int8': one of float32, fp32"):
        load(str(directory), dtype="int8")
    with pytest.raises(TypeError, match="must be a torch.dtype"):
        load(str(directory), dtype=32)  # type: ignore[arg-type]


def test_attention_implementation_and_config_attributes(hf: Any, directory: Path) -> None:
    model = load(str(directory), attn_implementation="sdpa", layer_norm_epsilon=0.5)
    assert model.hf_model.config._attn_implementation == "sdpa"
    assert model.cfg.eps == 0.5 and model.hf_model.transformer.ln_f.eps == 0.5


def test_a_config_that_is_given_is_used_and_left_alone(hf: Any, directory: Path) -> None:
    hf.config.layer_norm_epsilon = 0.25
    model = load(str(directory), config=hf.config, attn_pdrop=0.75)
    assert model.cfg.eps == 0.25 and model.hf_model.config.attn_pdrop == 0.75 and hf.config.attn_pdrop == 0.1


def test_what_is_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"the directory '{tmp_path}' holds no model"):
        load(str(tmp_path))
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="HuggingFace said: .*model.safetensors"):
        load(str(tmp_path))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt2-small", "GPT2-SMALL"])
def test_names_are_resolved(hf: Any, spied: dict, name: str) -> None:
    model = load(name)
    assert spied["config"]["name"] == spied["model"]["name"] == spied["tokenizer"]["name"] == "gpt2"
    assert model.hf_model is hf and (model.cfg.model_name, model.cfg.tokenizer_name) == ("gpt2", "gpt2")


def test_what_huggingface_is_told(spied: dict) -> None:
    load("gpt2", dtype="bf16", revision="abc", cache_dir="here", token="secret", max_memory={"cpu": 1})
    model = spied["model"]
    assert model["dtype"] == torch.bfloat16 and model["attn_implementation"] == "eager"
    assert (model["revision"], model["cache_dir"], model["token"], model["max_memory"]) == (
        "abc",
        "here",
        "secret",
        {"cpu": 1},
    )
    assert spied["config"] == {"name": "gpt2", "revision": "abc", "cache_dir": "here", "token": "secret"}
    assert spied["tokenizer"] == {"name": "gpt2", "cache_dir": "here", "token": "secret"}
    assert "device_map" not in model


@pytest.mark.parametrize(
    ("name", "closest"),
    [("gpt2-smal", "gpt2-small"), ("nobody/nothing-like-it-x9", None), ("/no/such/directory", None)],
)
def test_a_model_that_is_nowhere(name: str, closest: str | None) -> None:
    with pytest.raises(ModelNotFoundError, match=f"cannot load '{name}'") as caught:
        load(name)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert "offline" in text and "pass its directory" in text and "hf_model=" in text and "HuggingFace said" in text
    assert ("Closest: " + closest in text) if closest else "Closest" not in text


def test_an_alias_that_is_not_in_the_cache_says_what_it_stands_for() -> None:
    with pytest.raises(ModelNotFoundError, match=r"cannot load 'gpt2-small' \(the hub id 'gpt2'\)") as caught:
        load("gpt2-small")
    assert "Closest" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "closest"),
    [("attn_implmentation", "attn_implementation"), ("revison", "revision"), ("n_embdd", "n_embd")],
)
def test_unknown_arguments_are_refused_by_name(directory: Path, wrong: str, closest: str) -> None:
    with pytest.raises(UnknownArgumentError, match=f"no argument '{wrong}'. Closest: {closest}") as caught:
        load(str(directory), **{wrong: 1})
    assert isinstance(caught.value, TypeError)
    with pytest.raises(UnknownArgumentError, match="'to_dict'"):
        load(str(directory), to_dict=1)


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, image_size=32)
    images = ViTForImageClassification(config)
    images.save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for ask in (lambda: load(str(tmp_path)), lambda: load("x", hf_model=images)):
        with pytest.raises(
            UnsupportedModelError,
            match="ViTForImageClassification has no record",
        ) as caught:
            ask()
        assert isinstance(caught.value, ValueError)


def test_a_checkpoint_of_the_headless_model_is_supported(hf: Any, tmp_path: Path) -> None:
    hf.transformer.save_pretrained(tmp_path)
    assert load(str(tmp_path)).cfg.original_architecture == "GPT2LMHeadModel"


# --- a loaded model --------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_used_as_it_is(new_hf: Callable, new_lens: Callable, tokens: Tensor) -> None:
    hf = new_hf(attention="sdpa").to(torch.bfloat16)
    places = {name: value.data_ptr() for name, value in hf.state_dict().items()}
    attributes = {name: set(module.__dict__) for name, module in hf.named_modules()}
    model = new_lens(hf)
    model.run_with_cache(tokens)
    assert model.hf_model is hf and hf.config._attn_implementation == "sdpa" and hf.dtype == torch.bfloat16
    assert {name: value.data_ptr() for name, value in hf.state_dict().items()} == places
    assert {name: set(module.__dict__) for name, module in hf.named_modules()} == attributes
    assert (model.cfg.dtype, model.cfg.device, model.cfg.model_name) == (torch.bfloat16, "cpu", "gpt2")


def test_a_loaded_model_can_be_asked_to_move(new_lens: Callable, hf: Any) -> None:
    assert new_lens(hf, device="meta").cfg.device == "meta" and hf.device.type == "meta"
    assert new_lens(hf, device="cpu", move_to_device=False).cfg.device == "meta"


def test_arguments_for_loading_are_refused_with_a_loaded_model(new_lens: Callable) -> None:
    with pytest.raises(UnknownArgumentError, match="cache_dir, foo: these go to HuggingFace's from_pretrained"):
        new_lens(cache_dir="x", foo=1)


def test_a_dtype_that_is_not_applied_is_warned_of(new_lens: Callable, caplog: pytest.LogCaptureFixture) -> None:
    new_lens()
    new_lens(dtype=torch.float32)
    assert caplog.text == ""
    assert new_lens(dtype="bfloat16").W_E.dtype == torch.float32
    assert "dtype=torch.bfloat16 is not applied to hf_model" in caplog.text


@pytest.mark.parametrize("wrong", ["gpt2", torch.nn.Linear(2, 2)], ids=["name", "module"])
def test_what_is_no_huggingface_model_is_refused(new_lens: Callable, wrong: Any) -> None:
    with pytest.raises(AssertionError, match="hf_model must be a HuggingFace model"):
        load("gpt2", hf_model=wrong)


def test_training_mode_is_the_models_own(new_hf: Callable, new_lens: Callable) -> None:
    hf = new_hf().train()
    assert new_lens(hf).training and hf.training


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_as_an_object_or_a_name(hf: Any, tokenizer_dir: Path, tokenizer: Any) -> None:
    for given in (tokenizer, str(tokenizer_dir)):
        model = load("gpt2", hf_model=hf, tokenizer=given)
        assert model.to_str_tokens("The cat", prepend_bos=False) == ["The", " cat"]


def test_a_tokenizer_that_is_asked_for_has_to_be_there(hf: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot load a tokenizer 'nobody/no-tokenizer'"):
        load("gpt2", hf_model=hf, tokenizer="nobody/no-tokenizer")
    hf.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no tokenizer files"):
        load("gpt2", hf_model=hf, tokenizer=str(tmp_path))
    with pytest.raises(AssertionError, match="no HuggingFace tokenizer"):
        load("gpt2", hf_model=hf, tokenizer=3)


def test_a_tokenizer_that_is_nowhere_is_done_without(hf: Any, tokens: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = load("gpt2", hf_model=hf, default_padding_side="left")
    assert model.tokenizer is None and "no tokenizer at 'gpt2'" in caplog.text
    assert "default_padding_side is ignored" in caplog.text
    assert model(tokens).shape == (2, 7, 290)


# --- parts of a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_the_first_layers(hf: Any, new_lens: Callable, tokens: Tensor, n_layers: int) -> None:
    model = new_lens(hf, raw=True, first_n_layers=n_layers)
    assert model.cfg.n_layers == len(model.blocks) == n_layers and len(hf.transformer.h) == 2
    ours = dict(model.hf_model.named_parameters())
    assert all(parameter is dict(hf.named_parameters())[name] for name, parameter in ours.items())
    stream = new_lens(hf, raw=True)(tokens, stop_at_layer=n_layers)
    expected = hf.lm_head(hf.transformer.ln_f(stream))
    assert torch.allclose(model(tokens), expected, atol=1e-4)
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens)) and sum("resid_post" in name for name in cache) == n_layers
    assert hf.config.n_layer == 2 and model.hf_model.config.n_layer == n_layers


def test_the_first_layers_beside_the_whole(hf: Any, new_lens: Callable, raw: Any, tokens: Tensor) -> None:
    whole = raw.run_with_cache(tokens)[0]
    part = new_lens(hf, raw=True, first_n_layers=1)
    assert torch.equal(part.run_with_cache(tokens)[1]["blocks.0.hook_resid_post"], raw(tokens, stop_at_layer=1))
    assert torch.equal(raw.run_with_cache(tokens)[0], whole)
    with torch.no_grad():
        part.W_E[3] = 0
    assert not raw.W_E[3].any()


def test_the_first_layers_of_a_model_that_a_user_has_wrapped(hf: Any, new_lens: Callable, tokens: Tensor) -> None:
    expected = new_lens(hf, first_n_layers=1)(tokens)
    wrapped = nnsight.NNsight(hf)
    part = new_lens(hf, first_n_layers=1)
    assert torch.equal(part(tokens), expected) and torch.equal(part.run_with_cache(tokens)[0], expected)
    with wrapped.trace(input_ids=tokens):
        logits = nnsight.save(wrapped.lm_head.output)
    assert torch.equal(logits, hf(tokens).logits)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_layers_that_are_not_there(new_lens: Callable, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"first_n_layers must be between 0 and 2, not {wrong}"):
        new_lens(first_n_layers=wrong)


def test_a_context(new_lens: Callable) -> None:
    assert new_lens().cfg.n_ctx == 24 and new_lens(n_ctx=24).cfg.n_ctx == 24 and new_lens(n_ctx=5).cfg.n_ctx == 5
    for wrong in (0, -1, 25):
        with pytest.raises(ValueError, match=f"n_ctx must be between 1 and 24, .* not {wrong}"):
            new_lens(n_ctx=wrong)


# --- checkpoints -----------------------------------------------------------------------------------------------------

CRFM = "stanford-crfm/alias-gpt2-small-x21"


@pytest.mark.parametrize(
    ("asked", "step", "index"),
    [
        ({"checkpoint_index": 3}, 30, 3),
        ({"checkpoint_index": -1}, 400_000, 608),
        ({"checkpoint_value": 100}, 100, 10),
        ({"checkpoint_label": 150}, 150, 11),
    ],
)
def test_a_checkpoint_is_a_revision(spied: dict, asked: dict, step: int, index: int) -> None:
    model = load("stanford-gpt2-small-a", **asked)
    assert (spied["model"]["name"], spied["model"]["revision"]) == (CRFM, f"checkpoint-{step}")
    assert spied["config"]["revision"] == f"checkpoint-{step}" and "revision" not in spied["tokenizer"]
    cfg = model.cfg
    assert (cfg.from_checkpoint, cfg.checkpoint_value, cfg.checkpoint_index) == (True, step, index)
    assert cfg.checkpoint_label_type == "step"


def test_checkpoints_that_do_not_exist(spied: dict) -> None:
    with pytest.raises(ValueError, match="'gpt2' has no numbered checkpoints"):
        load("gpt2", checkpoint_index=0)
    with pytest.raises(
        AssertionError, match=r"no checkpoint at step 7; the closest are 0 \(checkpoint_index=0\) and 10 "
    ):
        load(CRFM, checkpoint_value=7)
    with pytest.raises(IndexError, match="has 609 checkpoints, so none at index 609: .*index 608 is step 400000"):
        load(CRFM, checkpoint_index=609)
    with pytest.raises(ValueError, match="is step 10, not 20"):
        load(CRFM, checkpoint_index=1, checkpoint_value=20)
    with pytest.raises(ValueError, match="are the same thing"):
        load(CRFM, checkpoint_value=10, checkpoint_label=10)
    with pytest.raises(ValueError, match="a checkpoint is a revision"):
        load(CRFM, checkpoint_value=10, revision="main")


# --- devices ---------------------------------------------------------------------------------------------------------


def test_a_device_map_is_passed_on_and_the_model_stays_where_it_puts_it(
    spied: dict, hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[Any] = []
    monkeypatch.setattr(type(hf), "to", lambda self, *args: moves.append(args) or self)
    load("gpt2", device_map="auto", max_memory={0: "1GiB"})
    assert spied["model"]["device_map"] == "auto" and spied["model"]["max_memory"] == {0: "1GiB"} and moves == []
    load("gpt2", device="cpu")
    load("gpt2", move_to_device=False)
    assert moves == [("cpu",)]


def test_several_devices_become_a_device_map(spied: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (1000 + i, 2000))
    model = load("gpt2", n_devices=2)
    assert spied["model"]["device_map"] == "balanced" and spied["model"]["max_memory"] == {0: 1000, 1: 1001}
    assert model.cfg.n_devices == 2
    with pytest.raises(ValueError, match="there are only 2 CUDA devices"):
        load("gpt2", n_devices=3)


def test_a_device_and_a_map_of_devices_exclude_each_other(spied: dict) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        load("gpt2", device_map="auto", device="cpu")
    assert "model" not in spied


@pytest.mark.parametrize("device_map", [{"transformer": "cpu", "lm_head": 0}, {"": "disk"}])
def test_a_map_may_name_the_cpu_and_the_disk_beside_gpus(spied: dict, device_map: dict) -> None:
    load("gpt2", device_map=device_map)
    assert spied["model"]["device_map"] == device_map


# --- building --------------------------------------------------------------------------------------------------------


def test_the_constructor_takes_no_name() -> None:
    with pytest.raises(ValueError, match="to load a model by name"):
        HookedTransformer("gpt2")  # type: ignore[arg-type]


def test_a_model_is_announced_for_the_time_of_building_only(new_lens: Callable) -> None:
    class Failing(HookedTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            assert loading.being_built() is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        new_lens(cls=Failing)
    assert loading.being_built() is None


def test_no_processing_by_name(hf: Any, tokenizer: Any, tokens: Tensor) -> None:
    model = HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hf, tokenizer=tokenizer)
    assert not model.processing.any and torch.equal(model(tokens), hf(tokens).logits)
    some = HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hf, tokenizer=tokenizer, fold_ln=True)
    assert some.processing == type(some.processing)(fold_ln=True)


def test_the_logs_say_nothing_needless(new_lens: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        new_lens()
    assert caplog.text == ""
