"""Which axis of an attention pattern is the heads'?

Some models make patterns as [batch, query, head, key] and TransformerLens has the heads second. Which of the two a
tensor is shows in its sizes, as long as there are not as many heads as positions.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from .base_tensor_conversion import BaseTensorConversion

Kind = Literal["transpose_1_2", "no_change"]


class AttentionAutoConversion(BaseTensorConversion):
    """Patterns as [batch, head, query, key], whichever of the two orders they come in.

    What was done to a tensor is kept under its ``id``, for `revert_conversion`, until `clear_state`.

    Args:
        config: with ``n_heads``, or HuggingFace's ``num_attention_heads``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._conversion_state: dict[int, dict[str, Any]] = {}

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        if not isinstance(input_value, Tensor):
            return input_value
        n_heads = getattr(self.config, "n_heads", None) or getattr(self.config, "num_attention_heads", None)
        kind = _kind(tuple(input_value.shape), n_heads)
        self._conversion_state[id(input_value)] = {
            "original_shape": input_value.shape,
            "conversion_type": kind,
            "n_heads": n_heads,
        }
        return input_value.transpose(1, 2) if kind == "transpose_1_2" else input_value

    def revert_conversion(self, converted_value: Any, original_tensor_id: int | None = None) -> Any:
        """The order that the tensor of this ``id`` had; as it is, if none of this ``id`` (or its own) was converted."""
        if not isinstance(converted_value, Tensor):
            return converted_value
        state = self._conversion_state.get(original_tensor_id or id(converted_value), {})
        turned = state.get("conversion_type") == "transpose_1_2" and converted_value.ndim == 4
        return converted_value.transpose(1, 2) if turned else converted_value

    def clear_state(self, tensor_id: int | None = None) -> None:
        """Forget one conversion, or all of them."""
        if tensor_id is None:
            self._conversion_state.clear()
        else:
            self._conversion_state.pop(tensor_id, None)

    def get_conversion_info(self, tensor_id: int) -> dict[str, Any] | None:
        """``original_shape``, ``conversion_type`` and ``n_heads`` of one conversion, or None."""
        return self._conversion_state.get(tensor_id)

    def __repr__(self) -> str:
        return f"AttentionAutoConversion(config={self.config}, active_states={len(self._conversion_state)})"


def _kind(shape: tuple[int, ...], n_heads: int | None) -> Kind:
    if len(shape) != 4:
        return "no_change"
    _, first, second, third = shape
    if n_heads and second == n_heads and first == third:
        return "transpose_1_2"
    if n_heads and first == n_heads and second == third:
        return "no_change"
    return "transpose_1_2" if first == second == third else "no_change"
