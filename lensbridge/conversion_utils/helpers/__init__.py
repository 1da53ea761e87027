"""What do conversions need besides themselves?"""

from .find_property import find_property as find_property
from .merge_quantiziation_fields import merge_quantization_fields as merge_quantization_fields

__all__ = ["find_property", "merge_quantization_fields"]
