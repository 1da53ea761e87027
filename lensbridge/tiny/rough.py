"""Which random weights make every part of a model show?

The usual initialisation hides things: unit gains, zero biases, patterns that are all but uniform. Here each gain and
bias is far from where it starts, and queries and keys are large enough that attention chooses. What is neutral is read
off the freshly initialised model: 0 for a gain that is stored as its difference to 1, else 1.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

GAIN, BIAS, SHARPNESS = 0.4, 0.3, 1.8
#: How large embeddings are: a first layer without a norm before it still chooses, and later layers still count.
EMBEDDING = 0.3
#: Parts of the names of projections that queries or keys come out of, alone or fused with others.
_QUERY_KEY = frozenset("q k qk qkv qkvz kv query key wq wk wqkv".split())
_OTHERS = frozenset({"c_attn", "W_pack", "router_mlp"})
#: Parameters of recurrences, which are only stable near where they start.
_DYNAMICS = re.compile(r".*(A_log|dt_bias|decay|time_|recurrent_param|dt_proj|igate|fgate|forget).*")
#: Factors that start at zero, so that what they multiply is not there at first.
_CLOSED = re.compile(r".*(\.temp|_gate|_output_scale)$")
#: What is added to an expert's score before the choice: little, or the same experts are always chosen.
_CHOOSES = re.compile(r".*(expert_bias|e_score_correction_bias|balancing_biases)")
CHOICE = 0.05
#: Statistics that are not weights.
_STATISTICS = re.compile(r".*(running_|num_batches|inv_freq|rope|rotary|position_ids|mask|std_scale).*")


def roughen(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter of a freshly initialised model a random value far from its neutral one, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and "Sinusoidal" not in _class_of(model, name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_rough(model, name, parameter, noise))
        for name, buffer in model.named_buffers():
            if _is_learned(model, name, buffer):
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(CHOICE * noise if _CHOOSES.fullmatch(name) else buffer + BIAS * noise)
            elif name.endswith("tid2eid"):
                router: Any = model.get_submodule(name.rpartition(".")[0])  # the experts of each token, in a table
                order = torch.rand(len(buffer), len(router.weight), generator=generator).argsort(dim=-1)
                buffer.copy_(order[:, : buffer.shape[1]])


def _class_of(model: nn.Module, name: str) -> str:
    """The name of the class of the module that has a parameter."""
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def _rough(model: nn.Module, name: str, start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The new value of one parameter that starts as ``start``."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not start.isfinite().all():
        start = torch.zeros_like(start)
    if _DYNAMICS.fullmatch(name):
        return start + 0.1 * noise
    if _CHOOSES.fullmatch(name):
        return CHOICE * noise
    if _CLOSED.fullmatch(name) and (start == 0).all():
        return 1 + GAIN * noise
    if start.dim() < 2 or (start == 1).all():
        return BIAS * noise if "bias" in leaf else start + GAIN * noise
    if "bias" in leaf and (start == 0).all():
        return BIAS * noise
    if isinstance(module, nn.Embedding):
        return EMBEDDING * noise
    sharp = any(_is_sharp(part) for part in (*owner.split(".")[-2:], leaf))
    return (SHARPNESS if sharp else 1.0) * noise * _fan_in(module, start) ** -0.5


def _is_sharp(name: str) -> bool:
    """Whether a module or parameter of this name projects to queries or keys, or is several layers before a choice."""
    return name in _OTHERS or not _QUERY_KEY.isdisjoint(name.lower().split("_"))


def _fan_in(module: nn.Module, weight: torch.Tensor) -> int:
    """How many inputs each output of a matrix sums over."""
    if type(module).__name__ == "Conv1D":  # transformers' own, stored as (in, out)
        return weight.shape[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return weight[0].numel()
    return weight.shape[-1]


def _is_learned(model: nn.Module, name: str, buffer: torch.Tensor) -> bool:
    """Whether a buffer is a weight in all but name: saved with the model, and a bias, or neutral as it starts."""
    owner, _, leaf = name.rpartition(".")
    if leaf in model.get_submodule(owner)._non_persistent_buffers_set or _STATISTICS.fullmatch(name):
        return False
    if not buffer.is_floating_point() or not buffer.numel():
        return False
    return "bias" in leaf or bool((buffer == 0).all() | (buffer == 1).all())
