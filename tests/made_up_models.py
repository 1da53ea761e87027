"""Which models has nobody described? A user's own class, built in its own way, for the tests of measuring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PreTrainedConfig):
    """Sizes under other names than usual; what is odd about the model is an option each."""

    model_type = "odd"

    def __init__(
        self,
        width: int = 48,
        depth: int = 2,
        heads: int = 6,
        vocab_size: int = 101,
        window: int = 64,
        parallel: bool = False,
        hidden_softmax: bool = False,
        strange_norm: bool = False,
        unreachable_factor: bool = False,
        **kwargs: Any,
    ) -> None:
        self.width, self.depth, self.heads, self.window = width, depth, heads, window
        self.vocab_size = vocab_size
        self.parallel, self.hidden_softmax, self.strange_norm = parallel, hidden_softmax, strange_norm
        self.unreachable_factor = unreachable_factor
        super().__init__(**kwargs)


class Squash(nn.Module):
    """RMSNorm whose gain is stored less one; ``strange``: with the mean of the absolute values instead."""

    def __init__(self, width: int, strange: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.epsilon = 1e-5
        self.strange = strange

    def forward(self, x: Tensor) -> Tensor:
        size = (
            x.abs().mean(-1, keepdim=True) if self.strange else x.pow(2).mean(-1, keepdim=True).add(self.epsilon).sqrt()
        )
        return x / size * (1 + self.weight)


def weigh(scores: Tensor, values: Tensor) -> Tensor:
    """Attend, with the softmax out of sight."""
    return deeper(scores) @ values


def deeper(scores: Tensor) -> Tensor:
    return functional.softmax(scores, dim=-1)


class Look(nn.Module):
    """Attention: keys, queries and values in one matrix, in this order."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.heads, self.hidden = config.heads, config.hidden_softmax
        self.kqv = nn.Linear(config.width, 3 * config.width)
        self.merge = nn.Linear(config.width, config.width, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 5 + mask
        return weigh(scores, v) if self.hidden else functional.softmax(scores, dim=-1) @ v

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        k, q, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.kqv(x).chunk(3, dim=-1))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / (
            2.0 ** torch.arange(q.shape[-1] // 2, device=x.device)
        )
        q, k = turned(q, angles), turned(k, angles)
        z = self.attend(q, k, v, mask)
        return self.merge(z.transpose(1, 2).flatten(-2))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` rotated by its position."""
    one, other = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


class Think(nn.Module):
    """A gated MLP that multiplies with the sigmoid of the gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 3 * width)
        self.valve = nn.Linear(width, 3 * width)
        self.narrow = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x) * self.valve(x).sigmoid())


class Storey(nn.Module):
    """One layer: a norm before attention and one behind it, a norm before the MLP."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.before_look = Squash(config.width, config.strange_norm)
        self.look = Look(config)
        self.after_look = Squash(config.width)
        self.before_think = Squash(config.width)
        self.think = Think(config.width)
        self.parallel = config.parallel
        self.share = (lambda: 0.7) if config.unreachable_factor else (lambda: 1.0)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        looked = self.after_look(self.look(self.before_look(x), mask))
        if self.parallel:
            return (x + looked + self.think(self.before_think(x)),)
        x = x + looked
        return (x + self.think(self.before_think(x)) * self.share(),)


class OddForCausalLM(PreTrainedModel):
    """The whole model."""

    config_class = OddConfig
    config: OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.tower = nn.ModuleList(Storey(config) for _ in range(config.depth))
        self.roof = Squash(config.width)
        self.speak = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **kwargs: Any
    ) -> CausalLMOutput:
        length = input_ids.shape[1]
        keep = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            keep = keep & attention_mask[:, None, None].bool()
        x = self.words(input_ids)
        mask = torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_fill(~keep, torch.finfo(x.dtype).min)
        for storey in self.tower:
            (x,) = storey(x, mask)
        return CausalLMOutput(logits=self.speak(self.roof(x)))


def odd_model(**options: Any) -> OddForCausalLM:
    """A model with random weights, none of which is near its neutral value."""
    torch.manual_seed(0)
    model = OddForCausalLM(OddConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.4 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if name == "words.weight" else scale))
    return model
