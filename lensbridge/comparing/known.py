"""Where does TransformerLens 3.9.0 show something else on purpose of ours, and why?

The rows of docs/differences.md that are about values at single points. Where 3.9.0 computes another function than
HuggingFace (its logits tell), nothing has to be listed: its values are no measure then.
"""

from __future__ import annotations

from collections.abc import Mapping

#: HuggingFace model type -> kind of point -> why it differs.
OTHERWISE: Mapping[str, Mapping[str, str]] = {
    "bloom": {
        "blocks.{l}.attn.hook_attn_scores": (
            "HuggingFace's ALiBi adds slope * key, 3.9.0's slope * (key - query): a constant in each row, which the "
            "softmax ignores"
        )
    }
}


def why_otherwise(model_type: str, kind: str) -> str:
    """Why 3.9.0 has something else at a kind of point; empty if it should not."""
    return OTHERWISE.get(model_type, {}).get(kind, "")
