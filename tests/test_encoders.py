"""Do the hooked encoders run, load, refuse and share memory as they say, on small models of HuggingFace's?

Their numbers are compared with TransformerLens in ``compat_tests/``; here is what follows from HuggingFace alone.
"""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lensbridge import (
    BertNextSentencePrediction,
    HookedAudioEncoder,
    HookedEncoder,
    HookedEncoderDecoder,
    HookedTransformerConfig,
)
from lensbridge.errors import (
    DisabledPointError,
    HookError,
    ModelNotFoundError,
    ReadOnlyWeightError,
    SourceNotFoundError,
    UnknownArgumentError,
    UnknownPointError,
    UnsupportedModelError,
)

BERT_SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": 30,
    "max_position_embeddings": 10,
}
T5_SIZES = {
    "d_model": 12,
    "d_kv": 5,
    "num_heads": 3,
    "d_ff": 20,
    "num_layers": 2,
    "vocab_size": 30,
    "decoder_start_token_id": 0,
}
HUBERT_SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "conv_dim": [8, 8],
    "conv_stride": [3, 2],
    "conv_kernel": [4, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TOKENS = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))


def bert(kind: Any = BertForPreTraining, attention: str = "eager", **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(BertConfig(**BERT_SIZES, attn_implementation=attention, **options)).eval()


def t5(attention: str = "eager", **options: Any) -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5_SIZES, attn_implementation=attention, **options)).eval()


def hubert(kind: Any = HubertModel, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(HubertConfig(**HUBERT_SIZES, attn_implementation="eager", **options)).eval()


def hooked(hf_model: Any, **options: Any) -> Any:
    family = {"Bert": HookedEncoder, "T5Fo": HookedEncoderDecoder, "Hube": HookedAudioEncoder}
    return family[type(hf_model).__name__[:4]].from_pretrained("here", hf_model=hf_model, **options)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[MASK]", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def run(model: Any) -> torch.Tensor:
    if isinstance(model, HookedEncoderDecoder):
        return model(TOKENS, TOKENS[:, :4], one_zero_attention_mask=torch.ones_like(TOKENS))
    if isinstance(model, HookedAudioEncoder):
        return model(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)))
    return model(TOKENS)


@pytest.fixture(params=[bert, t5, hubert], ids=["bert", "t5", "hubert"])
def model(request: pytest.FixtureRequest) -> Any:
    return hooked(request.param())


def test_transformer_lens_module_paths() -> None:
    for kind in (HookedEncoder, HookedEncoderDecoder, HookedAudioEncoder, BertNextSentencePrediction):
        assert getattr(importlib.import_module(f"lensbridge.{kind.__name__}"), kind.__name__) is kind


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_the_hf_model_as_it_was(model: Any) -> None:
    before = {path: dict(module.__dict__) for path, module in model.hf_model.named_modules()}
    plain = run(model)
    with model.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: value * 1.01)]):
        assert not torch.equal(run(model), plain)
    for path, module in model.hf_model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
    assert torch.equal(run(model), plain)


def test_a_cache_has_every_point_that_is_on(model: Any) -> None:
    seen: list[str] = []
    with model.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: seen.append(hook.name))]):
        run(model)
    heads = ("pooler", "nsp_head")
    expected = {name for name in model.hook_dict if model._is_on(name) and not name.startswith(heads)}
    assert set(seen) == expected


def test_an_exception_in_a_hook_leaves_a_clean_model(model: Any) -> None:
    plain = run(model)
    name = next(name for name in model.hook_dict if name.endswith("hook_pattern"))

    def fail(value: torch.Tensor, hook: Any) -> None:
        raise ZeroDivisionError("in the hook")

    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[(name, fail)]):
        run(model)
    assert torch.equal(run(model), plain)
    assert not model.list_hooks()


def test_what_is_no_tensor_is_refused(model: Any) -> None:
    name = next(name for name in model.hook_dict if name.endswith("hook_z"))
    with pytest.raises(HookError, match=name), model.hooks(fwd_hooks=[(name, lambda value, hook: 3)]):
        run(model)


