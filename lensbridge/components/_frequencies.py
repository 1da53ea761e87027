"""At which wavelengths do the pairs of dimensions of a rotary embedding turn?

A wavelength here is in positions per radian: pair ``d`` of a head turns by ``position / wavelength[d]``. The plain
wavelengths are a geometric sequence; models trained at one length and run at a longer one stretch them, each in its own
way. Everything is computed in float32 (float64 for a float64 model) whatever the model's dtype.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import HookedTransformerConfig


def wavelengths(
    cfg: HookedTransformerConfig, rotary_dim: int, base: float, is_local: bool, dtype: torch.dtype
) -> Float[Tensor, "half_rotary_dim"]:
    """The wavelengths of a layer, after the config's rules for long contexts.

    NTK by parts comes before YaRN and YaRN before linear scaling; at most one of them applies, as in TransformerLens.
    """
    if cfg.use_NTK_by_parts_rope:
        return _ntk_by_parts(cfg, rotary_dim, base)
    if cfg.use_yarn_rope and not (cfg.yarn_global_attn_only and is_local):
        return _yarn(cfg, rotary_dim, base, dtype)
    plain = base ** (torch.arange(rotary_dim // 2, dtype=dtype) / (rotary_dim / 2))
    return plain if is_local else plain * cfg.rotary_scaling_factor


def _ntk_by_parts(cfg: HookedTransformerConfig, rotary_dim: int, base: float) -> Tensor:
    """Short waves as they are, long ones stretched by the factor, a blend in between (Llama 3.1, section 3.2 of
    https://arxiv.org/abs/2309.00071)."""
    frequency = 1.0 / base ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    turns = cfg.NTK_original_ctx_len * frequency / (2 * math.pi)
    low, high, factor = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor, cfg.NTK_by_parts_factor
    kept = (turns - low) / (high - low)
    blended = (1 - kept) * frequency / factor + kept * frequency
    stretched = torch.where(turns < low, frequency / factor, torch.where(turns > high, frequency, blended))
    return 1.0 / stretched


def _yarn(cfg: HookedTransformerConfig, rotary_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Like NTK by parts, with the blend linear in the number of the dimension (https://arxiv.org/abs/2309.00071)."""
    frequency = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)

    def dimension_with(turns: float) -> float:
        """The (fractional) dimension that turns this often within the original context."""
        length = cfg.yarn_original_max_position_embeddings
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_with(cfg.yarn_beta_fast), dimension_with(cfg.yarn_beta_slow)
    if cfg.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(rotary_dim // 2, dtype=dtype) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (frequency / cfg.yarn_factor * stretched + frequency * (1 - stretched))


def ntk_alpha(key_length: int, train_length: int) -> int:
    """By how much Qwen 1 widens the base for a context this long: 1 up to the training length, then 3, 7, 15, ..."""
    if key_length <= train_length:
        return 1
    return max(2 ** math.ceil(math.log(key_length / train_length, 2) + 1) - 1, 1)
