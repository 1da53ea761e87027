"""Is a model whose layers accelerate has put on several devices, or on the disk, served as it is in one place?

The models are loaded with part of their layers on the disk, which needs no GPU: modules hold meta tensors between
their calls. Everything has to be that of the same model without a map, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoModelForCausalLM

from lensbridge import HookedTransformer, patching, whole
from lensbridge.architectures import architecture_of
from lensbridge.errors import ReadOnlyWeightError, UnsupportedModelError
from lensbridge.tiny import tiny_family, tiny_tokens

TOKENS = tiny_tokens()
OPTIONS: dict[str, dict] = {
    "raw": dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False),
    "processed": {},
}
Pair = tuple[HookedTransformer, HookedTransformer]


def partly_on_disk(hf: Any) -> dict[str, str]:
    """A map of devices that sends every other part of a model to the disk."""
    arch = architecture_of(hf)
    layers = [arch.layer(layer) for layer in range(len(arch.blocks))]
    paths = [path for path in (arch.embed, arch.pos_embed, *layers, arch.ln_final, arch.unembed) if path is not None]
    found = {path: "disk" if number % 2 else "cpu" for number, path in enumerate(paths)}
    if hf.config.tie_word_embeddings:
        # HuggingFace's index of what is on the disk has a tied parameter under one of its names.
        found[arch.unembed] = found[arch.embed]
    # The rest: what rotates, drops out.
    for name, _ in hf.named_modules():
        if name and not any(f"{name}.".startswith(f"{p}.") or f"{p}.".startswith(f"{name}.") for p in found):
            found[name] = "cpu"
    return found


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_family(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The model as it is, and partly on disk."""
    hf = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    options = {"tokenizer": None, **OPTIONS[request.param]}
    away = {"device_map": partly_on_disk(hf), "offload_folder": str(tmp_path_factory.mktemp("offload"))}
    here = HookedTransformer.from_pretrained(str(directory), device="cpu", **options)
    spread = HookedTransformer.from_pretrained(str(directory), **away, **options)
    assert any(parameter.is_meta for parameter in spread.hf_model.parameters())
    return here, spread


several = pytest.mark.parametrize("directory", ["gpt2", "llama", "gemma", "mixtral", "opt"], indirect=True)
two = pytest.mark.parametrize("directory", ["gpt2", "llama"], indirect=True)


def same(mine: Any, theirs: Any) -> bool:
    return mine.keys() == theirs.keys() and not [name for name in theirs if not torch.equal(mine[name], theirs[name])]


def changed_in(layer: str) -> Callable:
    def edit(value: Tensor, hook: Any) -> Tensor:
        return value * 1.25 + 0.1 if value.is_floating_point() else value

    return edit


@several
def test_every_point(pair: Pair) -> None:
    here, spread = pair
    (expected, cache), (logits, found) = here.run_with_cache(TOKENS), spread.run_with_cache(TOKENS)
    assert torch.equal(logits, expected) and same(found, cache)
    assert torch.equal(spread(TOKENS), expected) and torch.equal(spread(TOKENS, "loss"), here(TOKENS, "loss"))
    assert spread.cfg.device == "cpu" and same(found.to("cpu"), cache)


@several
def test_every_weight(pair: Pair) -> None:
    here, spread = pair
    assert same(spread.state_dict(), here.state_dict())
    assert torch.equal(spread.W_U, here.W_U) and torch.equal(spread.W_E, here.W_E)


@several
def test_an_edit_at_every_point(pair: Pair) -> None:
    here, spread = pair
    names = [name for name in here.run_with_cache(TOKENS)[1] if ".1." in name or "blocks" not in name]
    for name in names:
        hooks = [(name, changed_in(name))]
        expected = here.run_with_hooks(TOKENS, fwd_hooks=hooks)
        assert torch.equal(spread.run_with_hooks(TOKENS, fwd_hooks=hooks), expected), name


@two
def test_parts_of_the_model(pair: Pair) -> None:
    here, spread = pair
    middle = here(TOKENS, stop_at_layer=1)
    assert torch.equal(spread(TOKENS, stop_at_layer=1), middle)
    assert torch.equal(spread(middle, start_at_layer=1), here(middle, start_at_layer=1))
    assert torch.equal(spread.blocks[1](middle), here.blocks[1](middle))
    for part in ("attn", "mlp"):
        inputs = (middle, middle, middle) if part == "attn" else (middle,)
        mine, theirs = (getattr(model.blocks[1], part)(*inputs) for model in (spread, here))
        assert torch.equal(mine, theirs)
        point = f"blocks.1.{part}.hook_{'z' if part == 'attn' else 'post'}"
        edited = []
        for model in (spread, here):
            with model.hooks([(point, lambda value, hook: value * 2)]):
                edited.append(getattr(model.blocks[1], part)(*inputs))
        assert torch.equal(*edited) and not torch.equal(edited[0], mine)
    mine, theirs = (model.unembed(model.ln_final(middle)) for model in (spread, here))
    assert torch.equal(mine, theirs)


