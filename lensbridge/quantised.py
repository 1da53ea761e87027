"""Which matrix does a quantised layer multiply with?

One row for each library's layers: by what they are known, which tensors they keep, and what these stand for. A layer
that rounds what it is given as well (LLM.int8, dynamic quantisation) still multiplies with one matrix, and that is the
one shown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import getmro
from typing import Any

import torch
from torch import Tensor, nn

from .computed import Computed
from .errors import UnsupportedModelError

#: Bits in the words that GPTQ and AWQ pack codes into.
WORD = 32
#: Where AWQ's kernels put the codes of eight neighbouring columns within a word.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Form:
    """One kind of quantised layer.

    Args:
        name: in an error message.
        known: whether a layer is of the kind.
        matrix: what it multiplies with, ``[out, in]``.
        stored: the tensors that it keeps.
        bias: what it adds.
    """

    name: str
    known: Callable[[Any], bool]
    matrix: Callable[[Any], Tensor]
    stored: Callable[[Any], Iterator[Tensor]]
    bias: Callable[[Any], Tensor | None] = lambda module: getattr(module, "bias", None)


def of_quantised(module: Any, dtype: torch.dtype | None) -> Computed | None:
    """What a quantised layer multiplies with; None if the layer is not quantised.

    Its ``weight`` raises an `UnsupportedModelError` where it is not known how its codes are laid out.
    """
    weight = module._parameters.get("weight")
    cls: Any = module.__class__
    if type(weight) is nn.Parameter and not _foreign(cls):
        return None
    form = next((form for form in FORMS if form.known(module)), None)
    if form is None:
        return None
    stored = tuple(each for tensor in form.stored(module) for each in _plain(tensor))
    bias = form.bias(module)
    found = Computed(
        shape=_shape(module, weight),
        dtype=dtype or torch.float32,
        make=lambda: _made(form, module),
        why=f"{module.__class__.__name__} keeps it quantised ({form.name})",
        sources=stored,
        state=(form.name, module.__class__),
        bias=bias,
        made_bias=bias is not None and bias is not getattr(module, "bias", None),
    )
    return found.with_bias_in(dtype)


@lru_cache(maxsize=512)
def _foreign(cls: Any) -> bool:
    """Whether a class is one of a library's that quantises, or of transformers' part that deals with these."""
    # Of transformers' integrations with libraries, models inherit methods.
    mro = [each for each in getmro(cls) if issubclass(each, nn.Module)]
    homes = {each.__module__.split(".")[0] for each in mro}
    ours = homes <= {"torch", "builtins", "transformers", "collections", "abc", "typing"}
    inside = any(each.__module__.startswith(("transformers.integrations", "torch.ao")) for each in mro)
    return inside or not ours


def _made(form: Form, module: Any) -> Tensor:
    with torch.no_grad():
        matrix = form.matrix(module)
    if tuple(matrix.shape) != _shape(module, module._parameters.get("weight")):
        raise _unknown(form.name, module)
    return matrix.detach()


def _shape(module: Any, weight: Tensor | None) -> tuple[int, int]:
    """The shape of a layer's matrix, by what layers call their sizes."""
    pairs = (
        *(("out_features", "in_features"), ("num_embeddings", "embedding_dim")),
        *(("outfeatures", "infeatures"), ("out_dim", "in_dim")),
    )
    for out, into in pairs:
        if isinstance(getattr(module, out, None), int) and isinstance(getattr(module, into, None), int):
            return getattr(module, out), getattr(module, into)
    if weight is None or weight.dim() != 2:
        raise _unknown("by an unknown library", module)
    return weight.shape[0], weight.shape[1]


def _unknown(name: str, module: Any) -> UnsupportedModelError:
    cls = module.__class__
    return UnsupportedModelError(
        f"the weights of {cls.__module__}.{cls.__name__} (quantised, {name}) are laid out in a way "
        "that is not known, so that they cannot be shown as matrices. Activations can: load with "
        "from_pretrained_no_processing, and read or edit these. For the weights, load the model dequantised (an option "
        "of its quantization_config, or hf_model.dequantize())"
    )


