"""How do the conversions of a quantized model replace those of the same model as it was?

The module is spelled as TransformerLens has it.
"""

from __future__ import annotations

from typing import Any


def merge_quantization_fields(field_set: Any, quantization_fields: dict[str, Any]) -> Any:
    """Put ``quantization_fields`` in the place of the fields of the same names, in place; returns ``field_set``.

    A pair (path, set of conversions) replaces the path of an existing pair and is merged into its set.

    Raises:
        RuntimeError: for a name that ``field_set`` does not have, or a set in the place of something else.
    """
    for name, new in quantization_fields.items():
        old = field_set.fields.get(name)
        if old is None:
            raise RuntimeError(f"{name!r} cannot be replaced: known are {', '.join(field_set.fields)}")
        if not (isinstance(new, tuple) and len(new) == 2):
            field_set.fields[name] = new
            continue
        is_pair = isinstance(old, tuple) and len(old) == 2
        if not (is_pair and hasattr(old[1], "fields") and hasattr(new[1], "fields")):
            raise RuntimeError(f"{name!r}: a set of conversions can only be merged into another set, not into {old!r}")
        merge_quantization_fields(old[1], new[1].fields)
        field_set.fields[name] = (new[0], old[1])
    return field_set
