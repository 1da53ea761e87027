"""Are hooked models made of the right parts, whether from a loaded model or from a config alone?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lensbridge import HookedTransformer, HookedTransformerConfig, Processing
from lensbridge.assembly import assembled
from lensbridge.errors import UnsupportedModelError
from lensbridge.interior import Interior
from lensbridge.loading import Loaded, Wish, load
from lensbridge.native import NativeForCausalLM
from lensbridge.native.interior import NativeInterior

FIELDS: dict[str, Any] = {
    "d_model": 12,
    "d_head": 4,
    "n_layers": 2,
    "n_ctx": 16,
    "d_vocab": 19,
    "act_fn": "relu",
    "device": "cpu",
    "seed": 1,
    "initializer_range": 0.5,
}


@pytest.fixture
def cfg() -> HookedTransformerConfig:
    return HookedTransformerConfig(**FIELDS)


@pytest.fixture
def native(cfg: HookedTransformerConfig) -> HookedTransformer:
    return HookedTransformer(cfg)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 19, (2, 6), generator=torch.Generator().manual_seed(0))


def test_a_config_alone_becomes_a_native_model(cfg: HookedTransformerConfig) -> None:
    interior, modules = assembled(None, cfg)
    assert isinstance(interior, NativeInterior)
    assert modules is interior.hf_model._modules
    assert interior.cfg is interior.hf_model.cfg is cfg


def test_a_loaded_native_model_is_taken_as_it_is(cfg: HookedTransformerConfig) -> None:
    hf_model = NativeForCausalLM.from_cfg(cfg)
    interior, _ = assembled(Loaded(hf_model, None, cfg), cfg)
    assert interior.hf_model is hf_model


def test_another_loaded_model_gets_components(lens: Any) -> None:
    loaded = load(Wish("gpt2", hf_model=lens.hf_model))
    interior, modules = assembled(loaded, loaded.cfg)
    assert isinstance(interior, Interior)
    assert list(modules) == ["embed", "hook_embed", "pos_embed", "hook_pos_embed", "blocks", "ln_final", "unembed"]
    assert interior.hf_model is lens.hf_model


def test_the_facade_has_the_native_models_modules(native: HookedTransformer, tokens: torch.Tensor) -> None:
    assert native.blocks is native.hf_model.blocks
    assert [name for name, _ in native.named_parameters()] == [n for n, _ in native.hf_model.named_parameters()]
    native.probe = torch.nn.Linear(12, 3)
    assert {"probe.weight", "probe.bias"} <= dict(native.named_parameters()).keys()
    native.unembed = torch.nn.Linear(12, 5)
    assert native(tokens).shape == native.hf_model(tokens).logits.shape == (2, 6, 5)


def test_hooks_act_in_runs_of_the_native_model_too(native: HookedTransformer, tokens: torch.Tensor) -> None:
    with native.hooks([("hook_embed", lambda value, hook: 0 * value)]):
        assert torch.equal(native.hf_model(tokens).logits, native(tokens))
    assert not torch.equal(native(tokens), native.run_with_hooks(tokens, fwd_hooks=[("hook_embed", _zero)]))


def _zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return 0 * value


def test_options_add_up_as_weights_are_rewritten(native: HookedTransformer, tokens: torch.Tensor) -> None:
    before = native(tokens).log_softmax(-1)
    native.set_processing(Processing(fold_ln=True))
    norm = native.ln_final
    native.set_processing(Processing(center_writing_weights=True))
    assert native.processing == Processing(fold_ln=True, center_writing_weights=True)
    assert native.cfg.layer_norm_folding
    assert native.mod_dict["ln_final"] is norm is native.hf_model.ln_final
    torch.testing.assert_close(native(tokens).log_softmax(-1), before, atol=1e-5, rtol=1e-5)
    native.load_and_process_state_dict(NativeForCausalLM.from_cfg(native.cfg).state_dict(), fold_ln=False)
    assert not native.processing.fold_ln


def test_stand_ins_leave_the_points_where_they_were(native: HookedTransformer, tokens: torch.Tensor) -> None:
    point = native.blocks[0].hook_attn_out

    def fail(value: torch.Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(native.run_sweep(tokens, [[("blocks.0.hook_attn_out", fail)]] * 2))
    assert native.blocks[0].hook_attn_out is point
    assert not point.fwd_hooks


def test_a_weight_that_is_not_there_is_no_attribute(cfg: HookedTransformerConfig) -> None:
    cfg.positional_embedding_type = "alibi"
    assert hasattr(HookedTransformer(cfg), "W_pos")
    cfg.positional_embedding_type, cfg.rotary_dim, cfg.attn_only = "rotary", 4, True
    rotary = HookedTransformer(cfg)
    assert not hasattr(rotary, "W_pos")
    assert not hasattr(rotary, "W_in")


@pytest.mark.parametrize("positions", ["standard", "shortformer", "alibi", "rotary"])
@pytest.mark.parametrize("cached", [True, False])
def test_generation_from_embeddings(positions: str, cached: bool, tokens: torch.Tensor) -> None:
    model = HookedTransformer(FIELDS | {"positional_embedding_type": positions})
    options: dict[str, Any] = {"max_new_tokens": 4, "stop_at_eos": False, "do_sample": False, "verbose": False}
    expected = model.generate(tokens, **options)
    embeds = model.embed(tokens).detach()
    new = model.generate(embeds, return_type="tokens", use_past_kv_cache=cached, **options)
    assert torch.equal(new, expected[:, 6:])


def test_a_saved_model_is_loaded(native: HookedTransformer, tokens: torch.Tensor, tmp_path: Path) -> None:
    native.hf_model.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(str(tmp_path), default_prepend_bos=False, device="cpu")
    assert torch.equal(again(tokens), native(tokens))
    assert again.tokenizer is None
    assert again.cfg.default_prepend_bos is False
    assert again.cfg.tokenizer_name == str(tmp_path)


def test_a_given_native_model_is_processed_itself(cfg: HookedTransformerConfig, tokens: torch.Tensor) -> None:
    hf_model = NativeForCausalLM.from_cfg(cfg)
    kept = HookedTransformer.from_pretrained_no_processing("mine", hf_model=hf_model)
    assert kept.hf_model is hf_model
    assert kept.cfg.normalization_type == "LN"
    assert HookedTransformer.from_pretrained("mine", hf_model=hf_model).cfg.normalization_type == "LNPre"


@pytest.mark.parametrize("call", [lambda model: model.trace([1]), lambda model: model.session()])
def test_traces_are_refused(native: HookedTransformer, call: Callable) -> None:
    with pytest.raises(UnsupportedModelError, match="has no traces"):
        call(native)


def test_devices_are_refused_where_nothing_would_spread_over_them(cfg: HookedTransformerConfig) -> None:
    cfg.n_devices = 2
    with pytest.raises(UnsupportedModelError, match="is on one device"):
        HookedTransformer(cfg)
    cfg.n_devices = 1
    with pytest.raises(UnsupportedModelError, match="is on one device"):
        HookedTransformer.from_pretrained("mine", hf_model=NativeForCausalLM.from_cfg(cfg), n_devices=2)
