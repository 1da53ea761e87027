"""What if a whole set of values is converted, each by a name?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..helpers.find_property import find_property
from ..hook_conversion_utils import get_weight_conversion_field_set
from .base_tensor_conversion import BaseTensorConversion
from .rearrange_tensor_conversion import RearrangeTensorConversion


class TensorConversionSet(BaseTensorConversion):
    """Name -> converted value, looked up in an object or dict.

    Args:
        fields: name -> where its value comes from: a path (``"h.0.attn"``), a pair (path, conversion), or a tensor
            that is taken as it is. If the conversion is a set itself, the path leads to a list (the layers, say), and
            each of its items is converted.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        self.fields = fields

    def get_component(self, model: Any, name: str) -> Any:
        """What the field ``name`` leads to in ``model``; the second of a pair is called with it.

        Raises:
            ValueError: if there is no such field.
        """
        if name not in self.fields:
            raise ValueError(f"there is no component {name!r}; known: {', '.join(self.fields)}")
        path, step = (self.fields[name], None) if isinstance(self.fields[name], str) else self.fields[name]
        found = find_property(path, model)
        return found if step is None else step(found)

    def handle_conversion(self, input_value: Any, *full_context: Any) -> dict[str, Any]:
        return {name: self.process_conversion_action(input_value, field) for name, field in self.fields.items()}

    def process_conversion_action(self, input_value: Any, conversion_details: Any, *full_context: Any) -> Any:
        """The value of one field."""
        if isinstance(conversion_details, Tensor):
            return conversion_details
        if isinstance(conversion_details, str):
            return find_property(conversion_details, input_value)
        path, conversion = conversion_details
        return self.process_conversion(input_value, path, conversion, *full_context)

    def process_conversion(
        self, input_value: Any, remote_field: str, conversion: BaseTensorConversion, *full_context: Any
    ) -> Any:
        """The value at one path, converted; ``input_value`` is the first context of the conversion."""
        found = find_property(remote_field, input_value)
        if isinstance(conversion, TensorConversionSet):
            return [conversion.convert(item, input_value, *full_context) for item in found]
        return conversion.convert(found, input_value, *full_context)

    def get_conversion_action(self, field: str) -> BaseTensorConversion:
        """The conversion of one field; one that changes nothing if it has none."""
        details = self.fields[field]
        return details[1] if isinstance(details, tuple) else RearrangeTensorConversion("... -> ...")

    def __repr__(self) -> str:
        lines = get_weight_conversion_field_set(self.fields).rstrip("\n").replace("\n", "\n\t")
        return f"TensorConversionSet {{\n\t{lines}\n}}"