def test_a_run_inside_a_hook(model: Any) -> None:
    plain, inner = run(model), []
    name = next(name for name in model.hook_dict if name.endswith("hook_resid_mid"))

    def again(value: torch.Tensor, hook: Any) -> torch.Tensor:
        model.reset_hooks()
        inner.append(run(model))
        return value.roll(1, -1)

    model.add_hook(name, again)
    assert not torch.equal(run(model), plain)
    assert torch.equal(inner[0], plain)


@pytest.mark.parametrize("make", [bert, t5])
def test_only_runs_that_touch_scores_or_pattern_switch_to_eager(make: Any) -> None:
    model, used = hooked(make(attention="sdpa")), []
    stack = "encoder" if make is t5 else "blocks"

    def look(value: torch.Tensor, hook: Any) -> None:
        used.append(model.hf_model.config._attn_implementation)

    for point in ("hook_q", "hook_pattern"):
        with model.hooks(fwd_hooks=[(f"{stack}.0.attn.{point}", look)]):
            run(model)
    assert used == ["sdpa", "eager"]
    configs = [module.config for module in model.hf_model.modules() if isinstance(module, PreTrainedModel)]
    assert {config._attn_implementation for config in configs} == {"sdpa"}


def test_identities_of_a_bert_block() -> None:
    model = hooked(bert())
    model.cfg.use_attn_result = True
    _, cache = model.run_with_cache(TOKENS)
    block, at = model.blocks[1], {name.split(".", 2)[2]: x for name, x in cache.items() if name.startswith("blocks.1.")}
    torch.testing.assert_close(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
    normed = at["ln1.hook_normalized"] * block.ln1.w + block.ln1.b
    torch.testing.assert_close(normed + at["hook_mlp_out"], at["hook_resid_post"])
    torch.testing.assert_close(normed @ block.mlp.W_in + block.mlp.b_in, at["mlp.hook_pre"])
    torch.testing.assert_close(at["mlp.hook_post"] @ block.mlp.W_out + block.mlp.b_out, at["hook_mlp_out"])
    torch.testing.assert_close(at["attn.hook_result"].sum(-2) + block.attn.b_O, at["hook_attn_out"])
    queries = torch.einsum("bpm,hmd->bphd", at["hook_resid_pre"], block.attn.W_Q) + block.attn.b_Q
    torch.testing.assert_close(queries, at["attn.hook_q"])
    torch.testing.assert_close(cache["unembed.hook_in"] @ model.W_U + model.b_U, cache["unembed.hook_out"])


@pytest.mark.parametrize("options", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=str)
def test_identities_of_a_t5_block(options: dict[str, Any]) -> None:
    """The gated MLP and the head of its own are those of T5 1.1, which TransformerLens does not load."""
    model = hooked(t5(**options))
    _, cache = model.run_with_cache(TOKENS, TOKENS[:, :4])
    block = model.decoder[1]
    at = {name.split(".", 2)[2]: x for name, x in cache.items() if name.startswith("decoder.1.")}
    torch.testing.assert_close(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
    torch.testing.assert_close(at["hook_resid_mid"] + at["hook_cross_attn_out"], at["hook_resid_mid_cross"])
    torch.testing.assert_close(at["hook_resid_mid_cross"] + at["hook_mlp_out"], at["hook_resid_post"])
    normed = at["ln3.hook_normalized"] * block.ln3.w
    if options:
        torch.testing.assert_close(normed @ block.mlp.W_gate, at["mlp.hook_pre"])
        torch.testing.assert_close(normed @ block.mlp.W_in, at["mlp.hook_pre_linear"])
        torch.testing.assert_close(
            torch.nn.functional.gelu(at["mlp.hook_pre"], approximate="tanh") * at["mlp.hook_pre_linear"],
            at["mlp.hook_post"],
        )
        assert model.cfg.gated_mlp
    else:
        torch.testing.assert_close(normed @ block.mlp.W_in, at["mlp.hook_pre"])
    encoded = cache["encoder_final_ln.hook_normalized"] * model.encoder_final_ln.w
    keys = torch.einsum("bpm,hmd->bphd", encoded, block.cross_attn.W_K)
    torch.testing.assert_close(keys, at["cross_attn.hook_k"])
    torch.testing.assert_close(cache["unembed.hook_in"] @ model.W_U, cache["unembed.hook_out"])


def test_the_input_of_cross_attention_alone() -> None:
    """An edit there reaches cross attention, and not the stream around it."""
    model = hooked(t5())
    model.cfg.use_attn_in = True
    _, plain = model.run_with_cache(TOKENS, TOKENS[:, :4])
    with model.hooks(fwd_hooks=[("decoder.0.hook_cross_attn_in", lambda value, hook: value.roll(1, -1))]):
        _, cache = model.run_with_cache(TOKENS, TOKENS[:, :4])
    out, mid = "decoder.0.hook_cross_attn_out", "decoder.0.hook_resid_mid"
    assert not torch.equal(cache[out], plain[out])
    assert torch.equal(cache[mid], plain[mid])
    torch.testing.assert_close(cache["decoder.0.hook_resid_mid_cross"], cache[mid] + cache[out])


def test_what_all_heads_read_together() -> None:
    model = hooked(t5())
    model.cfg.use_attn_in = True
    _, plain = model.run_with_cache(TOKENS, TOKENS[:, :4])
    assert plain["encoder.0.hook_attn_in"].shape == (2, 6, 3, 12)

    def first_head(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, :, 0] *= -1
        return value

    with model.hooks(fwd_hooks=[("encoder.0.hook_attn_in", first_head)]):
        _, cache = model.run_with_cache(TOKENS, TOKENS[:, :4])
    for letter in "qkv":
        name = f"encoder.0.attn.hook_{letter}"
        torch.testing.assert_close(cache[name][:, :, 0], -plain[name][:, :, 0])
        torch.testing.assert_close(cache[name][:, :, 1:], plain[name][:, :, 1:])


def test_dropout_in_training_is_hfs(model: Any) -> None:
    model.train()
    torch.manual_seed(0)
    first = run(model)
    assert model.hf_model.training
    assert not torch.equal(first, run(model))
    model.eval()
    assert torch.equal(run(model), run(model))


def test_an_edit_under_gradient_checkpointing_is_refused() -> None:
    model = hooked(bert())
    model.hf_model.gradient_checkpointing_enable()
    model.train()
    hook = ("hook_full_embed", lambda value, hook: value)
    with model.hooks(fwd_hooks=[hook]), pytest.raises(UnsupportedModelError, match="checkpointing"):
        model(TOKENS)


def test_layers_dropped_at_random() -> None:
    model = hooked(hubert(layerdrop=0.9))
    model.train()
    inputs = torch.randn(1, 5, 12)
    assert model(inputs).shape == inputs.shape
    with pytest.raises(UnsupportedModelError, match="layerdrop = 0"):
        model.run_with_cache(inputs)
    model.hf_model.config.layerdrop = 0.0
    _, cache = model.run_with_cache(inputs)
    assert "blocks.1.hook_resid_post" in cache
    assert all(module.training for module in model.hf_model.modules())


def test_a_replaced_module_is_noticed() -> None:
    model = hooked(bert())
    model.run_with_cache(TOKENS)
    layer = model.hf_model.bert.encoder.layer[0]
    layer.output.dense = copy.deepcopy(layer.output.dense)
    with torch.no_grad():
        layer.output.dense.bias += 1
    with pytest.raises(SourceNotFoundError, match="run once more"):
        model.run_with_cache(TOKENS)
    output, cache = model.run_with_cache(TOKENS)
    assert torch.equal(output, model.hf_model(TOKENS).prediction_logits)
    assert torch.equal(cache["unembed.hook_out"], output)


def test_half_precision() -> None:
    model = hooked(bert()).to(torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16
    _, cache = model.run_with_cache(TOKENS)
    assert cache["blocks.0.ln1.hook_scale"].dtype == torch.float32
    with model.hooks(fwd_hooks=[("blocks.0.ln1.hook_normalized", lambda value, hook: value * 2)]):
        assert model(TOKENS).dtype == torch.bfloat16


# --- points -----------------------------------------------------------------------------------------------------------


def test_asking_for_points() -> None:
    model = hooked(t5())
    with pytest.raises(UnknownPointError, match="encoder.0.attn.hook_q"):
        model.run_with_cache(TOKENS, TOKENS, names_filter="encoder.0.attn.hook_qs")
    for name, reason in (
        ("encoder.0.hook_mlp_in", "use_hook_mlp_in = True"),
        ("decoder.1.attn.hook_result", "use_attn_result = True"),
        ("decoder.0.hook_q_input", "use_split_qkv_input = True"),
        ("encoder.0.hook_attn_in", "use_attn_in = True"),
        ("encoder.0.attn.rel_pos_hook", "never fires"),
    ):
        for ask in (
            lambda name=name: model.add_hook(name, lambda value, hook: None),
            lambda name=name: model.run_with_cache(TOKENS, TOKENS, names_filter=[name]),
            lambda name=name: model.run_with_hooks(TOKENS, TOKENS, fwd_hooks=[(name, lambda value, hook: None)]),
        ):
            with pytest.raises(DisabledPointError, match=reason):
                ask()
    model.cfg.use_attn_result = True
    model.add_hook("decoder.1.attn.hook_result", lambda value, hook: None)
    model.cfg.use_attn_result = False
    with pytest.raises(DisabledPointError):
        model(TOKENS, TOKENS)


def test_a_head_that_the_model_does_not_have() -> None:
    masked, following = hooked(bert(BertForMaskedLM)), hooked(bert(BertForNextSentencePrediction))
    types = torch.zeros_like(TOKENS)
    assert torch.equal(masked(TOKENS), masked.hf_model(TOKENS).logits)
    assert torch.equal(
        BertNextSentencePrediction(following)(TOKENS, token_type_ids=types), following.hf_model(TOKENS).logits
    )
    with pytest.raises(UnsupportedModelError, match="BertForPreTraining"):
        BertNextSentencePrediction(masked)(TOKENS, token_type_ids=types)
    with pytest.raises(UnsupportedModelError, match="BertNextSentencePrediction"):
        following(TOKENS)
    with pytest.raises(AttributeError, match=r"bert\.pooler"):
        _ = masked.pooler.W
    with pytest.raises(UnsupportedModelError, match=r"cls\.predictions"):
        _ = following.W_U
    assert "pooler.W" not in masked.state_dict()
    assert "nsp_head.W" in following.state_dict()
    torch.testing.assert_close(masked.encoder_output(TOKENS), masked.hf_model.bert(TOKENS).last_hidden_state)


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_without_a_tokenizer() -> None:
    for call in (
        lambda: hooked(bert())("a b"),
        lambda: hooked(bert())(TOKENS, return_type="predictions"),
        lambda: hooked(t5())("a b"),
        lambda: hooked(t5()).generate(TOKENS),
    ):
        with pytest.raises(AssertionError, match="tokenizer"):
            call()


def test_wrong_arguments() -> None:
    words = tokenizer()
    encoder, both = hooked(bert(), tokenizer=words), hooked(t5(), tokenizer=words)
    for call in (lambda: encoder(TOKENS, "loss"), lambda: both(TOKENS, TOKENS, "loss")):
        with pytest.raises(ValueError, match="return_type"):
            call()
    with pytest.raises(ValueError, match="return_type"):
        BertNextSentencePrediction(encoder)(TOKENS, "loss", TOKENS)
    with pytest.raises(ValueError, match="got one text"):
        BertNextSentencePrediction(encoder)("a b")
    with pytest.raises(TypeError, match="list"):
        both.generate(["a", "b"])
    with pytest.raises(AssertionError, match="eos_token_id"):
        both.generate(TOKENS, verbose=False)
    assert both.generate("a b", verbose=False, eos_token_id=5, do_sample=False).strip() is not None
    with pytest.raises(UnsupportedModelError, match="processor"):
        hooked(hubert()).to_frames(torch.zeros(60))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_directory_with_its_tokenizer(tmp_path: Path) -> None:
    hf_model = bert()
    hf_model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = HookedEncoder.from_pretrained(str(tmp_path), device="cpu")
    assert type(model.hf_model) is BertForPreTraining
    assert not model.hf_model.training
    assert torch.equal(model(TOKENS), hf_model(TOKENS).prediction_logits)
    assert model.to_tokens("a b")[0].tolist() == [[3, 4]]
    assert model("a [MASK]", return_type="predictions") == model.tokenizer.decode(model("a [MASK]")[0, 1].argmax())
    half = HookedEncoder.from_pretrained(str(tmp_path), device="cpu", dtype="bfloat16")
    assert half.cfg.dtype == next(half.hf_model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM, BertForNextSentencePrediction])
def test_no_head_is_made_up(kind: Any, tmp_path: Path) -> None:
    bert(kind).save_pretrained(tmp_path)
    assert type(HookedEncoder.from_pretrained(str(tmp_path), device="cpu").hf_model) is kind


def test_a_checkpoint_without_any_head(tmp_path: Path) -> None:
    bert(BertModel).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="incomplete"):
        HookedEncoder.from_pretrained(str(tmp_path), device="cpu")


def test_directories_of_the_others(tmp_path: Path) -> None:
    hf_model = t5()
    hf_model.save_pretrained(tmp_path / "t5")
    model = HookedEncoderDecoder.from_pretrained(str(tmp_path / "t5"), device="cpu", dtype=None)
    assert torch.equal(run(model), run(hooked(hf_model)))
    with_head = hubert(HubertForCTC, vocab_size=9)
    with_head.save_pretrained(tmp_path / "ctc")
    loaded = HookedAudioEncoder.from_pretrained(str(tmp_path / "ctc"), device="cpu")
    torch.testing.assert_close(run(loaded), run(hooked(with_head)))
    assert type(loaded.hubert_model) is HubertModel
    with pytest.raises(UnsupportedModelError, match="HookedEncoderDecoder runs on T5ForConditionalGeneration"):
        HookedEncoderDecoder.from_pretrained(str(tmp_path / "ctc"))


def test_models_that_it_does_not_run_on() -> None:
    with pytest.raises(UnsupportedModelError, match="BertModel"):
        HookedEncoder.from_pretrained("here", hf_model=bert(BertModel))
    with pytest.raises(UnsupportedModelError, match="is_decoder"):
        hooked(bert(BertForMaskedLM, is_decoder=True))
    with pytest.raises(UnsupportedModelError, match="do_stable_layer_norm"):
        hooked(hubert(do_stable_layer_norm=True, feat_extract_norm="layer"))
    with pytest.raises(UnsupportedModelError, match="HookedAudioEncoder runs on"):
        HookedAudioEncoder.from_pretrained("here", hf_model=t5())


def test_a_dtype_that_is_not_applied_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    hooked(bert(), dtype=torch.float16)
    assert "not applied" in caplog.text


def test_stacks_of_different_heights() -> None:
    model = hooked(t5(num_decoder_layers=1))
    assert model.all_head_labels() == [f"EL{x}H{h}" for x in range(2) for h in range(3)] + ["DL0H0", "DL0H1", "DL0H2"]
    assert model.W_Q.shape == (3, 3, 12, 5)
    assert "decoder.1.hook_resid_pre" not in model.hook_dict


def test_arguments_that_nothing_would_read() -> None:
    with pytest.raises(UnknownArgumentError, match="revision"):
        hooked(bert(), revision="main")
    with pytest.raises(UnknownArgumentError, match="fold_ln"):
        HookedEncoder.from_pretrained("bert-base-cased", fold_ln=True)
    with pytest.raises(UnknownArgumentError, match="other"):
        HookedEncoder(HookedTransformerConfig(**small()), other=1)
    with pytest.raises(AssertionError, match="Quantization"):
        HookedEncoder.from_pretrained("bert-base-cased", load_in_8bit=True)
    with pytest.raises(ValueError, match="checkpoints"):
        HookedEncoder.from_pretrained("bert-base-cased", checkpoint_index=1)
    with pytest.raises(ModelNotFoundError, match="no such local directory"):
        HookedEncoder.from_pretrained("no/such-model", local_files_only=True)


# --- from a config ----------------------------------------------------------------------------------------------------


def small(**options: Any) -> dict[str, Any]:
    sizes = {"n_layers": 1, "d_model": 12, "n_heads": 3, "d_head": 4, "d_mlp": 16, "n_ctx": 8, "d_vocab": 30}
    return {**sizes, "act_fn": "gelu", "attention_dir": "bidirectional", "device": "cpu", "seed": 0, **options}


def test_a_model_of_a_configs_sizes() -> None:
    for kind, wrapper in ((BertForPreTraining, HookedEncoder), (HubertModel, HookedAudioEncoder)):
        model = wrapper(small(d_model=16, n_heads=4))
        assert type(model.hf_model) is kind
        assert model.W_Q.shape == (1, 4, 16, 4)
    relative = {"relative_attention_max_distance": 9, "relative_attention_num_buckets": 6, "act_fn": "relu"}
    model = HookedEncoderDecoder(HookedTransformerConfig(**small(d_head=5, **relative)), tokenizer())
    assert model(TOKENS[:, :5], TOKENS[:, :3]).shape == (2, 3, 30)
    assert model.W_Q.shape == (2, 3, 12, 5)
    by_tokenizer = HookedEncoder(small(d_vocab=-1), tokenizer())
    assert by_tokenizer.W_E.shape == (6, 12)


def test_configs_that_no_model_has() -> None:
    with pytest.raises(UnsupportedModelError, match="d_head"):
        HookedEncoder(small(d_head=5))
    with pytest.raises(AssertionError, match="tokenizer"):
        HookedEncoder(small(d_vocab=-1))
    with pytest.raises(ValueError, match="from_pretrained"):
        HookedEncoder("bert-base-cased")  # type: ignore[arg-type]
    cfg = HookedTransformerConfig(**small())
    cfg.n_devices = 2
    with pytest.raises(AssertionError, match="one device"):
        HookedEncoder(cfg)
    with pytest.raises(ValueError, match="one device"):
        HookedEncoderDecoder(cfg)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_share_memory_with_huggingface(model: Any) -> None:
    owners = {parameter.untyped_storage().data_ptr() for parameter in model.hf_model.parameters()}
    for name, weight in model.state_dict(keep_vars=True).items():
        if name.endswith((".mask", ".IGNORE")):
            continue
        if weight.untyped_storage().data_ptr() in owners:
            assert weight.requires_grad, name
        else:
            # T5 has no biases.
            assert ".b_" in name
            assert not weight.any()
            with pytest.raises(ReadOnlyWeightError, match="no parameter"):
                weight += 1


def test_an_edit_of_a_weight_is_an_edit_of_the_model(model: Any) -> None:
    first = model.get_submodule(model.layers()[0])
    plain = run(model)
    first.attn.W_V.data[1] = 0
    _, cache = model.run_with_cache(*arguments(model))
    assert not torch.equal(run(model), plain)
    bias = first.attn.b_V[1].detach().as_subclass(torch.Tensor)
    values = cache[f"{model.layers()[0]}.attn.hook_v"][:, :, 1]
    torch.testing.assert_close(values, bias.expand_as(values))
    first.attn.W_O = torch.zeros_like(first.attn.W_O)
    assert not first.attn.W_O.any()
    with pytest.raises(ValueError, match="shape"):
        first.attn.W_O = torch.zeros(2, 2)
    with pytest.raises(ReadOnlyWeightError, match="copy"):
        model.W_Q[0] = 0


def arguments(model: Any) -> tuple[torch.Tensor, ...]:
    if isinstance(model, HookedEncoderDecoder):
        return TOKENS, TOKENS[:, :4]
    return (torch.randn(2, 5, 12),) if isinstance(model, HookedAudioEncoder) else (TOKENS,)


def test_gradients_reach_weights_and_parameters(model: Any) -> None:
    loss = run(model).square().mean()
    loss.backward()
    attention = model.get_submodule(model.layers()[0]).attn
    assert attention.W_Q.grad.abs().sum() > 0
    names = dict(model.hf_model.named_parameters())
    assert dict(model.named_parameters()).keys() == names.keys()


def test_state_dicts_are_loaded(model: Any) -> None:
    other = copy.deepcopy(model.hf_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    theirs = hooked(other)
    result = model.load_state_dict(theirs.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    names = [name for name in theirs.state_dict() if not name.endswith((".mask", ".IGNORE"))]
    for name in names:
        assert torch.equal(model.state_dict()[name], theirs.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="missing"):
        model.load_state_dict({})
    assert len(model.load_state_dict({}, strict=False).missing_keys) == len(names)
    with pytest.raises(ValueError, match="shape"):
        model.load_state_dict({names[0]: torch.zeros(1)}, strict=False)


@pytest.mark.parametrize("make", [bert, t5])
def test_a_tied_head_takes_equal_values_only(make: Any) -> None:
    model = hooked(make())
    table = next(name for name in model.state_dict() if name.endswith("embed.W_E"))
    other = {name: value.clone() for name, value in model.state_dict().items()}
    other["unembed.W_U"] *= 2
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
        model.load_state_dict(other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other[table] *= 2
    model.load_state_dict(other)
    assert torch.equal(model.state_dict()[table], 2 * before[table])


def test_a_head_of_its_own_takes_values_of_its_own() -> None:
    model = hooked(bert(tie_word_embeddings=False))
    other = {name: value.clone() for name, value in model.state_dict().items()}
    other["unembed.W_U"] *= 2
    model.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_a_state_dict_is_pytorchs(model: Any) -> None:
    assert isinstance(model.state_dict(), OrderedDict)
    mine: dict[str, torch.Tensor] = {}
    assert model.state_dict(mine, "at.") is mine
    assert list(mine) == [f"at.{name}" for name in model.state_dict()]


def test_parts_by_themselves() -> None:
    model, stream = hooked(bert()), torch.randn(2, 5, 12)
    seen: list[str] = []
    with model.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: seen.append(hook.name))]):
        model.blocks[1].ln1(stream)
    assert seen == ["blocks.1.ln1.hook_scale", "blocks.1.ln1.hook_normalized"]
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp"):
        model.blocks[0].mlp(stream)
    both = hooked(t5())
    torch.testing.assert_close(
        both.encoder[0].mlp(stream), both.hf_model.encoder.block[0].layer[1].DenseReluDense(stream)
    )
    assert both.encoder[0].attn(stream).shape == stream.shape
    assert "W_Q" in dir(both.encoder[0].attn)
    assert both.encoder[0].attn.rel_pos_bias.weight.shape == (32, 3)


def test_a_copy_is_a_model_of_its_own(model: Any) -> None:
    run(model)
    model.run_with_cache(*arguments(model))
    other = copy.deepcopy(model)
    plain = run(model)
    with torch.no_grad():
        for parameter in other.hf_model.parameters():
            parameter.add_(0.5)
    assert torch.equal(run(model), plain)
    assert not torch.equal(run(other), plain)
    assert other.get_submodule(model.layers()[0]).attn.inside.hf_model is other.hf_model
