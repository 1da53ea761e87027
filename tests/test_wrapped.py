"""Are models that were compiled shown as those that were not, and are wrappers that do more refused?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookedTransformer
from lensbridge.errors import UnsupportedModelError
from lensbridge.tiny import tiny_family

#: Every processing option off.
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def compiled(module: Any) -> Any:
    """What torch.compile makes of something; its backend leaves the operations to torch."""
    return torch.compile(module, backend="eager")


def around(model: Any) -> Any:
    return compiled(model)


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def layers_in_place(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def its_forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


def an_mlp_in_place(model: Any) -> Any:
    model.model.layers[1].mlp.compile(backend="eager")
    return model


WAYS = [around, in_place, layers_in_place, its_forward, an_mlp_in_place]


def tokens() -> Tensor:
    return torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def lens_of(hf: Any, **options: bool) -> HookedTransformer:
    return HookedTransformer.from_pretrained("compiled", hf_model=hf, **options)


@pytest.fixture
def plain() -> HookedTransformer:
    return lens_of(tiny_family("llama"), **RAW)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_models_are_shown_as_the_others(
    plain: HookedTransformer, way: Callable[[Any], Any], warm: bool
) -> None:
    torch._dynamo.reset()
    hf = way(tiny_family("llama"))
    if warm:
        hf(tokens())
    lens, fired = lens_of(hf, **RAW), []
    edits = [("blocks.0.attn.hook_z", lambda value, hook: fired.append(hook.name) or value * 0)]
    assert torch.allclose(lens(tokens()), plain(tokens()), atol=1e-5)
    logits, cache = lens.run_with_cache(tokens())
    expected, theirs = plain.run_with_cache(tokens())
    assert torch.equal(logits, expected) and list(cache) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in cache.items())
    assert torch.equal(lens.run_with_hooks(tokens(), fwd_hooks=edits), plain.run_with_hooks(tokens(), fwd_hooks=edits))
    assert fired == ["blocks.0.attn.hook_z"] * 2
    assert torch.equal(lens(tokens(), stop_at_layer=1), plain(tokens(), stop_at_layer=1))
    stream = cache["blocks.0.hook_resid_mid"]
    assert torch.equal(lens.blocks[1].mlp(stream), plain.blocks[1].mlp(stream))
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert torch.equal(lens.generate(tokens(), **options), plain.generate(tokens(), **options))
    # What was compiled is so behind the runs.
    assert torch.allclose(hf(tokens()).logits, expected, atol=1e-5)


def test_runs_without_hooks_stay_compiled() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    hf = tiny_family("llama")
    hf.compile(backend=backend)
    lens = lens_of(hf, **RAW)
    lens.run_with_cache(tokens())
    assert not graphs
    lens(tokens())
    assert graphs


def test_compiling_after_loading(plain: HookedTransformer) -> None:
    hf = tiny_family("llama")
    lens = lens_of(hf, **RAW)
    lens.run_with_cache(tokens())
    hf.compile(backend="eager")
    hf.model.layers[0].compile(backend="eager")
    hf(tokens())
    assert torch.equal(lens.run_with_cache(tokens())[0], plain.run_with_cache(tokens())[0])


def test_a_copy_of_a_model_that_is_compiled_later(plain: HookedTransformer) -> None:
    lens = lens_of(tiny_family("llama"), **RAW)
    lens.run_with_cache(tokens())
    other = copy.deepcopy(lens)
    other.hf_model.model.layers[0].compile(backend="eager")
    assert torch.equal(other.run_with_cache(tokens())[0], plain(tokens()))


def test_functions_that_a_module_calls_stay_compiled() -> None:
    """They may round otherwise than what they were compiled from, and are HuggingFace's run as they are."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.compile(lambda x: x * 0.5, backend=backend)(x)

    hf = tiny_family("llama")
    for layer in hf.model.layers:
        layer.mlp.act_fn = Activation()
    lens = lens_of(hf, **RAW)
    lens(tokens())
    before = len(graphs)
    torch._dynamo.reset()
    lens.run_with_cache(tokens())
    assert before and len(graphs) > before


def test_gradients_of_a_compiled_model(plain: HookedTransformer) -> None:
    hf = tiny_family("llama")
    hf.compile(backend="eager")
    lens, found = lens_of(hf, **RAW), []
    for each in (lens, plain):
        each.run_with_hooks(
            tokens(),
            return_type="loss",
            fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value * 2)],
        ).backward()
        found.append(each.hf_model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*found)


def test_a_compiled_part_in_a_modules_place_is_refused() -> None:
    hf = tiny_family("llama")
    hf.model.layers[1] = compiled(hf.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.1'.*set_submodule.*_orig_mod"):
        lens_of(hf)
    # What the message says.
    hf.set_submodule("model.layers.1", hf.get_submodule("model.layers.1")._orig_mod)
    assert len(lens_of(hf).blocks) == 2


# --- wrappers ---------------------------------------------------------------------------------------------------------


class FullyShardedDataParallel(nn.Module):
    """By the name of torch's, which needs several processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrapper", [nn.DataParallel, FullyShardedDataParallel])
def test_wrappers_of_several_devices_are_refused(wrapper: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{wrapper.__name__} around a model.*\.module"):
        lens_of(wrapper(tiny_family("llama")))


def test_a_wrapper_of_several_processes_is_refused() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_family("llama"))
        with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel.*exchanges gradients"):
            lens_of(wrapped)
        assert len(lens_of(wrapped.module).blocks) == 2
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_in_several_wrappers(plain: HookedTransformer) -> None:
    import peft

    model = peft.get_peft_model(tiny_family("llama"), peft.LoraConfig(target_modules=["v_proj"]))
    lens = lens_of(compiled(model.eval()), **RAW)
    assert type(lens.hf_model).__name__ == "LlamaForCausalLM"
    assert torch.allclose(lens(tokens()), plain(tokens()), atol=1e-5)
