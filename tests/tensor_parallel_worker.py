"""What does one of several processes do in `test_tensor_parallel.py`?

It loads a model twice, whole and divided among the processes, makes the same calls of both, and writes down how far
the results are apart. ``tensor_parallel_worker.py OUT llama=raw llama=processed+`` has it look into two directories'
models, under these options, and "+" asks for all checks.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from lensbridge import ActivationCache, HookedTransformer, HookedTransformerKeyValueCache, patching
from lensbridge.errors import ReadOnlyWeightError, UnsupportedModelError
from lensbridge.tiny import tiny_tokens

OPTIONS: dict[str, dict] = {
    "raw": dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False),
    "processed": {},
}
TOKENS = tiny_tokens()
#: How far apart float32 results of another order of summation may be.
CLOSE = 3e-5
#: What an edit changes at least; else nothing is compared.
EFFECT = 1e-3

Results = dict[str, list[Tensor]]


def edited(value: Tensor, hook: Any) -> Tensor:
    return value * torch.linspace(0.5, 1.5, value.shape[-1])


def points(model: HookedTransformer) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


def every_point(model: HookedTransformer) -> Results:
    with torch.no_grad():
        found: Results = {f"no_grad {name}": [value] for name, value in points(model).items()}
    return found | {name: [value] for name, value in points(model).items()}


def every_weight(model: HookedTransformer) -> Results:
    stacked = {"W_Q": [model.W_Q], "OV": [model.OV[0, 0].AB], "W_U": [model.W_U]}
    return stacked | {name: [weight] for name, weight in model.state_dict().items()}


def every_edit(model: HookedTransformer) -> Results:
    plain, found = model(TOKENS), {}
    with torch.no_grad():
        for name, value in points(model).items():
            if value.is_floating_point() and ("blocks" not in name or ".1." in name):
                logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, edited)])
                assert float((logits - plain).abs().max()) > EFFECT, f"an edit of {name} has no effect"
                found[name] = [logits]
    return found


def further_points(model: HookedTransformer) -> Results:
    found: Results = {}
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(model.cfg, flag, True)
        found |= {f"{flag} {name}": [value] for name, value in points(model).items()}
        new = {"use_attn_result": "attn.hook_result", "use_split_qkv_input": "hook_q_input"}.get(flag, "hook_mlp_in")
        found[flag] = [model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.1.{new}", edited)])]
        setattr(model.cfg, flag, False)
    return found


def gradients(model: HookedTransformer) -> Results:
    found: dict[str, list[Tensor]] = {}
    names = [name for name, value in points(model).items() if value.is_floating_point()]

    def keep(gradient: Tensor, hook: Any) -> None:
        found.setdefault(hook.name, []).append(gradient.clone())

    model.hf_model.zero_grad()
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        loss = model(TOKENS, "loss")
        loss.backward()
    assert set(found) == set(names)
    found |= {f"loss, {name}": [gradient] for name, gradient in of_parameters(model).items()}
    model.hf_model.zero_grad()
    (model.W_O**2).sum().backward()
    return found | {f"W_O, {name}": [gradient] for name, gradient in of_parameters(model).items() if "o_proj" in name}


def of_parameters(model: HookedTransformer) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.hf_model.named_parameters()}
    found: dict[str, Any] = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def parts(model: HookedTransformer) -> Results:
    middle = model(TOKENS, stop_at_layer=1)
    found = {"stop": [middle], "start": [model(middle, start_at_layer=1)], "block": [model.blocks[1](middle)]}
    with model.hooks([("blocks.1.attn.hook_pattern", edited), ("blocks.1.attn.hook_q", edited)]):
        found["attention"] = [model.blocks[1].attn(middle, middle, middle)]
    found["mlp"] = [model.blocks[1].mlp(middle)]
    with torch.no_grad():
        found["unembed"] = [model.unembed(model.ln_final(middle))]
    return found


def texts(model: HookedTransformer) -> Results:
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    found = {"generated": [model.generate(TOKENS, **options)]}
    cache = HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, len(TOKENS))
    for chunk in TOKENS.split(5, dim=1):
        logits = model(chunk, past_kv_cache=cache, attention_mask=torch.ones_like(chunk))
        found[f"chunk {len(found)}"] = [logits, *(entry.past_keys for entry in cache), *(e.past_values for e in cache)]
    return found


def analyses(model: HookedTransformer) -> Results:
    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 7]

    cache = points(model)
    stream = patching.get_act_patch_resid_pre(model, TOKENS.flip(1), cache, metric)
    heads = patching.get_act_patch_attn_head_all_pos_every(model, TOKENS.flip(1), cache, metric)
    attributions = cache.logit_attrs(cache.decompose_resid(), TOKENS)
    return {"sweeps": [stream, heads], "stacks": [cache.stack_head_results(), attributions]}


def traces(model: HookedTransformer) -> Results:
    with model.trace(TOKENS):
        z = model.blocks[0].attn.hook_z.value.save()
        model.blocks[1].attn.hook_pattern.value[:, 1] = 0
        logits = model.envoy.output.logits.save()
    return {"trace": [z, logits]}


COMMON = (every_point, every_weight, every_edit, gradients)
MORE = (further_points, parts, texts, analyses, traces)


def refused(model: HookedTransformer, directory: str, where: Path) -> str:
    """What is wrong with what a divided model refuses."""
    weight = model.blocks[0].attn.W_Q
    before = weight.clone()
    for attempt in (weight.zero_, lambda: model.interior.weights.set("blocks.0.attn.W_Q", before + 1)):
        try:
            with torch.no_grad():
                attempt()
            return "an edit of a divided weight was not refused"
        except ReadOnlyWeightError as error:
            if "each process holds a part" not in str(error) and "weight processing" not in str(error):
                return str(error)
    if not torch.equal(model.blocks[0].attn.W_Q, before):
        return "a refused edit has had an effect"
    for arguments, message in (
        ({"device": "cpu"}, "excludes device"),
        ({"device_map": "auto"}, "excludes device"),
    ):
        try:
            HookedTransformer.from_pretrained(directory, tp_plan="auto", **arguments)
            return f"{arguments} were not refused"
        except ValueError as error:
            if message not in str(error):
                return str(error)
    try:
        HookedTransformer.from_pretrained(str(where / "gpt2"), tp_plan="auto")
        return "a model without a plan was not refused"
    except UnsupportedModelError as error:
        if "no tensor parallel plan for 'gpt2'" not in str(error):
            return str(error)
    try:
        model.to("meta")
        return "a move was not refused"
    except UnsupportedModelError as error:
        return "" if "spread over several processes" in str(error) else str(error)


def difference(check: Callable, whole: HookedTransformer, divided: HookedTransformer) -> dict[str, Any]:
    """The largest difference in a check's results, and where there are some that are too large."""
    expected, found = check(whole), check(divided)
    if list(expected) != list(found):
        return {"worst": None, "wrong": f"not the same results: {sorted(set(expected) ^ set(found))}"}
    distances = {name: max(map(distance, found[name], expected[name])) for name in expected}
    worst = max(distances, key=lambda name: distances[name])
    return {"worst": distances[worst], "wrong": "" if distances[worst] < CLOSE else worst, "compared": len(distances)}


