"""Is a model after a job what it was before?

A server's model is shared: whatever a job changes, everybody gets. So everything that a client's code can reach and
that could show is compared, and the logits of a fixed text besides, which must be the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from nnsight import TransformersModel

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def tensors(module: torch.nn.Module) -> dict[str, Any]:
    """Of every parameter and buffer: which tensor it is, how often it was written to, and its gradient."""
    found: dict[str, Any] = {}
    for kind, values in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, value in values:
            found[f"{kind} {name}"] = (id(value), value._version, value.dtype, value.device, value.requires_grad)
            found[f"gradient of {kind} {name}"] = value.grad is None
            found[f"hooks of {kind} {name}"] = len(value._backward_hooks or ())
    return found


def reference(module: torch.nn.Module) -> list[float]:
    """The logits of a fixed text, as numbers that can be compared."""
    tokens = torch.arange(1, 8)[None]
    with torch.no_grad():
        return module(tokens, use_cache=False).logits.flatten().tolist()


def state(model: TransformersModel) -> dict[str, Any]:
    """Everything that a job must leave as it is, by a name for people."""
    module, tokenizer = model._module, model.tokenizer
    found: dict[str, Any] = {
        "config": module.config.to_dict(),
        "attention implementation": module.config._attn_implementation,
        "generation config": module.generation_config.to_dict(),
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer), tokenizer.special_tokens_map),
        "interleaver": (model.interleaver.interleaving, len(model.interleaver.mediators)),
        "default dtype": torch.get_default_dtype(),
        "gradients are on": torch.is_grad_enabled(),
        **tensors(module),
    }
    for path, part in module.named_modules():
        found[f"training mode of {path or 'model'}"] = part.training
        found[f"modules in {path or 'model'}"] = [(name, id(child)) for name, child in part.named_children()]
        for kind in HOOKS:
            found[f"{kind[1:].replace('_', ' ')} of {path or 'model'}"] = list(getattr(part, kind))
    for envoy in model.modules():
        found[f"edits of {envoy.path}"] = len(envoy._edits)
    found["logits"] = reference(module)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not the same."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