def _refuse(name: str) -> Callable[[Any], Tensor]:
    def refuse(module: Any) -> Tensor:
        raise _unknown(name, module)

    return refuse


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor of another class is made of, down to ordinary ones."""
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if hasattr(data, "__tensor_flatten__"):
        for name in data.__tensor_flatten__()[0]:
            yield from _plain(getattr(data, name))
    else:
        yield data


def _kept(module: Any) -> Iterator[Tensor]:
    """Everything that a layer keeps but its bias."""
    for kept in (module._parameters, module._buffers):
        yield from (tensor for name, tensor in kept.items() if tensor is not None and name != "bias")


def _is(package: str, *names: str) -> Callable[[Any], bool]:
    """Whether a layer's class, or one that it inherits, has one of these names and comes from a package."""

    def known(module: Any) -> bool:
        mro = (cls for cls in module.__class__.__mro__ if f"{cls.__module__}.".startswith(f"{package}."))
        return any(issubclass(cls, nn.Module) and (not names or cls.__name__ in names) for cls in mro)

    return known


def _weight_is(package: str) -> Callable[[Any], bool]:
    """Whether a layer's weight is a tensor of a class from a package."""

    def known(module: Any) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and type(weight.data).__module__.startswith(f"{package}.")

    return known


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def _four_bits(module: Any) -> Tensor:
    """Codes of blocks with a scale each (Dettmers et al. 2023), in the dtype in which the layer multiplies."""
    from bitsandbytes import functional

    weight, state = module.weight.data, _four_bit_state(module)
    if getattr(state, "packing_format_for_cpu", False):
        return _four_bits_on_cpu(weight, state)
    found = functional.dequantize_4bit(weight, state)
    chosen = getattr(module, "compute_dtype", None)
    return found if chosen is None else found.to(chosen)


def _four_bits_on_cpu(weight: Tensor, state: Any) -> Tensor:
    """The same on CPUs that multiply in bfloat16: the first run lays codes out otherwise, and rounds the scales."""
    from bitsandbytes import functional

    unnested = copy.copy(state)
    unnested.original_nested = False
    packed = functional._convert_weight_packed_for_cpu_inverse(weight, unnested)[0].view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(tuple(state.shape))
    values = state.code.bfloat16().float()[codes.long()].unflatten(-1, (-1, state.blocksize))
    return (values * state.absmax.T.float().unsqueeze(-1)).flatten(-2).bfloat16()


def _four_bit_state(module: Any) -> Any:
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _four_bits_kept(module: Any) -> Iterator[Tensor]:
    yield module.weight
    yield _four_bit_state(module).absmax


def _eight_bits(module: Any) -> Tensor:
    """Codes with a scale for each row (Dettmers et al. 2022); the first run takes both from the weight to a state."""
    codes, scales = _eight_bits_kept(module)
    return codes * (scales.view(-1, 1) / 127.0)


def _eight_bits_kept(module: Any) -> Iterator[Tensor]:
    held = module.weight if getattr(module.weight, "SCB", None) is not None else getattr(module, "state", module.weight)
    yield module.weight.data if held.CB is None else held.CB
    yield held.SCB


