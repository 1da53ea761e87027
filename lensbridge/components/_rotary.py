"""How are queries and keys turned by their positions?

The sines and cosines of all positions up to a length lie in two buffers, which are part of a state dict; the tables
start short and grow when a longer input comes. What is turned is the first ``rotary_dim`` dimensions of a head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import HookedTransformerConfig
from ..utilities.tensors import get_offset_position_ids
from ._frequencies import ntk_alpha, wavelengths


class Rotary:
    """Mixin of attention: the tables of sines and cosines, and their use (https://arxiv.org/abs/2104.09864)."""

    #: Rows of the tables at the start.
    ROTARY_INITIAL_CACHE_SIZE = 2048

    cfg: HookedTransformerConfig
    attn_type: str
    training: bool
    rotary_sin: Tensor
    rotary_cos: Tensor
    #: The widening of the base that the tables are made for; other than 1 only with ``use_dynamic_ntk_rope``.
    _ntk_alpha_cached: int = 1

    @property
    def _rotary_base(self) -> float:
        local = self.cfg.rotary_base_local
        return local if local is not None and self.attn_type == "local" else self.cfg.rotary_base

    def calculate_sin_cos_rotary(
        self, rotary_dim: int, n_ctx: int, base: float | int = 10000, dtype: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "n_ctx rotary_dim"], Float[Tensor, "n_ctx rotary_dim"]]:
        """Sines and cosines of the angles at the first ``n_ctx`` positions, one column per dimension.

        The two dimensions of a pair have the same angle; which two are a pair is for ``cfg.rotary_adjacent_pairs``.
        """
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        wave = wavelengths(self.cfg, rotary_dim, base, self.attn_type == "local", precise)
        wave = wave.repeat_interleave(2) if self.cfg.rotary_adjacent_pairs else wave.repeat(2)
        angles = torch.arange(n_ctx, dtype=precise)[:, None] / wave
        sin, cos = angles.sin().to(dtype), angles.cos().to(dtype)
        if self.cfg.use_yarn_rope and not (self.cfg.yarn_global_attn_only and self.attn_type == "local"):
            sin, cos = sin * self.cfg.yarn_attention_factor, cos * self.cfg.yarn_attention_factor
        return sin, cos

    def rotate_every_two(self, x: Float[Tensor, "... rotary_dim"]) -> Float[Tensor, "... rotary_dim"]:
        """Each pair ``(a, b)`` as ``(-b, a)``: a quarter turn. The last dimension must be even."""
        if self.cfg.rotary_adjacent_pairs:
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def apply_rotary(
        self,
        x: Float[Tensor, "batch pos head_index d_head"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos head_index d_head"]:
        """Queries or keys turned by their positions.

        ``past_kv_pos_offset`` tokens came before these; with a mask (of those too), positions count attended tokens.

        Raises:
            IndexError: a position lies beyond ``n_ctx``.
        """
        end = past_kv_pos_offset + x.shape[1]
        self._prepare_tables(end)
        if attention_mask is None:
            if end > len(self.rotary_cos):
                raise IndexError(
                    f"the input is {end} tokens long (with the key-value cache), n_ctx is {self.cfg.n_ctx}"
                )
            cos, sin = (table[past_kv_pos_offset:end, None] for table in (self.rotary_cos, self.rotary_sin))
        else:
            positions = get_offset_position_ids(past_kv_pos_offset, attention_mask).to(self.rotary_cos.device)
            cos, sin = (table[positions].unsqueeze(2) for table in (self.rotary_cos, self.rotary_sin))
        width = cos.shape[-1]
        turning, rest = x[..., :width], x[..., width:]
        turned = turning * cos + self.rotate_every_two(turning) * sin
        return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)

    def _register_tables(self, register: bool = True) -> None:
        """Make the tables, in their first size."""
        sin, cos = self._tables(min(self.cfg.n_ctx, self.ROTARY_INITIAL_CACHE_SIZE))
        if register:
            self.register_buffer("rotary_sin", sin)  # type: ignore[attr-defined]
            self.register_buffer("rotary_cos", cos)  # type: ignore[attr-defined]
        else:
            self.rotary_sin, self.rotary_cos = sin, cos

    def _tables(self, length: int, alpha: int = 1) -> tuple[Tensor, Tensor]:
        dim = self.cfg.rotary_dim
        assert dim is not None
        base = self._rotary_base if alpha == 1 else self._rotary_base * alpha ** (dim / (dim - 2))
        return self.calculate_sin_cos_rotary(dim, length, base=base, dtype=self.cfg.dtype)

    def _prepare_tables(self, length: int) -> None:
        """See to it that the tables reach ``length`` positions (at most ``n_ctx``), in the base that it calls for."""
        rows, alpha = len(self.rotary_cos), 1
        if self.cfg.use_dynamic_ntk_rope and not self.training:
            alpha = ntk_alpha(length, self.cfg.train_seq_length or self.cfg.n_ctx)
        if alpha == self._ntk_alpha_cached and length <= min(rows, self.cfg.n_ctx):
            return
        wanted = rows if length <= rows else max(rows, min(self.cfg.n_ctx, max(length, 2 * rows)))
        if wanted == rows and alpha == self._ntk_alpha_cached:
            return
        sin, cos = self._tables(wanted, alpha)
        self._ntk_alpha_cached = alpha
        self.rotary_sin, self.rotary_cos = sin.to(self.rotary_sin), cos.to(self.rotary_cos)
