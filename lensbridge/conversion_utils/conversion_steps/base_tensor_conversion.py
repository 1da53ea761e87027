"""What do all conversions have in common?

``convert`` is ``handle_conversion`` between two optional filters, and ``revert`` undoes it where it can be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BaseTensorConversion:
    """The base of all conversions (TransformerLens' class of the same name).

    A conversion of one's own defines ``handle_conversion``, and ``revert`` if what it does has an inverse.

    Args:
        input_filter: applied to what is converted, before.
        output_filter: applied to the result.
    """

    def __init__(
        self,
        input_filter: Callable[[Any], Any] | None = None,
        output_filter: Callable[[Any], Any] | None = None,
    ) -> None:
        self.input_filter = input_filter
        self.output_filter = output_filter

    def convert(self, input_value: Any, *full_context: Any) -> Any:
        """The converted value. ``full_context`` is what else a conversion may look at, such as a whole state dict."""
        return self._filtered(self.handle_conversion, input_value, *full_context)

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        """The conversion itself.

        Raises:
            NotImplementedError: always; a conversion has to define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define handle_conversion(input_value, *full_context)")

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        """The value that was converted, or ``input_value`` as it is where a conversion has no inverse."""
        return input_value

    def _filtered(self, step: Callable[..., Any], value: Any, *full_context: Any) -> Any:
        if self.input_filter is not None:
            value = self.input_filter(value)
        result = step(value, *full_context)
        return result if self.output_filter is None else self.output_filter(result)
