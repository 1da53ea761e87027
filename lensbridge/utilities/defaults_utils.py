"""What does an argument mean that was left at its default, and how is a default changed for one call?

``prepend_bos`` and ``padding_side`` default to :data:`USE_DEFAULT_VALUE`: whatever the model says. Code below the call
reads only the model, so for the length of the call the caller's value is put there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

from .attribute_utils import get_nested_attr, set_nested_attr

#: Stands for "not given: take what the model says". It is None, as in TransformerLens, so None can be passed too.
USE_DEFAULT_VALUE = None


def override_or_use_default_value(default_flag: Any, override: Any | None = None) -> Any:
    """``override``, or ``default_flag`` where the override is None."""
    return default_flag if override is USE_DEFAULT_VALUE else override


class _Default(NamedTuple):
    """Where a default lives below the model, and what it may be set to."""

    path: str
    valid_values: tuple[Any, ...]


_DEFAULTS = {
    "prepend_bos": _Default("cfg.default_prepend_bos", (USE_DEFAULT_VALUE, True, False)),
    "padding_side": _Default("tokenizer.padding_side", (USE_DEFAULT_VALUE, "left", "right")),
}


class LocallyOverridenDefaults:
    """Within the ``with`` block, ``model`` has these defaults; afterwards, also after an exception, its own again.

    Overrides are ``prepend_bos`` (``model.cfg.default_prepend_bos``) and ``padding_side``
    (``model.tokenizer.padding_side``; nothing to do for a model without tokenizer). None keeps the model's value. The
    values are checked before the first one is set, so a refused one leaves the model as it was.

    Raises:
        AssertionError: an override has another name, or a value that this default cannot have.
    """

    def __init__(self, model: Any, **overrides: Any) -> None:
        self.model = model
        self.overrides = overrides
        if not overrides.keys() <= _DEFAULTS.keys():
            unknown = ", ".join(sorted(overrides.keys() - _DEFAULTS.keys()))
            raise AssertionError(f"{unknown} cannot be overridden; {', '.join(_DEFAULTS)} can.")
        self._before: dict[str, Any] = {}
        #: The defaults are the model's, so other threads wait until they are back (a model may say how).
        self._turn: AbstractContextManager = getattr(model, "_turn", nullcontext)()

    def __enter__(self) -> None:
        self._turn.__enter__()
        try:
            self._override()
        except BaseException:
            self._turn.__exit__(None, None, None)
            raise

    @property
    def values_with_defaults(self) -> dict[str, _Default]:
        """The defaults that this model has."""
        return {
            name: at for name, at in _DEFAULTS.items() if name != "padding_side" or self.model.tokenizer is not None
        }

    def _override(self) -> None:
        wanted = {name: value for name, value in self.overrides.items() if value is not USE_DEFAULT_VALUE}
        if not wanted:
            return
        defaults = self.values_with_defaults
        wanted = {name: value for name, value in wanted.items() if name in defaults}
        for name, value in wanted.items():
            valid = defaults[name].valid_values
            if value not in valid:
                raise AssertionError(f"{name} must be one of {list(valid)}, but got {value!r}.")
        for name, value in wanted.items():
            path = defaults[name].path
            self._before[path] = get_nested_attr(self.model, path)
            set_nested_attr(self.model, path, value)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        try:
            while self._before:
                path, value = self._before.popitem()
                set_nested_attr(self.model, path, value)
        finally:
            self._turn.__exit__(None, None, None)
