"""Do TransformerLens' loading helpers give what `from_pretrained` would load, without loading it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lensbridge import HookedTransformer, HookedTransformerConfig
from lensbridge import loading_from_pretrained as lfp
from lensbridge.errors import ModelNotFoundError

#: Attributes that say how a model was loaded, or that only a tokenizer can fill.
OF_LOADING = {"tokenizer_prepends_bos"}


@pytest.fixture(scope="module")
def toy() -> Any:
    return HookedTransformer.from_pretrained_no_processing("toy", device="cpu")


@pytest.fixture
def directory(hf: Any, tmp_path: Path) -> str:
    """The rough GPT-2 of the other tests, saved."""
    hf.save_pretrained(tmp_path)
    return str(tmp_path)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_in_any_case_lead_to_the_hub_id() -> None:
    assert lfp.get_official_model_name("gpt2-small") == "gpt2"
    assert lfp.get_official_model_name("GPT2-Small") == "gpt2"
    assert lfp.get_official_model_name("eleutherai/PYTHIA-70m") == "EleutherAI/pythia-70m"
    assert lfp.make_model_alias_map()["gpt2-small"] == "gpt2"


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    with pytest.raises(ValueError, match="gpt2-smal not found.*Closest: gpt2-small"):
        lfp.get_official_model_name("gpt2-smal")


def test_checkpoint_labels(caplog: pytest.LogCaptureFixture) -> None:
    assert lfp.get_checkpoint_labels("stanford-gpt2-small-a") == (lfp.STANFORD_CRFM_CHECKPOINTS, "step")
    assert lfp.get_checkpoint_labels("pythia-70m-v0") == (lfp.PYTHIA_V0_CHECKPOINTS, "step")
    assert not caplog.records
    assert lfp.get_checkpoint_labels("pythia-70m") == (lfp.PYTHIA_CHECKPOINTS, "step")
    assert "-v0" in caplog.text
    with pytest.raises(ValueError, match="Model gpt2 is not checkpointed"):
        lfp.get_checkpoint_labels("gpt2")


@pytest.mark.parametrize(("last", "kind"), [(2_000_000_000, "token"), (900, "step")])
def test_checkpoint_labels_of_a_repository_are_read_off_its_files(
    monkeypatch: pytest.MonkeyPatch, last: int, kind: str
) -> None:
    import huggingface_hub

    asked = []

    class Hub:
        def list_repo_files(self, repository: str, **kwargs: Any) -> list[str]:
            asked.append((repository, kwargs))
            return ["config.json", "checkpoints/solu_100.pth", f"checkpoints/solu_{last}.pth", "model_final.pth"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert lfp.get_checkpoint_labels("solu-1l", revision="main", cache_dir="x") == ([100, last], kind)
    assert asked == [("NeelNanda/SoLU_1L512W_C4_Code", {"revision": "main"})]


def test_the_helpers_are_found_under_loading_too() -> None:
    from lensbridge import loading

    assert loading.get_official_model_name is lfp.get_official_model_name
    assert loading.PYTHIA_CHECKPOINTS is lfp.PYTHIA_CHECKPOINTS
    with pytest.raises(AttributeError, match="'lensbridge.loading' has no attribute 'get_offical'"):
        loading.get_offical  # noqa: B018


# --- configs ----------------------------------------------------------------------------------------------------------


def test_the_config_is_that_of_the_loaded_model(toy: Any) -> None:
    found = lfp.get_pretrained_model_config("toy", device="cpu").to_dict()
    loaded = toy.cfg.to_dict()
    assert {name: found[name] for name in found.keys() - OF_LOADING} == {
        name: loaded[name] for name in loaded.keys() - OF_LOADING
    }


def test_no_weights_are_read(directory: str) -> None:
    (Path(directory) / "model.safetensors").unlink()
    cfg = lfp.get_pretrained_model_config(directory)
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_ctx) == (2, 20, 4, 24)
    assert cfg.init_weights is False and cfg.from_checkpoint is False


def test_options_of_the_config(directory: str) -> None:
    cfg = lfp.get_pretrained_model_config(
        directory,
        hf_cfg={"vocab_size": 77},
        fold_ln=True,
        device="cpu",
        n_devices=2,
        default_prepend_bos=False,
        dtype=torch.bfloat16,
        first_n_layers=1,
        n_ctx=8,
    )
    found = (cfg.d_vocab, cfg.normalization_type, cfg.device, cfg.n_devices, cfg.default_prepend_bos, cfg.dtype)
    assert found == (77, "LNPre", "cpu", 2, False, torch.bfloat16)
    assert (cfg.n_layers, cfg.n_ctx) == (1, 8)


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(ModelNotFoundError, match="cannot read the config of 'gpt2-small' \\('gpt2'\\)") as caught:
        lfp.get_pretrained_model_config("gpt2-small")
    assert isinstance(caught.value, (ValueError, OSError))


def test_the_fields_of_a_hf_model_make_its_config(directory: str) -> None:
    fields = lfp.convert_hf_model_config(directory)
    assert not {"device", "dtype", "model_name", "default_prepend_bos"} & fields.keys()
    cfg = HookedTransformerConfig.from_dict(fields)
    assert (cfg.d_mlp, cfg.d_vocab, cfg.act_fn, cfg.original_architecture) == (80, 290, "gelu_new", "GPT2LMHeadModel")
    assert cfg.n_params == lfp.get_num_params_of_pretrained(directory)


def test_the_number_of_parameters(directory: str) -> None:
    # Two layers: four attention matrices of 20 x 20, two MLP matrices of 20 x 80.
    assert lfp.get_num_params_of_pretrained(directory) == 2 * (4 * 400 + 2 * 1600)


def test_the_basic_config(directory: str) -> None:
    basic = lfp.get_basic_config(directory)
    assert basic == lfp.Config(d_model=20, d_vocab=290, n_ctx=24, d_head=5, d_mlp=80, n_heads=4, n_layers=2)
    assert lfp.get_basic_config(directory, first_n_layers=1).n_layers == 1


OWN = {
    "d_model": 8,
    "n_layers": 2,
    "d_mlp": 32,
    "d_head": 4,
    "n_heads": 2,
    "n_ctx": 16,
    "d_vocab": 50,
    "act_fn": "solu_ln",
    "attn_only": False,
}


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """HuggingFace's cache with a repository in TransformerLens' own format."""
    repository = tmp_path / "hub" / "models--NeelNanda--SoLU_1L512W_C4_Code"
    stated = OWN | {"normalization": "LNPre", "shortformer_pos": True, "tokenizer_name": "gpt2"}
    files = {"config.json": json.dumps(stated)} | {f"checkpoints/solu_{10**9 + n}.pth": "" for n in (10, 20, 30)}
    for name, content in files.items():
        path = repository / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return str(tmp_path / "hub")


def test_a_repository_in_transformerlens_own_format(cache: str) -> None:
    assert lfp.convert_neel_model_config("solu-1l", cache_dir=cache) == OWN | {
        "tokenizer_name": "gpt2",
        "final_rms": False,
        "original_architecture": "neel",
        "normalization_type": "LNPre",
        "positional_embedding_type": "shortformer",
    }
    cfg = lfp.get_pretrained_model_config(
        "solu-1l", first_n_layers=1, n_ctx=4, checkpoint_value=10**9 + 20, cache_dir=cache
    )
    assert (cfg.model_name, cfg.n_layers, cfg.n_ctx, cfg.d_model) == ("SoLU_1L512W_C4_Code", 1, 4, 8)
    assert (cfg.from_checkpoint, cfg.checkpoint_index, cfg.checkpoint_label_type) == (True, 1, "token")
    last = lfp.get_pretrained_model_config("solu-1l", checkpoint_index=-1, cache_dir=cache)
    assert (last.checkpoint_value, last.checkpoint_index) == (10**9 + 30, 2)
    with pytest.raises(AssertionError, match="no checkpoint at token 1000000025; the closest are 1000000020 "):
        lfp.get_pretrained_model_config("solu-1l", checkpoint_value=10**9 + 25, cache_dir=cache)


def test_a_shortformers_norms_cannot_be_folded(cache: str) -> None:
    path = next(Path(cache).glob("models--*/snapshots/*/config.json"))
    path.write_text(path.read_text().replace("LNPre", "LN"))
    for fold_ln in (False, True):
        cfg = lfp.get_pretrained_model_config("solu-1l", fold_ln=fold_ln, cache_dir=cache)
        assert cfg.normalization_type == "LN"


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_loaded_model_are_not_copied(raw: Any) -> None:
    found = lfp.get_pretrained_state_dict("gpt2", raw.cfg, hf_model=raw.hf_model)
    assert list(found) == raw.interior.weights.names()
    assert all(torch.equal(value, raw.state_dict()[name]) for name, value in found.items())
    assert found["blocks.1.attn.W_K"].data_ptr() == raw.blocks[1].attn.W_K.data_ptr()
    assert not any(value.requires_grad for value in found.values())


def test_the_weights_are_loaded_by_name(directory: str, raw: Any) -> None:
    found = lfp.get_pretrained_state_dict(directory, raw.cfg, dtype=torch.float64)
    assert found["blocks.0.mlp.W_in"].dtype == torch.float64
    torch.testing.assert_close(found["blocks.0.mlp.W_in"].float(), raw.blocks[0].mlp.W_in.detach())
    raw.load_state_dict(lfp.get_pretrained_state_dict(directory, raw.cfg))


def test_the_weights_of_a_native_model() -> None:
    fields = OWN | {"attn_only": True, "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig(**fields))
    found = lfp.get_pretrained_state_dict("mine", model.cfg, hf_model=model.hf_model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert found["embed.W_E"].data_ptr() == model.W_E.data_ptr()


def test_missing_weights_are_filled_in(raw: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole = raw.state_dict()
    given = {name: value for name, value in whole.items() if "W_pos" not in name and "ln1" not in name}
    given["embed.W_E"] = torch.ones(1)
    assert lfp.fill_missing_keys(raw, given) is given
    assert given.keys() == whole.keys()
    assert torch.equal(given["embed.W_E"], torch.ones(1))
    assert torch.equal(given["pos_embed.W_pos"], raw.W_pos)
    warned = {record.getMessage().split(": ")[1] for record in caplog.records}
    assert warned == {"pos_embed.W_pos"} | {f"blocks.{layer}.ln1.{part}" for layer in (0, 1) for part in "wb"}


def test_a_missing_matrix_of_a_branch_is_refused(raw: Any) -> None:
    given = {name: value for name, value in raw.state_dict().items() if not name.endswith("attn.W_V")}
    with pytest.raises(ValueError, match=r"\['blocks.0.attn.W_V', 'blocks.1.attn.W_V'\]"):
        lfp.fill_missing_keys(raw, given)
