"""How are weights read where a job runs?

There is one run, of a model that is the server's own: nothing is kept from run to run, and no layer's weights are to be
shown. That takes a fraction of the code that reading them here does, and it is what travels in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import affine
from ... import whole as where
from ...basis import Basis
from ...errors import UnsupportedModelError
from ...parameters import Parameters


def module(self: Any, path: str) -> Any:
    """`Parameters.module`."""
    return self.hf_model.get_submodule(path)


def whole(tensor: Any) -> Any:
    """A parameter that several processes may hold a part of each."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def matrix(layer: Any, dtype: Any = None) -> Tensor:
    """`affine.matrix`.

    Raises:
        UnsupportedModelError: the layer keeps something else than the matrix that it multiplies with.
    """
    weight = whole(layer.weight)
    if not weight.is_floating_point() or weight.dim() != 2 or hasattr(layer, "base_layer"):
        raise UnsupportedModelError(
            f"the server's model is quantised or adapted ({type(layer).__name__}), and this takes its weights: use "
            "from_pretrained_no_processing"
        )
    return weight if type(layer).__name__ == "Conv1D" else weight.T


def bias_of(layer: Any, dtype: Any = None) -> Tensor | None:
    """`affine.bias_of`."""
    return whole(getattr(layer, "bias", None))


def value_bias(self: Any, layer: int) -> Tensor | None:
    """`Basis.value_bias`."""
    if not self.processing.moves_value_bias:
        return None
    weights = self.weights
    weight, bias = weights.parameters.projection(layer, "V")
    if not self.processing.fold_ln or not weights.architecture.blocks[layer].folds_ln1:
        return bias
    norm_bias = bias_of(weights.module(weights.architecture.in_layer(layer, "ln1")))
    if norm_bias is None:
        return bias
    flat, shape = weight.flatten(-2).T, weight.shape[1:]
    return (flat @ norm_bias if bias is None else torch.addmv(bias.flatten(), flat, norm_bias)).view(shape)


def computed(layer: Any, dtype: Any = None) -> None:
    """`affine.computed`: nothing, as `matrix` refuses what would be."""


def counted_once(hf_model: Any, path: str, parameter: Any) -> Any:
    """`whole.counted_once`: gradients reach no parameter of the server's."""
    return whole(parameter)


def device_of(part: Any) -> torch.device:
    """`whole.device_of`."""
    return next(part.parameters()).device


#: What travels in the place of what.
INSTEAD = {
    Parameters.module: module,
    Basis.value_bias: value_bias,
    affine.matrix: matrix,
    affine.bias_of: bias_of,
    affine.computed: computed,
    where.device_of: device_of,
    where.counted_once: counted_once,
}
