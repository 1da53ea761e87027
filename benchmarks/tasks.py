"""What is timed, and how does each contender do it?

A task is a function of a contender and a prompt. HuggingFace does by hand, with torch hooks, what it can.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GPT2LMHeadModel

Tensor = torch.Tensor
#: How many tokens the row about generation makes.
GENERATED = 8


@dataclass(frozen=True)
class Task:
    """One row: a name, how many forward passes it holds, and what it does (None: this contender cannot)."""

    name: str
    forwards: int
    run: Callable[[Any, Tensor], Any]
    hf: Callable[[Any, Tensor], Any] | None


def is_lens(model: Any) -> bool:
    return not isinstance(model, GPT2LMHeadModel)


def n_layers(model: Any) -> int:
    return model.cfg.n_layers if is_lens(model) else model.config.n_layer


def forward(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens)


def cache_all(model: Any, tokens: Tensor) -> Any:
    return model.run_with_cache(tokens)


def cache_residual(model: Any, tokens: Tensor) -> Any:
    return model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_post"))


def stop_half_way(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, stop_at_layer=n_layers(model) // 2)


def halve(value: Tensor, hook: Any) -> Tensor:
    return value * 0.5


def edit(model: Any, tokens: Tensor) -> Tensor:
    name = f"blocks.{n_layers(model) // 2}.attn.hook_z"
    return model.run_with_hooks(tokens, fwd_hooks=[(name, halve)])


def generate(model: Any, tokens: Tensor) -> Any:
    """``GENERATED`` tokens, with a hook on each step."""
    name = f"blocks.{n_layers(model) // 2}.attn.hook_z"
    with model.hooks(fwd_hooks=[(name, halve)]):
        return model.generate(tokens, max_new_tokens=GENERATED, do_sample=False, stop_at_eos=False, verbose=False)


def hf_generate(model: Any, tokens: Tensor) -> Any:
    module = model.transformer.h[n_layers(model) // 2].attn.c_proj
    with torch_hook(module, lambda _, inputs: (inputs[0] * 0.5,), before=True):
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=GENERATED,
            min_new_tokens=GENERATED,
            do_sample=False,
            pad_token_id=0,
        )


def patch(value: Tensor, hook: Any, source: Tensor, position: int) -> Tensor:
    value[:, position] = source[:, position]
    return value


def cells(model: Any, tokens: Tensor, every_layer: int, every_position: int) -> Iterator[tuple[int, int]]:
    for layer in range(0, n_layers(model), every_layer):
        for position in range(0, tokens.shape[1], every_position):
            yield layer, position


def sweep(model: Any, tokens: Tensor, every_layer: int, every_position: int) -> list[Tensor]:
    """Patch the residual stream into one position of one layer at a time, from a fixed source."""
    width = model.cfg.d_model
    source = torch.zeros(1, tokens.shape[1], width, device=tokens.device)
    return [
        model.run_with_hooks(
            tokens,
            fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", partial(patch, source=source, position=position))],
        )
        for layer, position in cells(model, tokens, every_layer, every_position)
    ]


@contextmanager
def torch_hook(module: torch.nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hf_forward(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def hf_residual(model: Any, tokens: Tensor) -> Any:
    return model(tokens, output_hidden_states=True)


def hf_edit(model: Any, tokens: Tensor) -> Any:
    module = model.transformer.h[n_layers(model) // 2].attn.c_proj
    with torch_hook(module, lambda _, inputs: (inputs[0] * 0.5,), before=True):
        return model(tokens)


def hf_sweep(model: Any, tokens: Tensor, every_layer: int, every_position: int) -> list[Any]:
    results = []
    source = torch.zeros(1, tokens.shape[1], model.config.n_embd, device=tokens.device)
    for layer, position in cells(model, tokens, every_layer, every_position):

        def put_in(_: Any, inputs: tuple[Tensor, ...], position: int = position) -> tuple[Tensor, ...]:
            return (patch(inputs[0].clone(), None, source, position), *inputs[1:])

        with torch_hook(model.transformer.h[layer], put_in, before=True):
            results.append(model(tokens))
    return results


def two_layers(model: Any) -> list[int]:
    """One low and one high layer, as far from either end, so that what is above them is what a whole sweep averages."""
    low = n_layers(model) // 5
    return [low, n_layers(model) - 1 - low]


def difference(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1, 9]


def patching_sweep(model: Any, tokens: Tensor, kind: str) -> Tensor:
    """`patching.get_act_patch_resid_pre` or `get_act_patch_attn_head_out_all_pos` over two layers, from a fixed source.

    Each contender's own: lensbridge shares forward passes and starts them at the layer, the others loop.
    """
    patching = importlib.import_module(f"{type(model).__module__.split('.')[0]}.patching")
    heads, d_head = model.cfg.n_heads, model.cfg.d_head
    shape = (1, tokens.shape[1], *((model.cfg.d_model,) if kind == "resid_pre" else (heads, d_head)))
    point = "hook_resid_pre" if kind == "resid_pre" else "attn.hook_z"
    indices = patching.make_df_from_ranges(
        [n_layers(model), shape[1 if kind == "resid_pre" else 2]], ["layer", "index"]
    )
    setter = "layer_pos_patch_setter" if kind == "resid_pre" else "layer_head_vector_patch_setter"
    return patching.generic_activation_patch(
        model,
        tokens,
        {f"blocks.{layer}.{point}": torch.zeros(shape, device=tokens.device) for layer in two_layers(model)},
        difference,
        getattr(patching, setter),
        kind,
        index_df=indices[indices["layer"].isin(two_layers(model))],
    )


def hf_patching_sweep(model: Any, tokens: Tensor, kind: str) -> Tensor:
    """The same runs as the rows of one batch per layer, each with its patch, through the whole model."""
    heads = model.config.n_head

    def put_in(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        rows = torch.arange(len(x), device=x.device)
        if kind == "resid_pre":
            x[rows, rows] = 0
        else:
            x.unflatten(-1, (heads, -1))[rows, :, rows] = 0
        return (x, *inputs[1:])

    results = []
    for layer in two_layers(model):
        block = model.transformer.h[layer]
        with torch_hook(block if kind == "resid_pre" else block.attn.c_proj, put_in, before=True):
            logits = model(tokens.repeat(tokens.shape[1] if kind == "resid_pre" else heads, 1)).logits
        results += [difference(row[None]).item() for row in logits]
    return torch.tensor(results)


def patching_tasks(heads: int, positions: int) -> list[Task]:
    """The rows about sweeps by the ``patching`` module."""
    kinds = {"resid_pre": ("residual sweep", 2 * positions), "z": ("head sweep", 2 * heads)}
    return [
        Task(
            f"{name}, {patches} runs",
            patches,
            partial(patching_sweep, kind=kind),
            partial(hf_patching_sweep, kind=kind),
        )
        for kind, (name, patches) in kinds.items()
    ]


def all_tasks(every_layer: int, every_position: int, layers: int, heads: int, positions: int) -> list[Task]:
    """The rows of the table, in order."""
    patches = len(range(0, layers, every_layer)) * len(range(0, positions, every_position))
    by_hooks = partial(sweep, every_layer=every_layer, every_position=every_position)
    by_hand = partial(hf_sweep, every_layer=every_layer, every_position=every_position)
    return [
        Task("forward", 1, forward, hf_forward),
        Task("cache everything", 1, cache_all, None),
        Task("cache resid_post", 1, cache_residual, hf_residual),
        Task("one editing hook", 1, edit, hf_edit),
        Task(f"residual patching, {patches} runs", patches, by_hooks, by_hand),
        *patching_tasks(heads, positions),
        Task(f"generation with a hook, {GENERATED} tokens", GENERATED, generate, hf_generate),
        Task("stop at half the layers", 1, stop_half_way, None),
    ]
