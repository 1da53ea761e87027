"""Which models can be loaded, and which architecture do they have?

`api` answers from two tables: TransformerLens' model names with the HuggingFace class of each, and the records of
architectures that lensbridge has. TransformerLens 3.9.0's registry is a list of what its authors found on the hub, with
the tools that search the hub and run every model; neither is here, so no model counts as verified.
"""

from ...architectures import BY_CLASS
from . import api as api
from .exceptions import ModelNotFoundError as ModelNotFoundError
from .exceptions import ModelRegistryError as ModelRegistryError
from .schemas import ArchitectureGap as ArchitectureGap
from .schemas import ArchitectureStats as ArchitectureStats
from .schemas import ModelEntry as ModelEntry

#: The HuggingFace classes that can be loaded.
HF_SUPPORTED_ARCHITECTURES: set[str] = set(BY_CLASS)

__all__ = [
    "HF_SUPPORTED_ARCHITECTURES",
    "ArchitectureGap",
    "ArchitectureStats",
    "ModelEntry",
    "ModelNotFoundError",
    "ModelRegistryError",
]
