"""What is attention whose heads share keys and values in groups?

The parameters (``_W_K``, ...) have one slice per group. ``W_K`` and the like are computed from them, one slice per
head, so that analyses need not know of groups; editing what they return changes nothing.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ._parameters import Config, bias, weight
from .abstract_attention import AbstractAttention, Heads, Scores


def _per_head(name: str) -> property:
    """A property that repeats the parameter ``_name`` for the heads of each group; setting it sets the parameter."""

    def read(self: GroupedQueryAttention) -> Tensor:
        return getattr(self, f"_{name}").repeat_interleave(self.repeat_kv_heads, dim=0)

    def write(self: GroupedQueryAttention, value: Tensor) -> None:
        setattr(self, f"_{name}", value)

    return property(read, write, doc=f"``_{name}``, repeated for the heads of each group.")


class GroupedQueryAttention(AbstractAttention):
    """Attention with ``cfg.n_key_value_heads`` keys and values (https://arxiv.org/abs/2305.13245).

    ``hook_k`` and ``hook_v`` show one entry per group, or per head with ``cfg.ungroup_grouped_query_attention``.
    Arguments as for `AbstractAttention` (TransformerLens' GroupedQueryAttention).
    """

    W_K: Float[Tensor, "head_index d_model d_head"] = _per_head("W_K")  # type: ignore[assignment]
    W_V: Float[Tensor, "head_index d_model d_head"] = _per_head("W_V")  # type: ignore[assignment]
    b_K: Float[Tensor, "head_index d_head"] = _per_head("b_K")  # type: ignore[assignment]
    b_V: Float[Tensor, "head_index d_head"] = _per_head("b_V")  # type: ignore[assignment]

    def __init__(self, cfg: Config, attn_type: str = "global", layer_id: int | None = None) -> None:
        super().__init__(cfg, attn_type, layer_id)
        groups = self.cfg.n_key_value_heads
        if groups is None:
            raise AssertionError("grouped-query attention needs cfg.n_key_value_heads")
        n_heads, d_model, d_head = self.W_Q.shape
        self.repeat_kv_heads = n_heads // groups
        self._W_K = weight(groups, d_model, d_head, cfg=self.cfg)
        self._W_V = weight(groups, d_model, d_head, cfg=self.cfg)
        self._b_K = bias(groups, d_head, cfg=self.cfg)
        self._b_V = bias(groups, d_head, cfg=self.cfg)

    def _key_value_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.cfg.ungroup_grouped_query_attention:
            return super()._key_value_parameters()
        return self._W_K, self._b_K, self._W_V, self._b_V

    def _for_each_head(self, x: Heads) -> Heads:
        if self.cfg.ungroup_grouped_query_attention:
            return x
        return x.repeat_interleave(self.repeat_kv_heads, dim=2)

    def calculate_attention_scores(self, q: Heads, k: Heads) -> Scores:
        """As in the base class, with the keys of each group repeated for its heads."""
        return super().calculate_attention_scores(q, self._for_each_head(k))

    def calculate_z_scores(self, v: Heads, pattern: Scores) -> Heads:
        """As in the base class, with the values of each group repeated for its heads."""
        return super().calculate_z_scores(self._for_each_head(v), pattern)
