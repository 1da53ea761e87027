"""What is compared between a model on one device and on two, in a process of its own?

``several_devices_worker.py OUT box FAMILY=OPTIONS...`` puts one half of a tiny model of a family into box:0 and the
other into box:1 (`boxes`), lets accelerate do its part, makes the same calls of it and of one on the CPU, and writes
what was not the same, by family, options and call. With "cuda" instead of "box", it is the first two GPUs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import big_modeling, dispatch_model
from boxes import boxes, unboxed
from torch import Tensor

from lensbridge import ActivationCache, HookedTransformer, HookedTransformerKeyValueCache, patching
from lensbridge.architectures import architecture_of
from lensbridge.tiny import tiny_family, tiny_tokens

OPTIONS: dict[str, dict] = {
    "raw": dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False),
    "processed": {},
}
TOKENS = tiny_tokens()
FLAGS = {"use_attn_result": "attn.hook_result", "use_split_qkv_input": "hook_q_input", "use_hook_mlp_in": "hook_mlp_in"}
#: How far apart sweeps may be, in which more interventions share a run on what is no CPU.
CLOSE = 1e-5
#: How far apart the results of a GPU and a CPU may be.
CLOSE_ON_GPUS = 1e-3


def on_two(hf: Any, kind: str) -> Any:
    """A model whose first half is on the first device of a kind, its second on the second."""
    arch = architecture_of(hf)
    layers = [arch.layer(layer) for layer in range(len(arch.blocks))]
    paths = [path for path in (arch.embed, arch.pos_embed, *layers, arch.ln_final, arch.unembed) if path is not None]
    found = {path: f"{kind}:{int(2 * number >= len(paths))}" for number, path in enumerate(paths)}
    if hf.config.tie_word_embeddings:
        found[arch.unembed] = found[arch.embed]
    for name, _ in hf.named_modules():
        if name and not any(f"{name}.".startswith(f"{p}.") or f"{p}.".startswith(f"{name}.") for p in found):
            found[name] = f"{kind}:0"
    # accelerate would look for kinds of devices that it knows.
    big_modeling.check_device_map = lambda *arguments: None
    hf = dispatch_model(hf.requires_grad_(False), found, main_device=f"{kind}:0", force_hooks=True)
    assert {str(parameter.device) for parameter in hf.parameters()} == {f"{kind}:0", f"{kind}:1"}
    return hf


def doubled(value: Tensor, hook: Any) -> Tensor:
    return value * 1.25 + 0.1 if value.is_floating_point() else value


def points(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


def everything(model: HookedTransformer) -> list[Tensor]:
    logits, cache = model.run_with_cache(TOKENS)
    return [logits, model(TOKENS), model(TOKENS, "loss"), *cache.values()]


def where(model: HookedTransformer) -> list[str]:
    """Logits come back to the tokens; a cache can be asked for on one device."""
    logits, cache = model.run_with_cache(TOKENS)
    first = model.cfg.device
    together = {str(value.device) for value in model.run_with_cache(TOKENS, device="cpu")[1].values()}
    moved = {str(value.device) for value in cache.to("cpu").values()}
    return [f"logits at home: {str(logits.device) == first}", f"{sorted(together)}, {sorted(moved)}"]


def edits(model: HookedTransformer) -> list[Tensor]:
    return [model.run_with_hooks(TOKENS, fwd_hooks=[(name, doubled)]) for name in points(model)]


def further_points(model: HookedTransformer) -> list[Tensor]:
    found = []
    for flag, name in FLAGS.items():
        setattr(model.cfg, flag, True)
        found += list(points(model).values())
        found += [model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{layer}.{name}", doubled)]) for layer in (0, 1)]
        setattr(model.cfg, flag, False)
    return found


def weights(model: HookedTransformer) -> list[Tensor]:
    return [*model.state_dict().values(), model.W_Q, model.OV[1, 0].AB, model.QK[0, 1].AB, model.W_U, model.W_E]


def circuits(model: HookedTransformer) -> list[Tensor]:
    return [model.all_composition_scores("Q"), model.accumulated_bias(2)]


def parts(model: HookedTransformer) -> list[Tensor]:
    middle = model(TOKENS, stop_at_layer=1)
    found = [middle, model(middle, start_at_layer=1), model(unboxed(middle), start_at_layer=1)]
    for layer in (0, 1):
        block = model.blocks[layer]
        # From the other half, too.
        for stream in (middle, middle.to(model(TOKENS, stop_at_layer=2).device)):
            found += [block(stream), block.attn(stream, stream, stream), block.mlp(stream), block.ln1(stream)]
    return [*found, model.unembed(model.ln_final(middle))]


def texts(model: HookedTransformer) -> list[Tensor]:
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    found = [model.generate(TOKENS, **options)]
    cache = HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, len(TOKENS))
    for chunk in TOKENS.split(5, dim=1):
        found.append(model(chunk, past_kv_cache=cache, attention_mask=torch.ones_like(chunk)))
    return [*found, *(entry.past_keys for entry in cache), *(entry.past_values for entry in cache)]


def stacks(model: HookedTransformer) -> list[Tensor]:
    found = []
    for cache in (points(model), model.run_with_cache(TOKENS, device="cpu")[1]):
        parts = cache.decompose_resid()
        found += [
            cache.decompose_resid(apply_ln=True),
            cache.accumulated_resid(apply_ln=True),
            cache.stack_head_results(apply_ln=True, incl_remainder=True),
            cache.stack_neuron_results(-1, apply_ln=True, incl_remainder=True),
            cache.get_full_resid_decomposition(apply_ln=True),
            cache.logit_attrs(parts, TOKENS.to(parts.device)),
            cache.stack_activation("z"),
        ]
    return found


def sweeps(model: HookedTransformer) -> list[Tensor]:
    names = "resid_pre attn_head_out_all_pos attn_head_pattern_all_pos mlp_out attn_head_all_pos_every block_every"
    cache, corrupted = points(model), TOKENS.flip(1).to(model.cfg.device)
    functions = [getattr(patching, f"get_act_patch_{name}") for name in names.split()]
    return [function(model, corrupted, cache, lambda logits: logits[0, -1, 7]) for function in functions]


def traces(model: HookedTransformer) -> list[Tensor]:
    with model.trace(TOKENS):
        z = model.blocks[0].attn.hook_z.value.save()
        model.blocks[1].attn.hook_pattern.value[:, 1] = 0
        logits = model.envoy.output.logits.save()
    return [z, logits]


CALLS = (everything, where, edits, further_points, weights, parts, texts, sweeps, traces)
#: Those that take MLPs which are not made of experts.
OF_NEURONS = (circuits, stacks)


def difference(call: Callable, one: HookedTransformer, several: HookedTransformer) -> str:
    """What is not the same, in words."""
    expected, found = call(one), call(several)
    if len(expected) != len(found) or not expected:
        return f"{len(found)} results instead of {len(expected)}"
    return ", ".join(str(n) for n, (x, y) in enumerate(zip(found, expected, strict=True)) if not same(x, y, call))


def same(mine: Any, theirs: Any, call: Callable) -> bool:
    if isinstance(theirs, str):
        return mine == theirs
    if mine.device.type == "cuda":
        return torch.allclose(mine.cpu(), theirs, atol=CLOSE_ON_GPUS)
    if call is sweeps:
        return torch.allclose(unboxed(mine), theirs, atol=CLOSE)
    return torch.equal(unboxed(mine), theirs)


def main(out: str, kind: str, plans: list[str]) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = {}
    with boxes() if kind == "box" else torch.no_grad():
        for plan in plans:
            family, _, options = plan.partition("=")
            one, several = (
                HookedTransformer.from_pretrained(family, hf_model=hf, tokenizer=None, **OPTIONS[options])
                for hf in (tiny_family(family), on_two(tiny_family(family), kind))
            )
            for call in CALLS if one.cfg.num_experts else CALLS + OF_NEURONS:
                try:
                    wrong = difference(call, one, several)
                except RuntimeError as error:
                    wrong = str(error)
                results[f"{family}, {options}, {call.__name__}"] = wrong
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
