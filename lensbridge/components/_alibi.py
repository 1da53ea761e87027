"""How does ALiBi let heads prefer near tokens?

Each head adds to its scores a negative number that grows with the distance, at a rate of its own
(https://arxiv.org/abs/2108.12409). The biases depend on lengths alone and are kept from run to run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Alibi:
    """Mixin of attention: the biases, and the largest of them that was needed so far."""

    #: Biases ``[head_index, pos, pos]`` of the longest input so far; None before the first.
    alibi: Tensor | None

    @staticmethod
    def create_alibi_slope(n_ctx: int, device: str | torch.device | None = None) -> Float[Tensor, "query key"]:
        """Minus the distance from each query back to each key, and zero for keys that come later."""
        positions = torch.arange(n_ctx, device=device)
        return (positions[None, :] - positions[:, None]).clamp(max=0).to(torch.float32)

    @staticmethod
    def create_alibi_multipliers(n_heads: int, device: str | torch.device | None = None) -> Float[Tensor, "n_heads"]:
        """The rate of each head: a geometric sequence that starts at, and shrinks by, ``2 ** (-8 / n_heads)``."""
        rate = 2 ** (-8 / n_heads)
        return rate * rate ** torch.arange(n_heads, device=device)

    @staticmethod
    def create_alibi_bias(
        n_heads: int, n_ctx: int, device: str | torch.device | None = None
    ) -> Float[Tensor, "head_idx query key"]:
        """What every head adds to its scores over ``n_ctx`` positions."""
        slope = Alibi.create_alibi_slope(n_ctx, device)
        return Alibi.create_alibi_multipliers(n_heads, device)[:, None, None] * slope

    def alibi_for(
        self, n_heads: int, query_length: int, key_length: int, device: torch.device
    ) -> Float[Tensor, "head_idx query key"]:
        """The biases for the last ``query_length`` of ``key_length`` positions."""
        kept = self.alibi
        if kept is None or kept.shape[-1] < key_length or kept.device != device:
            # Kept for later runs, with gradients or without.
            with torch.inference_mode(False):
                self.alibi = kept = self.create_alibi_bias(n_heads, key_length, device)
        return kept[:, key_length - query_length : key_length, :key_length]