def distance(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return float("inf")
    if not theirs.numel():
        return 0.0
    # Masked scores are -inf.
    return float((mine.double() - theirs.double()).detach().nan_to_num(0.0).abs().max())


def outcomes(directory: str, options: str, checks: Iterable[Callable]) -> dict[str, Any]:
    loading = {"tokenizer": None, **OPTIONS[options]}
    whole = HookedTransformer.from_pretrained(directory, device="cpu", **loading)
    divided = HookedTransformer.from_pretrained(directory, tp_plan="auto", **loading)
    count = sum(hasattr(parameter, "full_tensor") for parameter in divided.hf_model.parameters())
    found = {check.__name__: difference(check, whole, divided) for check in checks}
    found["divided parameters"] = {"worst": 0.0, "wrong": "" if count else "none", "compared": count}
    found["refused"] = {"worst": 0.0, "wrong": refused(divided, directory, Path(directory).parent), "compared": 1}
    given = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", distributed_config={"tp_plan": "auto"}
    )
    taken = HookedTransformer.from_pretrained(directory, hf_model=given, **loading)
    found["given"] = difference(lambda model: {"logits": [model(TOKENS)], "z": [points(model)["z", 1]]}, whole, taken)
    return found


def main(out: str, plans: list[str]) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for plan in plans:
        directory, _, options = plan.rpartition("=")
        checks = (*COMMON, *MORE) if options.endswith("+") else COMMON
        options = options.removesuffix("+")
        results[f"{Path(directory).name}, {options}"] = outcomes(directory, options, checks)
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
