"""Which single conversions are there? One file for each, under TransformerLens' names."""

from .arithmetic_tensor_conversion import ArithmeticTensorConversion as ArithmeticTensorConversion
from .attention_auto_conversion import AttentionAutoConversion as AttentionAutoConversion
from .base_tensor_conversion import BaseTensorConversion as BaseTensorConversion
from .callable_tensor_conversion import CallableTensorConversion as CallableTensorConversion
from .chain_tensor_conversion import ChainTensorConversion as ChainTensorConversion
from .rearrange_tensor_conversion import RearrangeTensorConversion as RearrangeTensorConversion
from .repeat_tensor_conversion import RepeatTensorConversion as RepeatTensorConversion
from .split_tensor_conversion import SplitTensorConversion as SplitTensorConversion
from .tensor_conversion_set import TensorConversionSet as TensorConversionSet
from .ternary_tensor_conversion import TernaryTensorConversion as TernaryTensorConversion
from .transpose_tensor_conversion import TransposeTensorConversion as TransposeTensorConversion
from .zeros_like_conversion import ZerosLikeConversion as ZerosLikeConversion

__all__ = [
    "ArithmeticTensorConversion",
    "AttentionAutoConversion",
    "BaseTensorConversion",
    "CallableTensorConversion",
    "ChainTensorConversion",
    "RearrangeTensorConversion",
    "RepeatTensorConversion",
    "SplitTensorConversion",
    "TensorConversionSet",
    "TernaryTensorConversion",
    "TransposeTensorConversion",
    "ZerosLikeConversion",
]
