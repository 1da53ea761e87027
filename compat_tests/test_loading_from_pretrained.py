"""Do the loading helpers say what 3.9.0's say about names, checkpoints, configs and weights?"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import loading_from_pretrained as theirs

from compat_tests.comparison import outcome, same_outcome, weights_close
from compat_tests.conftest import Pairs
from compat_tests.hub_repositories import cached_file, name_revision, repository_in
from compat_tests.rough_models import SHAPES, SUBJECT, config_from, rough_gpt2

ours = import_module(f"{SUBJECT}.loading_from_pretrained")
MODULES = (ours, theirs)

#: Fields that HuggingFace's config fills in for lensbridge and that 3.9.0 leaves at its defaults.
FROM_HF = {"initializer_range"}


@pytest.mark.parametrize(
    "name",
    [
        "STANFORD_CRFM_CHECKPOINTS",
        "PYTHIA_CHECKPOINTS",
        "PYTHIA_V0_CHECKPOINTS",
        "NON_HF_HOSTED_MODEL_NAMES",
        "NEED_REMOTE_CODE_MODELS",
    ],
)
def test_constants(name: str) -> None:
    assert getattr(ours, name) == getattr(theirs, name)


def test_names() -> None:
    assert ours.make_model_alias_map() == theirs.make_model_alias_map()
    for name in ("gpt2-small", "GPT2-XL", "pythia-70m", "EleutherAI/pythia-70m", "gpt5", "", "toy"):
        mine, other = (outcome(lambda m=module, n=name: m.get_official_model_name(n)) for module in MODULES)
        same_outcome("get_official_model_name", mine, other)


@pytest.mark.parametrize("name", ["stanford-gpt2-small-a", "pythia-70m", "pythia-70m-v0", "gpt2", "solu-1l", "gpt5"])
def test_checkpoint_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["config.json", "checkpoints/solu_100.pth", "checkpoints/solu_22000000000.pth", "final.pth"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository, revision=None: files)
    mine, other = (outcome(lambda m=module: m.get_checkpoint_labels(name, revision="main")) for module in MODULES)
    same_outcome("get_checkpoint_labels", mine, other)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"fold_ln": True},
    {"device": "cpu", "dtype": torch.float16},
    {"default_prepend_bos": False, "first_n_layers": 1},
    {"n_ctx": 6, "n_devices": 1},
    {"hf_cfg": {"vocab_size": 99}},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: "-".join(options))
def test_configs(shape: str, options: dict[str, Any]) -> None:
    with config_from(rough_gpt2(SHAPES[shape])):
        mine, other = (module.get_pretrained_model_config("gpt2", **options).to_dict() for module in MODULES)
    assert type(mine["device"]) is type(other["device"])
    if "fold_ln" not in options:
        assert mine["normalization_type"] == "LN"
    assert {name: mine[name] for name in other if name not in FROM_HF} == {
        name: other[name] for name in other if name not in FROM_HF
    }


@pytest.mark.parametrize("checkpoint", [{"checkpoint_index": 5}, {"checkpoint_value": 150}, {"checkpoint_value": 7}])
def test_configs_of_checkpoints(checkpoint: dict[str, int]) -> None:
    with config_from(rough_gpt2(SHAPES["two"])):
        mine, other = (
            outcome(lambda m=module: m.get_pretrained_model_config("stanford-gpt2-small-a", **checkpoint))
            for module in MODULES
        )
    if other.error is not None:
        return same_outcome("checkpoint", mine, other)
    assert mine.error is None, mine.error
    names = ("from_checkpoint", "checkpoint_index", "checkpoint_value", "checkpoint_label_type", "model_name")
    assert [getattr(mine.value, name) for name in names] == [getattr(other.value, name) for name in names]


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_of_a_hf_config(shape: str) -> None:
    with config_from(rough_gpt2(SHAPES[shape])):
        mine, other = (module.convert_hf_model_config("gpt2") for module in MODULES)
        assert {name: mine[name] for name in other} == other
        sizes = [
            (vars(module.get_basic_config("gpt2")), module.get_num_params_of_pretrained("gpt2")) for module in MODULES
        ]
    assert sizes[0] == sizes[1]


def test_an_unknown_name_has_no_config() -> None:
    mine, other = (outcome(lambda m=module: m.get_pretrained_model_config("no-such-model")) for module in MODULES)
    same_outcome("get_pretrained_model_config", mine, other)


SIZES = {"d_model": 8, "n_layers": 2, "d_mlp": 32, "d_head": 4, "n_heads": 2, "n_ctx": 16, "d_vocab": 50}
OWN: dict[str, Any] = SIZES | {"act_fn": "solu_ln", "attn_only": False}


@pytest.mark.parametrize(
    "stated",
    [
        {"normalization": "LNPre", "tokenizer_name": "gpt2"},
        {"normalization_type": "LN", "shortformer_pos": True, "final_rms": True},
        {"normalization_type": "LN", "shortformer_pos": False, "architecture": "mingpt"},
    ],
)
@pytest.mark.parametrize("name", ["solu-1l", "solu-1l-old"])
def test_configs_in_3_9_0s_own_format(name: str, stated: dict[str, Any], tmp_path: Path) -> None:
    repository = repository_in(tmp_path, theirs.get_official_model_name(name))
    cached_file(repository, "0" * 40, "config.json", json.dumps(OWN | stated).encode())
    name_revision(repository, "0" * 40)
    mine, other = (module.convert_neel_model_config(name, cache_dir=str(tmp_path)) for module in MODULES)
    assert mine == other
    options = {"n_ctx": 9, "first_n_layers": 1, "cache_dir": str(tmp_path)}
    for fold_ln in (False, True):
        whole = [module.get_pretrained_model_config(name, fold_ln=fold_ln, **options).to_dict() for module in MODULES]
        assert {field: whole[0][field] for field in whole[1]} == whole[1]


@pytest.mark.parametrize("shape", ["two", "three", "one"])
def test_state_dicts(pairs: Pairs, shape: str) -> None:
    pair = pairs.get(shape, processing="raw")
    mine, other = (
        module.get_pretrained_state_dict("gpt2", model.cfg, hf_model=pair.hf)
        for module, model in zip(MODULES, pair.both, strict=True)
    )
    # GPT-2 has no such parameter; 3.9.0 fills it in with its own zeros later.
    if SUBJECT == "lensbridge":
        assert not mine.pop("unembed.b_U").any()
    weights_close(mine, {name: value.detach() for name, value in other.items()})


@pytest.mark.parametrize("without", ["", "W_pos", "ln1", "b_", "attn.W_V", "mlp.W_out"])
def test_missing_keys(pairs: Pairs, without: str) -> None:
    pair = pairs.get(processing="raw")

    def fill(module: Any, model: Any) -> dict[str, torch.Tensor]:
        given = {name: 2 * value for name, value in model.state_dict().items() if not without or without not in name}
        filled = module.fill_missing_keys(model, given)
        assert filled is given
        return {name: value for name, value in filled.items() if value.is_floating_point() and value.numel() > 1}

    mine, other = (
        outcome(lambda m=module, model=model: fill(m, model)) for module, model in zip(MODULES, pair.both, strict=True)
    )
    if other.error is not None:
        return same_outcome("fill_missing_keys", mine, other)
    assert mine.error is None, mine.error
    weights_close(mine.value, other.value)