@two
def test_generation_and_a_key_value_cache(pair: Pair) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    mine, theirs = (model.generate(TOKENS, **options) for model in reversed(pair))
    assert torch.equal(mine, theirs)


@two
def test_patching_and_attribution(pair: Pair) -> None:
    results = []
    for model in reversed(pair):
        clean, cache = model.run_with_cache(TOKENS)
        sweep = patching.get_act_patch_resid_pre(model, TOKENS.flip(1), cache, lambda logits: logits[0, -1, 7])
        stack = cache.decompose_resid(apply_ln=True), cache.stack_head_results(apply_ln=True)
        results.append([sweep, *stack, cache.logit_attrs(cache.decompose_resid(), TOKENS)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@two
def test_gradients_at_points(pair: Pair) -> None:
    found: list[dict[str, Tensor]] = []
    for model in reversed(pair):
        gradients: dict[str, Tensor] = {}

        def keep(gradient: Tensor, hook: Any, into: dict[str, Tensor] = gradients) -> None:
            into[hook.name] = gradient.clone()

        names = [f"blocks.{layer}.{point}" for layer in (0, 1) for point in ("hook_resid_pre", "attn.hook_z")]
        with model.hooks(bwd_hooks=[(name, keep) for name in names]):
            model(TOKENS, "loss").backward()
        found.append(gradients)
        assert set(gradients) == set(names)
    assert same(*found)


@two
def test_what_cannot_be_done_says_so(pair: Pair) -> None:
    _, spread = pair
    for move in (lambda: spread.to("cpu:0"), spread.half, lambda: spread.to(torch.float16)):
        with pytest.raises(UnsupportedModelError, match="keeps some of this model's parameters outside"):
            move()
    weights = spread.interior.weights
    away = [layer for layer in (0, 1) if _is_away(spread, layer)]
    assert len(away) == 1
    weight = spread.blocks[away[0]].attn.W_O
    before = weight.clone()
    with pytest.raises(ReadOnlyWeightError, match=r"accelerate keeps|weight processing"), torch.no_grad():
        weight[0] = 0
    with pytest.raises(ReadOnlyWeightError, match=r"accelerate keeps|weight processing"):
        weights.set(f"blocks.{away[0]}.attn.W_O", before + 1)
    assert torch.equal(spread.blocks[away[0]].attn.W_O, before)


def _is_away(model: HookedTransformer, layer: int) -> bool:
    path = architecture_of(model.hf_model).layer(layer)
    return next(model.hf_model.get_submodule(path).parameters()).is_meta


def test_a_model_of_which_everything_is_kept_away() -> None:
    hf = tiny_family("llama")
    expected = hf(TOKENS).logits
    cpu_offload(hf, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in hf.parameters())
    model = HookedTransformer.from_pretrained("llama", hf_model=hf, tokenizer=None, **OPTIONS["raw"])
    assert model.cfg.device == "cpu" and torch.equal(model(TOKENS), expected)
    assert torch.equal(model.run_with_cache(TOKENS)[0], expected)
    assert torch.equal(model.W_E, tiny_family("llama").model.embed_tokens.weight)


def test_devices_are_not_counted_for_a_model_that_is_loaded() -> None:
    with pytest.raises(UnsupportedModelError, match="n_devices=2 is not applied to hf_model, which is on 1"):
        HookedTransformer.from_pretrained("llama", hf_model=tiny_family("llama"), n_devices=2)


def test_only_what_is_needed_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_family("llama")
    cpu_offload(hf, execution_device=torch.device("cpu"))
    model = HookedTransformer.from_pretrained("llama", hf_model=hf, tokenizer=None)
    fetched: list[str] = []
    original = whole._fetched

    def noting(module: Any, name: str, tensor: Tensor) -> Tensor:
        fetched.append(f"{type(module).__name__}.{name}")
        return original(module, name, tensor)

    monkeypatch.setattr(whole, "_fetched", noting)
    model.run_with_cache(TOKENS)
    assert set(fetched) <= {"LlamaRMSNorm.weight"}, "no matrix is fetched for a run without biases"
    assert len(model.state_dict()) and set(fetched) > {"LlamaRMSNorm.weight"}
    fetched.clear()
    assert model.interior.weights.shape("blocks.1.attn.W_Q") == (4, 64, 16) and not fetched
