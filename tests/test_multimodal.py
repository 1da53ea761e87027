"""Are models that also see shown as their language models are, on texts alone?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from lensbridge import HookedTransformer
from lensbridge.errors import UnsupportedModelError
from lensbridge.tiny import tiny_config, tiny_model
from lensbridge.tiny.building import causal_lm_class

#: Every processing option off.
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
#: Their language model is one of a family of its own right.
OF_A_FAMILY = (
    *("llava", "llava_next", "llava_onevision", "internvl", "mistral3", "idefics2", "smolvlm", "vipllava", "janus"),
    *("aya_vision", "qianfan_ocr", "gemma3"),
)
#: Their language model is one of theirs.
OF_THEIR_OWN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "paligemma", "mllama")
ALL = (*OF_A_FAMILY, *OF_THEIR_OWN)


def wrapper(name: str) -> Any:
    """A tiny model that also sees."""
    return tiny_model(tiny_config(CONFIG_MAPPING[name]()), model_class=getattr(transformers, CLASSES[name]))


def language_model(hf: Any, layers: str) -> Any:
    """The causal language model of its family with the weights of a wrapper's."""
    config = hf.config.get_text_config(decoder=True)
    twin = tiny_model(config, model_class=causal_lm_class(config))
    body = layers.removesuffix(".layers") + "."
    state = {
        f"model.{name.removeprefix(body)}" if name.startswith(body) else name: weight
        for name, weight in hf.state_dict().items()
    }
    assert not twin.load_state_dict(state, strict=False).missing_keys
    return twin


def tokens() -> Tensor:
    return torch.randint(5, 40, (2, 6), generator=torch.Generator().manual_seed(0))


def lens_of(hf: Any, **options: bool) -> HookedTransformer:
    return HookedTransformer.from_pretrained("sees", hf_model=hf, **options)


@pytest.mark.parametrize("name", OF_A_FAMILY)
def test_points_and_weights_are_the_language_models(name: str) -> None:
    hf = wrapper(name)
    lens = lens_of(hf, **RAW)
    theirs = lens_of(language_model(hf, lens.interior.architecture.layers), **RAW)
    (_, cache), (_, expected) = lens.run_with_cache(tokens()), theirs.run_with_cache(tokens())
    assert list(cache) == list(expected)
    for point, value in expected.items():
        assert torch.equal(cache[point], value), point
    shown, wanted = lens.state_dict(), theirs.state_dict()
    assert list(shown) == list(wanted)
    assert all(torch.equal(weight, shown[key]) for key, weight in wanted.items())
    told = {key: value for key, value in vars(theirs.cfg).items() if key != "original_architecture"}
    assert {key: getattr(lens.cfg, key) for key in told} == told


@pytest.mark.parametrize("name", ALL)
def test_texts_alone(name: str) -> None:
    """Logits, those of an edit, and written texts are HuggingFace's own."""
    hf = wrapper(name)
    lens = lens_of(hf, **RAW)
    with torch.no_grad():
        expected = hf(input_ids=tokens()).logits
        logits, cache = lens.run_with_cache(tokens())
        assert torch.equal(lens(tokens()), expected) and torch.equal(logits, expected)
        processed = lens_of(hf)(tokens()).log_softmax(-1)
        assert torch.allclose(processed, expected.log_softmax(-1), atol=1e-4)
        layers = hf.get_submodule(lens.interior.architecture.layers)
        first = layers[lens.interior.architecture.number(0)]
        handle = first.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
        edited = hf(input_ids=tokens()).logits
        handle.remove()
        ours = lens.run_with_hooks(tokens(), fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value * 1.5)])
        assert torch.allclose(ours, edited, atol=1e-5) and not torch.allclose(edited, expected, atol=1e-2)
    total = cache["blocks.0.hook_resid_pre"] + cache["blocks.0.hook_attn_out"] + cache["blocks.0.hook_mlp_out"]
    assert torch.allclose(total, cache["blocks.1.hook_resid_pre"], atol=1e-5)
    written = tokens()
    for _ in range(4):
        written = torch.cat([written, hf(input_ids=written).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert torch.equal(lens.generate(tokens(), **options), written)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_padded_batches(name: str) -> None:
    hf = wrapper(name)
    lens = lens_of(hf, **RAW)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        expected = hf(input_ids=tokens()[:1, 2:]).logits
        found = lens(tokens(), attention_mask=mask)
    assert torch.allclose(found[:1, 2:], expected, atol=1e-4)


def test_what_differs_between_implementations_of_attention_is_refused() -> None:
    """On a text alone, PaliGemma's eager attention looks back only, and its scaled dot product attention both ways."""
    hf = wrapper("paligemma")
    hf.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="only supported with eager attention"):
        lens_of(hf)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "mllama"])
def test_loading_by_name(name: str, tmp_path: Path) -> None:
    hf = wrapper(name)
    hf.save_pretrained(tmp_path)
    lens = HookedTransformer.from_pretrained_no_processing(str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(lens(tokens()), hf(input_ids=tokens()).logits, atol=1e-5)
