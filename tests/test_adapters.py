"""Are models with peft's adapters shown as they are, whatever their adapters are set to?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from lensbridge import HookedTransformer
from lensbridge.errors import ReadOnlyWeightError, UnsupportedModelError
from lensbridge.readonly import ReadOnlyTensor
from lensbridge.tiny import tiny_family
from lensbridge.tiny.rough import roughen

#: Every processing option off.
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=32, attn_implementation="eager",
    ),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False, attn_implementation="eager",
    ),
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte", "lm_head"],
}
#: A layer of each family that has an adapter.
LAYER = {"llama": "model.layers.0.self_attn.o_proj", "gpt2": "transformer.h.0.attn.c_proj"}
FAMILIES = list(CONFIGS)


def rough(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()
    roughen(model, 0)
    return model


def lora(family: str, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | options
    return peft.LoraConfig(**settings)


def shaken(model: nn.Module, seed: int = 1) -> Any:
    """Every part of every adapter is random: a new LoRA adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "ia3" in name or "trainable_tokens" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(family: str, **options: Any) -> Any:
    return shaken(peft.get_peft_model(rough(family), lora(family, **options)))


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def lens_of(hf: Any, **options: bool) -> HookedTransformer:
    return HookedTransformer.from_pretrained("adapted", hf_model=hf, **options)


