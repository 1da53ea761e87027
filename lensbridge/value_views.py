"""Where do the weights lie that the value bias is made of?

Every run of a processed model needs the bias, and finding the views of the HuggingFace parameters takes longer than
using them. Views of plain parameters are kept and used as long as the parameters lie where they did: an edit in place
shows in them, and a parameter that was replaced or moved has another address.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

#: Layers that multiply with their weight and add their bias, and nothing else.
PLAIN = (nn.Linear, Conv1D)


class ValueViews:
    """The weight of one layer's values and what they add, off the graph.

    Args:
        module: the projection with them, of a class in ``PLAIN``.
        norm: the norm before it.
        weight: a view of its weight, ``[d_model, head, d_head]``.
        bias: a view of its bias, ``[head, d_head]``.
    """

    def __init__(self, module: nn.Module, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        self._module, self._norm = weakref.ref(module), weakref.ref(norm)
        self._shape = weight.shape[1:]
        self._weight = weight.detach().flatten(-2).T
        self._bias = None if bias is None else bias.detach().flatten()
        self._at = _addresses(module)

    @classmethod
    def of(cls, module: Any, norm: Any, weight: Tensor, bias: Tensor | None) -> ValueViews | None:
        """The views, if they are that and the modules are plain ones."""
        kept = [module.weight, module.bias] if type(module) in PLAIN and getattr(norm, "bias", None) is not None else []
        if not kept or any(each is not None and type(each.data) is not Tensor for each in (*kept, norm.bias)):
            return None
        views = cls(module, norm, weight, bias)
        own = {_storage(each) for each in kept}
        # Where heads lie in groups, flattening has made a copy.
        return views if {_storage(views._weight), _storage(views._bias)} <= own | {None} else None

    def added(self, module: Any, norm: Any) -> Tensor | None:
        """What the norm's bias adds to the values, and their own bias, if all lies where it did."""
        offset: Tensor = norm.bias
        if self._module() is not module or self._norm() is not norm or _addresses(module) != self._at:
            return None
        bias = offset.to(self._weight.dtype)
        found = self._weight @ bias if self._bias is None else torch.addmv(self._bias, self._weight, bias)
        return found.view(self._shape)


def _addresses(module: Any) -> tuple:
    """Where the parameters of a layer lie."""
    return tuple(None if x is None else (x.data_ptr(), x.dtype, x.device) for x in (module.weight, module.bias))


def _storage(x: Tensor | None) -> int | None:
    return None if x is None else x.untyped_storage().data_ptr()
