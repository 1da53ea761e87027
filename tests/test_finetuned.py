"""Do checkpoints on a disk, as training leaves them, come up as they are?

In any number of files, with a head of their own or the embedding's, with tokens added, in half precision, by their
directory or as a loaded model under the name of the one that was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lensbridge import HookedTransformer
from lensbridge.tiny import tiny_config, tiny_model

#: Every processing option off.
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox")


def trained(family: str, **options: Any) -> Any:
    """A model after some steps of training, which leave no parameter as it was."""
    config = tiny_config(family)
    for name, value in options.items():
        setattr(config, name, value)
    model = tiny_model(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def loaded(directory: Path, **options: Any) -> HookedTransformer:
    return HookedTransformer.from_pretrained(str(directory), **options)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_that_training_has_saved(family: str, tied: bool, tmp_path: Path) -> None:
    hf = trained(family, tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path)
    lens, processed = loaded(tmp_path, **RAW), loaded(tmp_path)
    with torch.no_grad():
        expected = hf(tokens()).logits
        assert torch.equal(lens(tokens()), expected)
        found = processed(tokens()).log_softmax(-1)
    assert torch.allclose(found, expected.log_softmax(-1), atol=1e-4)
    embedding, head = lens.hf_model.get_input_embeddings().weight, lens.hf_model.get_output_embeddings().weight
    assert (embedding is head) == lens.interior.weights.tied == tied
    lens.unembed.W_U.data[0, 0] = 0.75
    assert (float(embedding[0, 0]) == 0.75) == tied


def test_many_files(tmp_path: Path) -> None:
    hf = trained("llama")
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 2
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path, **RAW)(tokens()), hf(tokens()).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_were_added(family: str, tied: bool, tmp_path: Path) -> None:
    hf = trained(family, tie_word_embeddings=tied)
    before = hf.config.vocab_size
    hf.resize_token_embeddings(before + 3, mean_resizing=False)
    hf.save_pretrained(tmp_path)
    lens, new = loaded(tmp_path), torch.tensor([[before, before + 2, 5]])
    assert lens.cfg.d_vocab == lens.cfg.d_vocab_out == before + 3
    assert lens.W_E.shape[0] == lens.W_U.shape[1] == before + 3
    with torch.no_grad():
        found, expected = lens(new), hf(new).logits
    assert torch.allclose(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("as_object", [False, True])
def test_under_the_name_of_the_model_that_was_trained(as_object: bool, tmp_path: Path) -> None:
    """``from_pretrained("gpt2", hf_model=...)``: the name gives the config's, everything else is the model's."""
    hf = trained("gpt2")
    hf.save_pretrained(tmp_path)
    own = hf if as_object else AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    lens = HookedTransformer.from_pretrained("gpt2", hf_model=own, **RAW)
    assert lens.hf_model is own and lens.cfg.model_name == "gpt2"
    assert lens.cfg.n_layers == hf.config.n_layer and lens.cfg.d_model == hf.config.n_embd
    with torch.no_grad():
        assert torch.equal(lens(tokens()), hf(tokens()).logits)


def test_a_model_that_is_still_trained() -> None:
    """Weights and values follow the steps, in any basis."""
    hf = trained("gpt2")
    lens = HookedTransformer.from_pretrained("gpt2", hf_model=hf)
    before = lens.W_V.clone()
    optimiser = torch.optim.SGD(hf.parameters(), lr=0.1)
    hf(input_ids=tokens(), labels=tokens()).loss.backward()
    optimiser.step()
    again = HookedTransformer.from_pretrained("gpt2", hf_model=hf)
    assert not torch.allclose(lens.W_V, before, atol=1e-4)
    assert torch.equal(lens.W_V, again.W_V)
    (_, cache), (_, expected) = lens.run_with_cache(tokens()), again.run_with_cache(tokens())
    assert all(torch.equal(cache[name], value) for name, value in expected.items())


# --- half precision ---------------------------------------------------------------------------------------------------

#: Half a unit in the last place, relative: 8 significant bits, and 11.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_half_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits are HuggingFace's bit by bit; weights are processed in single precision and then rounded."""
    trained(family).to(dtype).save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval()
    raw, lens, single = loaded(tmp_path, dtype=dtype, **RAW), loaded(tmp_path, dtype=dtype), loaded(tmp_path)
    assert raw.cfg.dtype == lens.cfg.dtype == dtype and single.cfg.dtype == torch.float32
    with torch.no_grad():
        expected = hf(tokens()).logits
        assert torch.equal(raw(tokens()), expected)
        logits, cache = raw.run_with_cache(tokens())
        assert torch.equal(logits, expected)
    kept = {name for name, value in cache.items() if value.dtype == torch.float32}
    # Norms compute in single precision, and so do softmaxes of transformers' own.
    assert all(name.endswith(("hook_scale", "hook_normalized", "hook_pattern")) for name in kept)
    for name, weight in single.state_dict().items():
        if name.endswith((".mask", ".IGNORE")):
            continue
        found = lens.state_dict()[name]
        assert found.dtype == dtype
        # A gain that is stored less one is rounded when one is added, before it is folded.
        times = 2.01 if single.interior.architecture.gain_offset else 1
        limit = times * ROUNDING[dtype] * weight.abs() + 1e-6
        assert bool(((found.float() - weight).abs() <= limit).all()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_values_in_half_precision_are_those_of_single_up_to_rounding(family: str) -> None:
    """How far they are off is about what the HF model's own logits are off."""
    hf = trained(family)
    half = tiny_model(tiny_config(family))
    half.load_state_dict(hf.state_dict())
    half = half.to(torch.bfloat16)
    exact = half.float()
    single = HookedTransformer.from_pretrained("single", hf_model=exact)
    _, expected = single.run_with_cache(tokens())
    rounded = tiny_model(tiny_config(family))
    rounded.load_state_dict(exact.state_dict())
    lens = HookedTransformer.from_pretrained("half", hf_model=rounded.to(torch.bfloat16))
    _, cache = lens.run_with_cache(tokens())
    assert list(cache) == list(expected)
    for name, value in expected.items():
        shown = cache[name].float()
        seen = torch.isfinite(value)
        assert torch.equal(seen, torch.isfinite(shown)), name
        off = float((shown - value)[seen].abs().max() / value[seen].abs().max())
        assert off < 0.15, (name, off)
