"""Where in a state dict does the tensor that a conversion needs come from?"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from .conversion_steps.base_tensor_conversion import BaseTensorConversion


class ParamProcessingConversion:
    """A conversion together with the name of the weight that it converts (TransformerLens' class of the same name).

    Args:
        tensor_conversion: the conversion.
        source_key: name of the weight, with ``{i}`` for the layer; None: the name of the result.
    """

    def __init__(self, tensor_conversion: BaseTensorConversion, source_key: str | None = None) -> None:
        self.tensor_conversion = tensor_conversion
        self.source_key = source_key

    def _resolve_key(self, current_key: str, template_key: str) -> str:
        layer = re.search(r"blocks\.(\d+)\.", current_key)
        return template_key.replace("{i}", layer[1]) if layer else template_key

    def convert(self, state_dict: dict[str, Tensor], current_key: str) -> Any:
        """The converted weight for ``current_key``; the conversion is given None where the weight is missing."""
        key = current_key if self.source_key is None else self._resolve_key(current_key, self.source_key)
        return self.tensor_conversion.convert(state_dict.get(key), state_dict)

    def revert(self, tensor: Any) -> Any:
        """The weight that was converted."""
        return self.tensor_conversion.revert(tensor)
