"""How is a parameter given another value for a while?

The values are copied into the parameter and copied back, so the parameter stays the same object everywhere it is
registered. ``torch.func.functional_call`` cannot promise that for a module that is registered under two names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def temporarily_swap_parameter(parameter: torch.nn.Parameter, new_value: torch.Tensor) -> Iterator[torch.nn.Parameter]:
    """Within the ``with`` block, ``parameter`` holds ``new_value``; afterwards, also after an exception, its own.

    Gradients, hooks and ``requires_grad`` are left alone. The new value may be on another device.

    Raises:
        TypeError: ``parameter`` is no Parameter, or ``new_value`` is no plain tensor.
        ValueError: the shapes or the dtypes differ.
    """
    if not isinstance(parameter, torch.nn.Parameter):
        raise TypeError(f"parameter must be a torch.nn.Parameter, not {type(parameter).__name__}")
    if not isinstance(new_value, torch.Tensor) or isinstance(new_value, torch.nn.Parameter):
        raise TypeError(f"new_value must be a plain torch.Tensor, not {type(new_value).__name__}")
    for quality in ("shape", "dtype"):
        wanted, given = getattr(parameter, quality), getattr(new_value, quality)
        if wanted != given:
            raise ValueError(f"new_value has {quality} {given}; the parameter has {quality} {wanted}")
    own_values = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(new_value)
        yield parameter
    finally:
        with torch.no_grad():
            parameter.copy_(own_values)