def assert_shown_as_merged(model: Any, lens: HookedTransformer, merged: Any = None) -> None:
    """Logits are the model's own; weights, points made of weights and edits those of the model with all merged."""
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.allclose(lens(tokens()).log_softmax(-1), expected.log_softmax(-1), atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload() if merged is None else merged
    theirs = lens_of(merged, **(RAW if not lens.processing.any else {}))
    theirs.set_processing(lens.processing)
    shown, wanted = lens.state_dict(), theirs.state_dict()
    assert list(shown) == list(wanted)
    for name, weight in wanted.items():
        assert torch.allclose(shown[name], weight, atol=1e-5), name
    with torch.no_grad():
        edits = [
            ("blocks.0.attn.hook_z", lambda value, hook: value * 1.5),
            ("blocks.0.attn.hook_pattern", lambda value, hook: value * 0.5),
            ("blocks.1.hook_resid_pre", lambda value, hook: value + 0.1),
        ]
        mine, other = (each.run_with_hooks(tokens(), fwd_hooks=edits) for each in (lens, theirs))
    assert torch.allclose(mine, other, atol=1e-4 * float(other.abs().max()))


# --- activations and weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_activations_are_the_adapted_models(family: str) -> None:
    model = adapted(family)
    lens, seen = lens_of(model, **RAW), []
    base = model.get_base_model()
    assert lens.hf_model is base
    handle = base.get_submodule(LAYER[family]).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        expected = model(tokens()).logits
        handle.remove()
        plain = lens(tokens())
        logits, cache = lens.run_with_cache(tokens())
    assert torch.equal(plain, expected) and torch.equal(logits, expected)
    z, out = seen[0]
    assert torch.equal(cache["blocks.0.attn.hook_z"].flatten(2), z)
    assert torch.equal(cache["blocks.0.hook_attn_out"], out)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(tokens()).logits, expected, atol=1e-2)
        assert torch.equal(lens(tokens()), model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("processed", [False, True])
def test_weights_are_merged(family: str, processed: bool) -> None:
    model = adapted(family)
    assert_shown_as_merged(model, lens_of(model, **({} if processed else RAW)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_of_lora(family: str) -> None:
    names = [name for name in TARGETS[family] if name not in ("embed_tokens", "wte")]
    model = adapted(family, lora_bias=True, target_modules=names)
    lens = lens_of(model, **RAW)
    layer = model.get_base_model().get_submodule(LAYER[family])
    with torch.no_grad():
        assert torch.allclose(lens.b_O[0], layer(torch.zeros(1, 64))[0], atol=1e-6)
    assert float(lens.b_O[0].abs().max()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_adapters(family: str) -> None:
    model = rough(family)
    model.add_adapter(lora(family), adapter_name="first")
    shaken(model)
    twin = adapted(family)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, twin(tokens()).logits)
        assert torch.equal(lens_of(model, **RAW)(tokens()), model(tokens()).logits)
    assert_shown_as_merged(model, lens_of(model), twin.merge_and_unload())
    lens = lens_of(model, **RAW)
    model.disable_adapters()
    assert torch.equal(lens.W_O, lens_of(rough(family), **RAW).W_O)
    model.enable_adapters()
    assert not torch.allclose(lens.W_O, lens_of(rough(family), **RAW).W_O, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_come_back(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(rough(family), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(lens_of(again, **RAW)(tokens()), model(tokens()).logits)
    loaded = rough(family)
    loaded.load_adapter(str(tmp_path))
    assert_shown_as_merged(model, lens_of(loaded))


def test_trained_copies_of_layers() -> None:
    """peft's ``modules_to_save``: an embedding, a head and norms that are trained as they are."""
    model = adapted("llama", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])
    lens = lens_of(model)
    assert_shown_as_merged(model, lens)
    own = model.get_base_model().lm_head
    raw = lens_of(model, **RAW)
    raw.unembed.W_U.data[0] = 0.5
    assert float(own.modules_to_save["default"].weight[0, 0]) == 0.5
    with model.disable_adapter():
        assert torch.equal(raw.W_U, own.original_module.weight.T)


def test_tokens_that_are_trained_alone() -> None:
    model = adapted("llama", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    assert_shown_as_merged(model, lens_of(model))
    with torch.no_grad():
        changed = lens_of(model, **RAW).W_E - lens_of(rough("llama"), **RAW).W_E
    assert changed.abs().amax(-1).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("processed", [False, True])
def test_a_router_of_experts(processed: bool) -> None:
    """peft puts LoRA on its parameter, since it is no linear layer."""
    model = shaken(peft.get_peft_model(tiny_family("mixtral"), peft.LoraConfig(target_modules=["gate", "v_proj"])))
    lens = lens_of(model, **({} if processed else RAW))
    assert "blocks.0.mlp.W_gate.weight" in lens.state_dict()
    assert_shown_as_merged(model, lens)
    assert isinstance(lens.blocks[0].mlp.W_gate.weight, ReadOnlyTensor)


# --- the state of the adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processed", [False, True])
def test_weights_follow_what_adapters_are_set_to(processed: bool) -> None:
    model = adapted("gpt2")
    model.add_adapter("other", lora("gpt2", r=2))
    shaken(model, seed=5)
    lens = lens_of(model, **({} if processed else RAW))
    assert_shown_as_merged(model, lens)
    first = lens.W_V.clone()
    model.set_adapter("other")
    assert not torch.allclose(lens.W_V, first, atol=1e-2)
    assert_shown_as_merged(model, lens)
    model.base_model.set_adapter(["default", "other"])
    assert_shown_as_merged(model, lens)
    for layer in model.modules():
        if hasattr(layer, "set_scale") and "other" in getattr(layer, "scaling", {}):
            layer.set_scale("other", 2.5)
    assert_shown_as_merged(model, lens)
    with torch.no_grad():
        layer = model.get_base_model().transformer.h[0].attn.c_attn
        layer.lora_A["default"].weight.data.mul_(1.5)
    assert_shown_as_merged(model, lens)
    both = lens.W_V.clone()
    model.merge_adapter()
    assert torch.allclose(lens.W_V, both, atol=1e-5)
    assert isinstance(lens.blocks[0].attn.W_V, ReadOnlyTensor) == processed
    model.unmerge_adapter()
    assert torch.allclose(lens.W_V, both, atol=1e-5)
    with model.disable_adapter():
        plain = lens_of(rough("gpt2"), **({} if processed else RAW))
        assert torch.allclose(lens.W_V, plain.W_V, atol=1e-5)


def test_merged_weights_cannot_be_edited_and_others_can() -> None:
    model = adapted("llama", target_modules=["o_proj"])
    lens = lens_of(model, **RAW)
    with pytest.raises(ReadOnlyWeightError, match="peft adds the adapters 'default'"):
        lens.blocks[0].attn.W_O[0] = 0.0
    with pytest.raises(ReadOnlyWeightError):
        lens.blocks[0].attn.W_O = torch.zeros(4, 16, 64)
    lens.blocks[0].mlp.W_in.data[0] = 0.25
    assert float(model.get_base_model().model.layers[0].mlp.up_proj.weight[0, 0]) == 0.25


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_gives_the_adapters_huggingfaces_gradients(family: str) -> None:
    model, twin = adapted(family), adapted(family)
    lens = lens_of(model)
    loss = lens(tokens(), return_type="loss")
    loss.backward()
    logits = twin(tokens()).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in twin.named_parameters():
        if name in trained:
            mine = model.get_parameter(name).grad
            assert torch.allclose(mine, parameter.grad, atol=1e-4 * float(parameter.grad.abs().max())), name


@pytest.mark.parametrize("processed", [False, True])
def test_gradients_pass_weights_to_adapters(processed: bool) -> None:
    model = adapted("gpt2")
    lens = lens_of(model, **({} if processed else RAW))
    lens.blocks[0].attn.W_O.pow(2).sum().backward()
    layer = model.get_base_model().transformer.h[0].attn.c_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = (each.detach().clone().requires_grad_() for each in (down, up))
    whole = layer.base_layer.weight.detach() + (b @ a).T * layer.scaling["default"]
    if processed:
        whole = whole - whole.mean(-1, keepdim=True)
    whole.pow(2).sum().backward()
    assert torch.allclose(down.grad, a.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(up.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_a_step_of_training_is_seen() -> None:
    model = adapted("gpt2")
    lens = lens_of(model)
    before = lens.W_V.clone()
    optimiser = torch.optim.SGD([each for each in lens.parameters() if each.requires_grad], lr=1.0)
    lens(tokens(), return_type="loss").backward()
    optimiser.step()
    assert not torch.allclose(lens.W_V, before, atol=1e-4)
    assert_shown_as_merged(model, lens)


# --- on quantised layers ---------------------------------------------------------------------------------------------


def test_lora_on_four_bits(tmp_path: Path) -> None:
    rough("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    options = {"quantization_config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    with torch.no_grad():
        quantised(tokens())
    plain = lens_of(quantised, **RAW).blocks[1].mlp.W_out.clone()
    model = shaken(peft.get_peft_model(quantised, lora("llama", target_modules=["down_proj", "v_proj"])))
    lens = lens_of(model, **RAW)
    with torch.no_grad():
        assert torch.equal(lens(tokens()), model(tokens()).logits)
        assert torch.allclose(lens_of(model)(tokens()).log_softmax(-1), lens(tokens()).log_softmax(-1), atol=1e-4)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    added = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T * layer.scaling["default"]
    assert torch.allclose(lens.blocks[1].mlp.W_out, plain + added, atol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: lora("llama", target_modules=["v_proj"], use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["v_proj"], init_weights=False, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_under_other_adapters_are_refused_until_merged(kind: str) -> None:
    model = shaken(peft.get_peft_model(rough("llama"), OTHERS[kind]()))
    lens = lens_of(model)
    with torch.no_grad():
        assert torch.equal(lens_of(model, **RAW)(tokens()), model(tokens()).logits)
        logits, cache = lens.run_with_cache(tokens())
        assert torch.allclose(logits.log_softmax(-1), model(tokens()).logits.log_softmax(-1), atol=1e-4)
        assert torch.allclose(cache["blocks.0.attn.hook_v"].flatten(2)[0, 0].isnan().sum(), torch.tensor(0))
    with pytest.raises(UnsupportedModelError, match="merge the adapters"):
        _ = lens.blocks[0].attn.W_V
    with model.disable_adapter():
        assert torch.allclose(lens.W_V, lens_of(rough("llama")).W_V)
    model.merge_adapter()
    assert_shown_as_merged(model, lens)


def test_a_prompt_that_was_learned_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(rough("llama"), config)
    with pytest.raises(UnsupportedModelError, match="PromptTuningConfig.*before the text"):
        lens_of(model)