def _eight_bits_known(module: Any) -> bool:
    is_one = _is("bitsandbytes", "Linear8bitLt", "Embedding8bit")(module)
    # Without codes it is still, or to be trained as, an ordinary layer.
    return is_one and module.weight.dtype == torch.int8


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def _has(*names: str) -> Callable[[Any], bool]:
    """Whether a layer has these attributes."""
    return lambda module: all(getattr(module, name, None) is not None for name in names)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes in 32-bit words, in the order from the lowest bits; those of a word follow each other along ``dim``."""
    shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.movedim(-1, dim + 1).flatten(dim, dim + 1)


def _gptq(module: Any) -> Tensor:
    """``scales[group] * (code - zero[group])`` (Frantar et al. 2022).

    Codes follow each other along the input, zeros along the output; the older format stores zeros less one.
    """
    bits, scales, groups = _bits(module), module.scales, module.g_idx.long()
    own = getattr(module, "dequantize_weight", None)
    as_packed = tuple(module.qweight.shape) == (len(groups) * bits // WORD, scales.shape[1])
    if getattr(module, "adapter", None) is not None or (own is None and (WORD % bits or not as_packed)):
        raise _unknown("GPTQ", module)
    if own is not None:
        return own().T
    older = module.qzero_format() == 1 if hasattr(module, "qzero_format") else True
    zeros = unpacked(module.qzeros, bits, 1)[:, : scales.shape[1]] + int(older)
    return (scales[groups] * (unpacked(module.qweight, bits, 0) - zeros[groups])).T


def _bits(module: Any) -> int:
    return getattr(module, "bits", None) or module.w_bit


def _awq(module: Any) -> Tensor:
    """``scales[group] * (code - zero[group])`` (Lin et al. 2023), packed along the output, in an order of its own."""
    bits, scales = _bits(module), module.scales
    rows, columns = module.qweight.shape
    if bits != 4 or columns * WORD // bits != scales.shape[1] or rows % len(scales):
        raise _unknown("AWQ", module)
    codes, zeros = (_in_order(unpacked(words, bits, 1)) for words in (module.qweight, module.qzeros))
    times = rows // len(scales)
    return (scales.repeat_interleave(times, 0) * (codes - zeros.repeat_interleave(times, 0))).T


def _in_order(codes: Tensor) -> Tensor:
    return codes.unflatten(1, (-1, len(AWQ_ORDER)))[..., list(AWQ_ORDER)].flatten(1)


# --- others -----------------------------------------------------------------------------------------------------------


def _bitnet(module: Any) -> Tensor:
    """Signs and zeros times one scale (Wang et al. 2023); `online`, of weights that are rounded in each run."""
    if getattr(module, "rms_norm", None) is not None:
        raise _unknown("BitNet, with a norm of its own", module)
    if getattr(module, "online_quant", False):
        weight = module.weight.float()
        scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
        return (weight * scale).round().clamp(-1, 1) / scale
    if module.weight.is_floating_point():
        return module.weight * module.weight_scale
    from transformers.integrations.bitnet import unpack_weights

    return unpack_weights(module.weight, dtype=module.dtype) / module.weight_scale


def _bitnet_bias(module: Any) -> Tensor | None:
    """The stored bias; where the scale comes behind it, that much of it."""
    scaled = module.bias is not None and module.__class__.__name__ == "AutoBitLinear" and not module.online_quant
    return module.bias * module.weight_scale if scaled else module.bias


FORMS: tuple[Form, ...] = (
    Form(
        "bitsandbytes, 4 bits",
        _is("bitsandbytes", "Linear4bit", "Embedding4bit"),
        _four_bits,
        _four_bits_kept,
    ),
    Form("bitsandbytes, 8 bits", _eight_bits_known, _eight_bits, _eight_bits_kept),
    Form("torchao", _weight_is("torchao"), lambda module: module.weight.dequantize(), _kept),
    Form("quanto", _weight_is("optimum"), lambda module: module.weight.dequantize(), _kept),
    Form(
        "torch.ao, dynamic",
        _is("torch.ao.nn.quantized.dynamic", "Linear"),
        lambda module: module.weight().dequantize(),
        lambda module: iter((module.weight().int_repr(),)),
        lambda module: module.bias(),
    ),
    Form("HQQ", _is("hqq", "HQQLinear"), lambda module: module.dequantize(), _kept),
    Form("GPTQ", _has("qweight", "qzeros", "scales", "g_idx"), _gptq, _kept),
    Form("AWQ", _has("qweight", "qzeros", "scales"), _awq, _kept),
    Form("BitNet", _is("transformers.integrations.bitnet", "AutoBitLinear", "BitLinear"), _bitnet, _kept, _bitnet_bias),
    Form("by transformers", _is("transformers.integrations"), _refuse("by transformers"), _kept),
    Form(
        "compressed-tensors",
        lambda module: getattr(module, "quantization_scheme", None) is not None,
        _refuse("compressed-tensors"),
        _kept,
    ),
    Form(
        "by an unknown library",
        lambda module: any(not tensor.is_floating_point() and tensor.dim() == 2 for tensor in _kept(module)),
        _refuse("by an unknown library"),
        _kept,
    ),
)
