"""A model laid out as the first Qwen (Bai et al. 2023), whose code came with its checkpoints.

transformers 5 cannot run that code, and has none of its own. So this is somebody's own model: its modules and config
have the names that 3.9.0's converter reads, and nothing here knows it, so that its record has to be measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class QWenConfig(PretrainedConfig):
    """The fields of the first Qwen's config that 3.9.0 reads."""

    model_type = "qwen"

    def __init__(
        self,
        vocab_size: int = 320,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        intermediate_size: int = 96,
        seq_length: int = 64,
        layer_norm_epsilon: float = 1e-6,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.seq_length = self.max_position_embeddings = seq_length
        self.layer_norm_epsilon, self.kv_channels = layer_norm_epsilon, hidden_size // num_attention_heads
        self.scale_attn_weights, self.initializer_range = True, 0.02
        super().__init__(**others)


class RMSNorm(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.eps, self.weight = config.layer_norm_epsilon, nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) over halves; x: [batch, pos, head, d_head]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** -(torch.arange(half, device=x.device) / half)
    angles = positions[..., None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Attention(nn.Module):
    def __init__(self, config: QWenConfig, number: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.number, self.heads, self.d_head = number, config.num_attention_heads, config.kv_channels
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        scores = query @ key.transpose(-1, -2) / self.d_head**0.5
        scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
        weights = nn.functional.softmax(scores, dim=-1)
        return (weights @ value).transpose(1, 2), weights

    def forward(self, x: Tensor, positions: Tensor, attended: Tensor, past: Cache | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, self.d_head)) for part in self.c_attn(x).split(x.shape[-1], dim=-1)
        )
        query, key = rotated(query, positions).transpose(1, 2), rotated(key, positions).transpose(1, 2)
        value = value.transpose(1, 2)
        if past is not None:
            key, value = past.update(key, value, self.number)
        mixed, _ = self.weigh(query, key, value, attended)
        return self.c_proj(mixed.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size // 2
        self.w1, self.w2 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Layer(nn.Module):
    def __init__(self, config: QWenConfig, number: int) -> None:
        super().__init__()
        self.ln_1, self.attn = RMSNorm(config), Attention(config, number)
        self.ln_2, self.mlp = RMSNorm(config), MLP(config)

    def forward(self, x: Tensor, positions: Tensor, attended: Tensor, past: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions, attended, past)
        return x + self.mlp(self.ln_2(x))


class Body(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config)


class QWenLMHeadModel(PreTrainedModel, GenerationMixin):
    """The language model."""

    config_class = QWenConfig

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(start + x.shape[1], device=x.device)
        attended = (places[start:, None] >= places)[None, None]
        if attention_mask is not None:
            attended = attended & attention_mask[:, None, None, :].bool()
        positions = places[None, start:] if position_ids is None else position_ids
        for layer in self.transformer.h:
            x = layer(x, positions, attended, past_key_values)
        logits = self.lm_head(self.transformer.ln_f(x))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
