"""What has been established about a part of a model, and what could not be?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Findings:
    """Fields of a record, and for each hook point that these do not make possible the reason.

    Points go by their names in the table (`points.py`); a name that ends with a dot stands for all that begin so.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    #: What TransformerLens' config says of it.
    values: dict[str, Any] = field(default_factory=dict)

    def refuse(self, reason: str, *points: str) -> None:
        """Note why there are no such points; the first reason stays."""
        for point in points:
            self.reasons.setdefault(point, reason)

    def add(self, other: Findings) -> None:
        """Take over what was found about another part."""
        self.fields |= other.fields
        self.values |= other.values
        for point, reason in other.reasons.items():
            self.reasons.setdefault(point, reason)


BLOCK = "blocks.{l}."
ATTN = f"{BLOCK}attn."
#: The points of attention by what they show.
ROTATED = (f"{ATTN}hook_rot_q", f"{ATTN}hook_rot_k")
SQUARES = (f"{ATTN}hook_attn_scores", f"{ATTN}hook_pattern")
Z = (f"{ATTN}hook_z",)
RESULT = (f"{ATTN}hook_result",)
OWN_INPUTS = tuple(f"{BLOCK}hook_{name}" for name in ("attn_in", "q_input", "k_input", "v_input"))
QUERIES = (f"{ATTN}hook_q", f"{ATTN}hook_k", *OWN_INPUTS)
VALUES = (f"{ATTN}hook_v",)
QK_NORMS = (f"{ATTN}q_norm.", f"{ATTN}k_norm.")
NEURONS = tuple(f"{BLOCK}mlp.hook_{name}" for name in ("pre", "pre_linear", "post"))
EXPERTS = (f"{BLOCK}mlp.hook_expert_weights", f"{BLOCK}mlp.hook_expert_indices")
