"""How is one value turned into another, step by step and back?

TransformerLens 3.9.0's conversions: small objects with ``convert`` and ``revert``. They serve weights
(`param_processing_conversion`, `lensbridge.weight_processing`) and activations alike: `HookPoint.enable_reshape` takes
one, and shows hooks the converted value.
"""

from .conversion_steps import TensorConversionSet as TensorConversionSet

__all__ = ["TensorConversionSet"]
